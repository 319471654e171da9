"""The vision tower: patch embedding, interpolated position embedding, blocks and patch mergers.

Features are merged patches. Those tapped behind earlier blocks (deepstack) pass mergers of their own.

Legend: P patches, F values of a flattened patch, D width, H heads, C channels of a head, R = C / 2, N merged features.
"""

from dataclasses import dataclass
from functools import partial
from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import embedding

from mmfn.batch import Segments, Tower
from mmfn.errors import UserError
from mmfn.models.hf_config import ConfigReader
from mmfn.models.layers import linear, norm, rope
from mmfn.ops import Ops
from mmfn.spec import normal, spec
from mmfn.tree import Tree

NORM_EPS = 1e-6  # of every layer norm in the tower; fixed in the reference implementation


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes of the tower. `deepstack`: blocks behind which features are tapped; `activation`: an op's name."""

    depth: int
    d_model: int
    d_ff: int
    num_heads: int
    d_out: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    num_positions: int
    num_channels: int = 3
    deepstack: tuple[int, ...] = ()
    rope_theta: float = 10_000.0
    activation: str = "gelu_tanh"
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.d_model % (4 * self.num_heads):
            raise UserError(
                f"vision hidden_size is {self.d_model} but must be a multiple of 4 * num_heads = {4 * self.num_heads}: "
                "rope turns pairs of channels by row and by column; correct one of them"
            )
        if len(set(self.deepstack)) < len(self.deepstack):
            raise UserError(f"deepstack_visual_indexes {list(self.deepstack)} names a block twice; name each once")

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.d_model // self.num_heads

    @property
    def merged(self) -> int:
        """Patches that form one feature."""
        return self.merge_size**2

    @property
    def patch_values(self) -> int:
        """Values of one flattened patch, (channel, frame, row, column)."""
        return self.num_channels * self.temporal_patch_size * self.patch_size**2


def config_from_hf(hf: ConfigReader) -> VisionConfig:
    """The `vision_config` of a `config.json`."""
    rotary = hf.section("rope_parameters")
    rotary.only("rope_type", "axial", "patches turn by row and column")
    activations = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
    return VisionConfig(
        depth=hf.integer("depth", 27),
        d_model=hf.integer("hidden_size", 1152),
        d_ff=hf.integer("intermediate_size", 4304),
        num_heads=hf.integer("num_heads", 16),
        d_out=hf.integer("out_hidden_size", 3584),
        patch_size=hf.integer("patch_size", 16),
        temporal_patch_size=hf.integer("temporal_patch_size", 2),
        merge_size=hf.integer("spatial_merge_size", 2),
        num_positions=hf.integer("num_position_embeddings", 2304),
        num_channels=hf.integer("in_channels", 3),
        deepstack=hf.integers("deepstack_visual_indexes", (8, 16, 24)),
        rope_theta=rotary.number("rope_theta", 10_000.0, 1.0),
        activation=hf.choice("hidden_act", activations, "gelu_pytorch_tanh"),
        init_std=hf.number("initializer_range", 0.02),
    )


def specs(cfg: VisionConfig) -> Tree:
    """The parameters of the tower."""
    return {
        "patch_embed": patch_embed_specs(cfg),
        "positions": position_specs(cfg),
        "layers": [block_specs(cfg) for _ in range(cfg.depth)],
        "merger": merger_specs(cfg, norm_merged=False),
        "deepstack": [merger_specs(cfg, norm_merged=True) for _ in cfg.deepstack],
    }


