"""GLM-4.5V. Source: `modeling_glm4v_moe.py` in transformers 5.23.

Patches pass a tower of RMS norms and SwiGLU layers that knows their places twice, by learned positions interpolated
with cubic splines and by rope; a convolution merges blocks of patches. In the text, blocks behind the first few have
experts that a sigmoid router chooses, moved by a bias that no gradient trains, beside an expert that all tokens pass.
One token stands for images and for frames of videos alike: its kind follows from the marks around it, so that one batch
may hold both (transformers 5.23 takes calls of one kind alone). Legend: T tokens, P patches, N features, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfn.batch import IMAGE, TEXT, VIDEO, Batch, Tower
from mmfn.models import Output, Rule
from mmfn.models.data import glm_vision
from mmfn.models.hf_config import ConfigReader
from mmfn.models.keymap import Entry, KeyMap
from mmfn.models.layers import balance, decoder, interpolation, linear, moe, norm, rope, text, vision
from mmfn.models.layers import vision_language as shared
from mmfn.models.layers.cache import Cache
from mmfn.models.layers.moe import MoeConfig
from mmfn.models.layers.vision import VisionConfig
from mmfn.models.layers.vision_language import VisionLanguageConfig
from mmfn.models.work import Stage
from mmfn.ops import Ops
from mmfn.ops.route import RouteConfig
from mmfn.spec import normal, spec
from mmfn.tree import Tree

DEFAULTS = {
    "vocab_size": 151_424,
    "hidden_size": 4096,
    "intermediate_size": 10_944,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}
TOWER = {
    "depth": 24,
    "hidden_size": 1536,
    "intermediate_size": 13_696,
    "num_heads": 12,
    "out_hidden_size": 4096,
    "patch_size": 14,
    "image_size": 336,
}
TOKENS = {"image_token_id": 151_363, "video_token_id": 151_364}
ROPE = shared.RopeDefaults(theta=10_000.0, sections=(8, 12, 12), is_interleaved=False, part=0.5)
TEXT_NAME, TOWER_NAME = "model.language_model", "model.visual"
MERGER_EPS = 1e-5  # fixed in the reference implementation
LOADS = "loads"  # the rule of the bias

head, parts, at_depth, empty_cache = shared.head, shared.parts, shared.at_depth, shared.empty_cache
lora_targets, row_ids, example = shared.LORA_TARGETS, shared.row_ids, shared.example
experts_per_token = shared.experts_per_token
positions, towers, lay, loss_weights = shared.positions, shared.towers, shared.lay, shared.loss_weights
data = glm_vision.SIDE


@dataclass(frozen=True, kw_only=True)
class TowerConfig(VisionConfig):
    """`d_merger`: width of the merger's SwiGLU layer."""

    d_merger: int


@dataclass(frozen=True, kw_only=True)
class Config(VisionLanguageConfig):
    """`video_start_token_id`, `video_end_token_id`: the marks around a video. `bias_rate`: how much a step moves the
    routers' bias, by the loads of experts; 0: it stays, as fine-tuning wants it."""

    vision: TowerConfig
    video_start_token_id: int
    video_end_token_id: int
    bias_rate: float


def config_from_hf(hf: Mapping[str, Any]) -> Config:
    """The dict of a `config.json`; absent keys take the defaults of transformers 5.23.

    In older files `tie_word_embeddings` lies in `text_config`. One key is of mmfn alone: `router_bias_update_rate` of
    `text_config`, 0 where absent (DeepSeek-V3, which brought the rule, used 0.001). Raises ValueError for values out of
    range and for settings mmfn does not implement.
    """
    text = shared.text_section(hf, DEFAULTS)
    is_tied = ConfigReader(hf).boolean("tie_word_embeddings", False) or text.boolean("tie_word_embeddings", False)
    hf = {**shared.with_defaults(hf, **TOKENS), "tie_word_embeddings": is_tied}
    outer, rate = ConfigReader(hf), text.number("router_bias_update_rate", 0.0)
    text.only("use_qk_norm", False, "queries and keys are not normalised in this family")
    biased = ("q", "k", "v") if text.boolean("attention_bias", True) else ()
    block = decoder.config_from_hf(text, biased=biased, has_qk_norm=False)
    fields = shared.fields_from_hf(hf, text, ROPE, block=block, tower=_tower_from_hf(outer.section("vision_config")))
    dense = text.integer("first_k_dense_replace", 1, minimum=0)
    return Config(
        **fields,
        moe=_moe_from_hf(text, block.d_model, block.init_std, LOADS if rate else ""),
        moe_layers=frozenset(range(dense, fields["num_layers"])),
        router_aux_coef=balance.weight_from_hf(text, 1e-4),
        video_start_token_id=outer.integer("video_start_token_id", 151_341, minimum=0),
        video_end_token_id=outer.integer("video_end_token_id", 151_342, minimum=0),
        bias_rate=rate,
    )


