"""The vision tower of the Qwen3 models. Source: `Qwen3VLVisionModel` in transformers 5.23.

Features tapped behind earlier blocks (deepstack; in some models of none) pass mergers of their own.
Legend: P patches, D width, N merged features.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from mmfn.batch import Tower
from mmfn.models.hf_config import ConfigReader
from mmfn.models.layers import vision
from mmfn.models.layers.vision import VisionConfig
from mmfn.ops import Ops
from mmfn.tree import Tree

DEFAULTS = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "patch_size": 16,
    "num_position_embeddings": 2304,
}
MERGER = ("norm", "up", "down")  # leaves of a merger


def config_from_hf(hf: ConfigReader, deepstack: Sequence[int] = ()) -> VisionConfig:
    """The `vision_config` of a `config.json`. `deepstack`: blocks behind which features are tapped, if it says none."""
    hf, activations = hf.with_defaults(DEFAULTS), {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
    return VisionConfig(
        **vision.fields_from_hf(hf),
        d_ff=hf.integer("intermediate_size"),
        num_positions=hf.integer("num_position_embeddings"),
        deepstack=hf.integers("deepstack_visual_indexes", deepstack),
        activation=hf.choice("hidden_act", activations, "gelu_pytorch_tanh"),
    )


def specs(cfg: VisionConfig) -> Tree:
    """The parameters of the tower."""
    return {
        "patch_embed": vision.patch_embed_specs(cfg),
        "positions": vision.position_specs(cfg),
        "layers": [vision.block_specs(cfg) for _ in range(cfg.depth)],
        "merger": vision.merger_specs(cfg, norm_merged=False),
        "deepstack": [vision.merger_specs(cfg, norm_merged=True) for _ in cfg.deepstack],
    }


def encode(params: Tree, tower: Tower, cfg: VisionConfig, ops: Ops) -> tuple[Tensor, list[Tensor]]:
    """`(features_ND, taps)`: merged features of all images and frames, and those tapped behind earlier blocks."""
    x_PD = vision.patch_embed(params["patch_embed"], tower.inputs_UF, ops)
    x_PD = x_PD + vision.position_embed(params["positions"], tower.coords_P4, ops).to(x_PD.dtype)
    taps = {
        i: partial(tap, merger, cfg=cfg, ops=ops) for i, merger in zip(cfg.deepstack, params["deepstack"], strict=True)
    }
    frames = [tower.segments[0]] * cfg.depth
    x_PD, features = vision.run_blocks(params["layers"], x_PD, tower.coords_P4, frames, cfg, ops, between=taps)
    return vision.merge(params["merger"], x_PD, cfg, ops, norm_merged=False), [features[i] for i in sorted(features)]


def tap(params: Tree, x_PD: Tensor, *, cfg: VisionConfig, ops: Ops) -> tuple[Tensor, Tensor]:
    """`(x_PD, features_ND)`: what a merger makes of the patches behind a block, which go on as they are."""
    return x_PD, vision.merge(params, x_PD, cfg, ops, norm_merged=True)


def names(
    name: str,
    *,
    merger: Sequence[str] = ("norm", "linear_fc1", "linear_fc2"),
    deepstack: str = "deepstack_merger_list",
) -> list[tuple[str, str]]:
    """`(path, Hugging Face name)` of the tower's leaves, there under `name`.

    `merger`: what the norm, the up and the down projection of a merger are called there; `deepstack`: the mergers of
    what is tapped.
    """
    pairs = {
        "patch_embed": "patch_embed.proj",
        "positions": "pos_embed",
        "layers/{i}/attention_norm": "blocks.{i}.norm1",
        "layers/{i}/attention/qkv": "blocks.{i}.attn.qkv",
        "layers/{i}/attention/o": "blocks.{i}.attn.proj",
        "layers/{i}/mlp_norm": "blocks.{i}.norm2",
        "layers/{i}/mlp/up": "blocks.{i}.mlp.linear_fc1",
        "layers/{i}/mlp/down": "blocks.{i}.mlp.linear_fc2",
        **{f"merger/{own}": f"merger.{their}" for own, their in zip(MERGER, merger, strict=True)},
        **{f"deepstack/{{i}}/{own}": f"{deepstack}.{{i}}.{their}" for own, their in zip(MERGER, merger, strict=True)},
    }
    return [(f"vision/{own}/{{leaf}}", f"{name}.{their}.{{leaf}}") for own, their in pairs.items()]