def encode(params: Tree, tower: Tower, cfg: VisionConfig, ops: Ops) -> tuple[Tensor, list[Tensor]]:
    """`(features_ND, taps)`: merged features of all images and frames, and those tapped behind earlier blocks."""
    x_PD = patch_embed(params["patch_embed"], tower.inputs_UF, ops)
    x_PD = x_PD + position_embed(params["positions"], tower.coords_P4, cfg, ops).to(x_PD.dtype)
    cos_PR, sin_PR = rope.axial(tower.coords_P4, cfg.head_dim // 2, cfg.rope_theta)
    block = partial(vision_block, cfg=cfg, ops=ops)
    taps = {
        i: partial(tap, merger, cfg=cfg, ops=ops) for i, merger in zip(cfg.deepstack, params["deepstack"], strict=True)
    }
    xs = (cos_PR, sin_PR, tower.segments[0])
    x_PD, _, features = ops.stack(ops.layer, block, params["layers"], x_PD, *xs, name="vision", between=taps)
    return merge(params["merger"], x_PD, cfg, ops, norm_merged=False), [features[i] for i in sorted(features)]


def tap(params: Tree, x_PD: Tensor, *, cfg: VisionConfig, ops: Ops) -> tuple[Tensor, Tensor]:
    """`(x_PD, features_ND)`: what a merger makes of the patches behind a block, which go on as they are."""
    return x_PD, merge(params, x_PD, cfg, ops, norm_merged=True)


def row_ids(tower: Tower, cfg: VisionConfig, prefix: str) -> list[tuple[str, Tensor]]:
    """Which rows the parameters of the tower, under the path `prefix`, compute with (see `mmfn.lora.with_drops`).

    A merged feature goes by the id of its first patch.
    """
    ids_N = tower.ids_P[:: cfg.merged]
    return [(f"{prefix}merger/", ids_N), (f"{prefix}deepstack/", ids_N), (prefix, tower.ids_P)]


def patch_embed_specs(cfg: VisionConfig) -> Tree:
    """The convolution of non-overlapping patches as a matmul: weight [D, F]."""
    return linear.specs(cfg.d_model, cfg.patch_values, "vision_embed tower_inputs", std=cfg.init_std, bias=True)


def patch_embed(params: Tree, patches_PF: Tensor, ops: Ops) -> Tensor:
    """Patches in the weight's dtype times the weight."""
    params = ops.gather(params)
    return linear.apply(params, patches_PF.to(params["weight"].dtype), ops)


def position_specs(cfg: VisionConfig) -> Tree:
    """A square table of positions, flattened."""
    return {"weight": spec((cfg.num_positions, cfg.d_model), "positions vision_embed", normal(cfg.init_std))}


def position_embed(params: Tree, coords_P4: Tensor, cfg: VisionConfig, ops: Ops) -> Tensor:
    """Position of every patch, interpolated bilinearly from the table stretched over its grid, corners aligned.

    `coords_P4`: int32, (row, column, height, width) in patches. Result in the wider of float32 and the table's dtype.
    Source: `get_vision_interpolation_indices_and_weights` in transformers 5.23.
    """
    params = ops.gather(params)
    side = isqrt(cfg.num_positions)
    index_P2, size_P2 = coords_P4[:, :2].float(), coords_P4[:, 2:].float()
    source_P2 = index_P2 * (side - 1) / (size_P2 - 1).clamp(min=1)
    low_P2 = source_P2.floor()
    high_part_P2 = source_P2 - low_P2
    taps_P22 = torch.stack([low_P2, low_P2 + 1], dim=2).long().clamp(max=side - 1)
    parts_P22 = torch.stack([1 - high_part_P2, high_part_P2], dim=2)
    taps_P4 = (taps_P22[:, 0, :, None] * side + taps_P22[:, 1, None, :]).flatten(1)
    parts_P4 = (parts_P22[:, 0, :, None] * parts_P22[:, 1, None, :]).flatten(1)
    return (embedding(taps_P4, params["weight"]) * parts_P4[..., None]).sum(1)


def block_specs(cfg: VisionConfig) -> Tree:
    """Parameters of one block; queries, keys and values are one fused projection."""
    D, F, std = cfg.d_model, cfg.d_ff, cfg.init_std
    return {
        "attention": {
            "qkv": linear.specs(3 * D, D, "vision_heads vision_embed", std=std, bias=True, parts=3),
            "o": linear.specs(D, D, "vision_embed vision_heads", std=std, bias=True),
        },
        "attention_norm": norm.layer_specs(D, "vision_embed"),
        "mlp": {
            "up": linear.specs(F, D, "vision_mlp vision_embed", std=std, bias=True),
            "down": linear.specs(D, F, "vision_embed vision_mlp", std=std, bias=True),
        },
        "mlp_norm": norm.layer_specs(D, "vision_embed"),
    }


def vision_block(
    params: Tree, x_PD: Tensor, cos_PR: Tensor, sin_PR: Tensor, segments: Segments, *, cfg: VisionConfig, ops: Ops
) -> tuple[Tensor, None]:
    """One pre-norm block; a patch attends to its whole frame. Rotation in float32 (or wider)."""
    params = ops.gather(params)
    normed_PD = norm.layer(params["attention_norm"], x_PD, NORM_EPS, ops)
    qkv_P3HC = linear.apply(params["attention"]["qkv"], normed_PD, ops).view(-1, 3, cfg.num_heads, cfg.head_dim)
    q_PHC, k_PHC, v_PHC = qkv_P3HC.unbind(1)
    q_PHC, k_PHC = ops.rotary(q_PHC, cos_PR, sin_PR), ops.rotary(k_PHC, cos_PR, sin_PR)
    out_PHC = ops.attention(q_PHC, k_PHC, v_PHC, segments, is_causal=False)
    x_PD = x_PD + linear.apply(params["attention"]["o"], out_PHC.flatten(1), ops)
    activation = {"gelu_tanh": ops.gelu_tanh, "gelu": ops.gelu}[cfg.activation]
    hidden_PF = activation(linear.apply(params["mlp"]["up"], norm.layer(params["mlp_norm"], x_PD, NORM_EPS, ops), ops))
    return x_PD + linear.apply(params["mlp"]["down"], hidden_PF, ops), None


def merger_specs(cfg: VisionConfig, *, norm_merged: bool) -> Tree:
    """Parameters of a patch merger; its norm sees single patches or, with `norm_merged`, concatenated ones."""
    D, merged, std = cfg.d_model, cfg.d_model * cfg.merged, cfg.init_std
    return {
        "norm": norm.layer_specs(*((merged, "merged") if norm_merged else (D, "vision_embed"))),
        "up": linear.specs(merged, merged, "vision_mlp merged", std=std, bias=True),
        "down": linear.specs(cfg.d_out, merged, "embed vision_mlp", std=std, bias=True),
    }


def merge(params: Tree, x_PD: Tensor, cfg: VisionConfig, ops: Ops, *, norm_merged: bool) -> Tensor:
    """`features_ND`, N = P / merge_size**2: consecutive patches concatenated, then two layers to the text's width."""
    params = ops.gather(params)
    merged = (x_PD.shape[0] // cfg.merged, cfg.merged * cfg.d_model)
    if norm_merged:
        x = norm.layer(params["norm"], x_PD.reshape(merged), NORM_EPS, ops)
    else:
        x = norm.layer(params["norm"], x_PD, NORM_EPS, ops).reshape(merged)
    return linear.apply(params["down"], ops.gelu(linear.apply(params["up"], x, ops)), ops)


_TOWER = "model.visual"
NAMES = (
    ("vision/patch_embed/weight", f"{_TOWER}.patch_embed.proj.weight"),
    ("vision/patch_embed/bias", f"{_TOWER}.patch_embed.proj.bias"),
    ("vision/positions/weight", f"{_TOWER}.pos_embed.weight"),
    ("vision/layers/{i}/attention_norm/{leaf}", f"{_TOWER}.blocks.{{i}}.norm1.{{leaf}}"),
    ("vision/layers/{i}/attention/qkv/{leaf}", f"{_TOWER}.blocks.{{i}}.attn.qkv.{{leaf}}"),
    ("vision/layers/{i}/attention/o/{leaf}", f"{_TOWER}.blocks.{{i}}.attn.proj.{{leaf}}"),
    ("vision/layers/{i}/mlp_norm/{leaf}", f"{_TOWER}.blocks.{{i}}.norm2.{{leaf}}"),
    ("vision/layers/{i}/mlp/up/{leaf}", f"{_TOWER}.blocks.{{i}}.mlp.linear_fc1.{{leaf}}"),
    ("vision/layers/{i}/mlp/down/{leaf}", f"{_TOWER}.blocks.{{i}}.mlp.linear_fc2.{{leaf}}"),
    ("vision/merger/norm/{leaf}", f"{_TOWER}.merger.norm.{{leaf}}"),
    ("vision/merger/up/{leaf}", f"{_TOWER}.merger.linear_fc1.{{leaf}}"),
    ("vision/merger/down/{leaf}", f"{_TOWER}.merger.linear_fc2.{{leaf}}"),
    ("vision/deepstack/{i}/norm/{leaf}", f"{_TOWER}.deepstack_merger_list.{{i}}.norm.{{leaf}}"),
    ("vision/deepstack/{i}/up/{leaf}", f"{_TOWER}.deepstack_merger_list.{{i}}.linear_fc1.{{leaf}}"),
    ("vision/deepstack/{i}/down/{leaf}", f"{_TOWER}.deepstack_merger_list.{{i}}.linear_fc2.{{leaf}}"),
)