def _tower_from_hf(hf: ConfigReader) -> TowerConfig:
    hf = hf.with_defaults(TOWER)
    hf.only("hidden_act", "silu", "the feed-forward layers of the tower are SwiGLU")
    hf.only("attention_bias", False, "the projections of the tower have no biases")
    hf.only("attention_dropout", 0.0, "there is no dropout")
    fields = vision.fields_from_hf(hf)
    return TowerConfig(
        **fields,
        d_ff=fields["d_out"],  # and not intermediate_size, which is the merger's
        d_merger=hf.integer("intermediate_size"),
        num_positions=(hf.integer("image_size", minimum=fields["patch_size"]) // fields["patch_size"]) ** 2,
        activation="swiglu",
        norm_eps=hf.number("rms_norm_eps", 1e-5),
        is_rms=True,
        has_block_biases=False,
    )


def _moe_from_hf(text: ConfigReader, d_model: int, init_std: float, bias_rule: str) -> MoeConfig:
    """The load-balancing loss is that of the library, which judges the logits as if a softmax router chose by them."""
    width, num_chosen = text.integer("moe_intermediate_size", 1408), text.integer("num_experts_per_tok", 8)
    return MoeConfig(
        d_model=d_model,
        d_ff=width,
        num_experts=text.integer("n_routed_experts", text.integer("num_local_experts", 128)),  # the hub's, 5.23's name
        init_std=init_std,
        num_chosen=num_chosen,
        scores="sigmoid",
        num_groups=text.integer("n_group", 1),
        num_chosen_groups=text.integer("topk_group", 1),
        is_normed=text.boolean("norm_topk_prob", True),
        scale=text.number("routed_scaling_factor", 1.0),
        d_shared=width * text.integer("n_shared_experts", 1, minimum=0),
        is_wide=True,
        bias_rule=bias_rule,
        judged=RouteConfig(num_chosen=num_chosen),
    )


def specs(cfg: Config) -> Tree:
    """The parameters."""
    return shared.specs(cfg, shared.blocks(cfg), vision=_tower_specs(cfg.vision))


def _tower_specs(cfg: TowerConfig) -> Tree:
    D, F, std = cfg.d_out, cfg.d_merger, cfg.init_std
    downsample = linear.specs(D, cfg.d_model, "embed vision_embed", std=std, bias=True)
    downsample["weight"] = spec((D, cfg.merged, cfg.d_model), "embed merged vision_embed", normal(std))
    return {
        "patch_embed": vision.patch_embed_specs(cfg),
        "patch_norm": vision.norm_specs(cfg),
        "positions": vision.position_specs(cfg),
        "layers": [vision.block_specs(cfg) for _ in range(cfg.depth)],
        "norm": vision.norm_specs(cfg),
        "merger": {
            "downsample": downsample,
            "proj": linear.specs(D, D, "vision_mlp embed", std=std),
            "norm": norm.layer_specs(D, "embed"),
            **decoder.mlp_specs(D, F, std),
        },
    }


def apply(params: Tree, batch: Batch, cfg: Config, ops: Ops, cache: Cache | None = None) -> Output:
    """The last hidden states, normalised, before the head; `cache` as in `qwen3_vl.apply`."""
    x_TD = text.embed(params["text"]["embed"], batch.tokens_T, ops, pad_token_id=cfg.pad_token_id)
    if cache is None or cache.slots.is_prefill:
        tower = batch.towers["vision"]
        features_ND = encode(params["vision"], tower, cfg.vision, ops)
        x_TD = text.replace_by_features(x_TD, features_ND, tower.index_T, ops)
    angles = rope.chunked(batch.positions_3T, cfg.rope_sections, cfg.rope_theta)
    x_TD, routers, cache = text.decode(
        params["text"]["layers"],
        x_TD,
        angles,
        batch,
        cfg.decoder,
        ops,
        mixer=partial(decoder.attend, cfg=cfg.decoder, ops=ops),
        feed_forward=partial(moe.mixed, cfg=cfg.moe, ops=ops),
        cache=cache,
    )
    return Output(
        hidden_TD=norm.rms(ops.gather(params["text"]["norm"]), x_TD, cfg.decoder.norm_eps, ops),
        losses=balance.router_losses(routers, ops),
        stats=balance.router_stats(routers),
        counts=balance.router_counts(routers) if cfg.bias_rate else {},
        cache=cache,
    )


def encode(params: Tree, tower: Tower, cfg: TowerConfig, ops: Ops) -> Tensor:
    """`features_ND`: merged features of all images and frames."""
    x_PD = vision.patch_embed(params["patch_embed"], tower.inputs_UF, ops)
    x_PD = norm.rms(ops.gather(params["patch_norm"]), x_PD, cfg.norm_eps, ops)
    position_PD = vision.position_embed(params["positions"], tower.coords_P4, ops, taps=interpolation.bicubic)
    frames = [tower.segments[0]] * cfg.depth
    x_PD = x_PD + position_PD.to(x_PD.dtype)
    x_PD, _ = vision.run_blocks(params["layers"], x_PD, tower.coords_P4, frames, cfg, ops)
    return merge(params["merger"], norm.rms(ops.gather(params["norm"]), x_PD, cfg.norm_eps, ops), cfg, ops)


def merge(params: Tree, x_PD: Tensor, cfg: TowerConfig, ops: Ops) -> Tensor:
    """`features_ND`: a convolution of blocks of patches, which lie one behind the other, then two layers."""
    params = ops.gather(params)
    kernel = {**params["downsample"], "weight": params["downsample"]["weight"].flatten(1)}
    x_ND = linear.apply(kernel, x_PD.reshape(-1, cfg.merged * cfg.d_model), ops)
    x_ND = norm.layer(params["norm"], linear.apply(params["proj"], x_ND, ops), MERGER_EPS, ops)
    return decoder.mlp(params, ops.gelu(x_ND), ops)


def flow(cfg: Config) -> dict[str, list[Stage]]:
    """The stages of the tower and of the text."""
    merger = (("downsample",), ("proj",), ("norm",), ("gate", "up"), ("down",))
    return {"vision": vision.flow(cfg.vision, merger=merger), "text": shared.text_flow(cfg)}


def kinds(tokens_T: Tensor, cfg: Config) -> Tensor:
    """int64[T]: of the placeholders those behind more starts than ends of videos are frames, the others images."""
    starts_T, ends_T = tokens_T == cfg.video_start_token_id, tokens_T == cfg.video_end_token_id
    is_in_video_T = starts_T.cumsum(0) > ends_T.cumsum(0)
    return torch.where(tokens_T == cfg.image_token_id, torch.where(is_in_video_T, VIDEO, IMAGE), TEXT)


def taps(cfg: Config) -> int:
    """The first text blocks that are dense."""
    return min(cfg.moe_layers, default=cfg.num_layers)


def rules(cfg: Config) -> dict[str, Rule]:
    """That of the routers' bias, where a step moves it."""
    return {LOADS: balance.bias_changes(cfg.bias_rate)} if cfg.bias_rate else {}


def key_map(cfg: Config) -> KeyMap:
    """Hugging Face names of the leaves. The hub stores experts one by one, transformers holds them stacked.

    What is stored of the layer behind the last, which predicts further tokens in some checkpoints, is passed through:
    its `eh_proj` tells it from a plain block, of which the config knows nothing.
    """
    ahead = rf"model\.(language_model\.)?layers\.{cfg.num_layers}\."
    own, layer = "text/layers/{i}/moe", f"{TEXT_NAME}.layers.{{i}}.mlp"
    pairs = {
        f"{own}/router/weight": f"{layer}.gate.weight",
        f"{own}/router/choice_bias": f"{layer}.gate.e_score_correction_bias",
        f"{own}/shared/{{proj}}/weight": f"{layer}.shared_experts.{{proj}}_proj.weight",
    }
    return KeyMap(
        entries=(
            *(Entry(path=path, name=name) for path, name in pairs.items()),
            *shared.text_entries(TEXT_NAME),
            *_tower_entries(cfg.vision),
        ),
        architecture="Glm4vMoeForConditionalGeneration",
        layouts={"hub": moe.numbered_entries(own, layer), "transformers": moe.fused_entries(own, layer)},
        copies=shared.copies(cfg),
        verbatim=(f"{ahead}.*",),
        signs={f"{ahead}.*": f"{ahead}eh_proj.*"},
    )


def _tower_entries(cfg: TowerConfig) -> tuple[Entry, ...]:
    kernel = (cfg.d_out, cfg.d_model, cfg.merge_size, cfg.merge_size)
    convolution = Entry(
        path="vision/merger/downsample/weight",
        name=f"{TOWER_NAME}.downsample.weight",
        dims=(0, 2, 1),
        disk_shape=kernel,
    )
    pairs = {
        "patch_embed": "patch_embed.proj",
        "patch_norm": "post_conv_layernorm",
        "positions": "embeddings.position_embedding",
        "layers/{i}/attention_norm": "blocks.{i}.norm1",
        "layers/{i}/attention/qkv": "blocks.{i}.attn.qkv",
        "layers/{i}/attention/o": "blocks.{i}.attn.proj",
        "layers/{i}/mlp_norm": "blocks.{i}.norm2",
        "layers/{i}/mlp/{proj}": "blocks.{i}.mlp.{proj}_proj",
        "norm": "post_layernorm",
        "merger/downsample": "downsample",
        "merger/proj": "merger.proj",
        "merger/norm": "merger.post_projection_norm",
        "merger/{proj}": "merger.{proj}_proj",
    }
    others = (Entry(path=f"vision/{o}/{{leaf}}", name=f"{TOWER_NAME}.{t}.{{leaf}}") for o, t in pairs.items())
    return (shared.patch_entry(cfg, TOWER_NAME), convolution, *others)
