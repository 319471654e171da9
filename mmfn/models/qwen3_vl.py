"""Qwen3-VL, dense. Source: `modeling_qwen3_vl.py` in transformers 5.23.

Images pass a vision tower; its features replace the embeddings of their placeholder tokens, and features tapped on the
way (deepstack) are added behind the first text blocks. Legend: T tokens, D width, P patches, N features, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from mmfn.batch import Batch, Sample, Visual
from mmfn.interop.hf_config import Section
from mmfn.interop.keymap import Entry, KeyMap
from mmfn.models import Output
from mmfn.models.layers import cache as layer_cache
from mmfn.models.layers import decoder, linear, norm, rope, vision
from mmfn.models.layers import positions as layer_positions
from mmfn.models.layers.cache import Cache
from mmfn.models.layers.decoder import DecoderConfig
from mmfn.models.layers.vision import VisionConfig
from mmfn.ops import Ops
from mmfn.spec import normal, spec
from mmfn.tree import Tree


@dataclass(frozen=True, kw_only=True)
class Config:
    """A Qwen3-VL model. `rope_sections`: rotated pairs that follow time, height and width.

    `pad_token_id`: the embedding row that gets no gradient as an input (None: every row does), as in transformers.
    """

    vocab_size: int
    num_layers: int
    decoder: DecoderConfig
    vision: VisionConfig
    rope_theta: float
    rope_sections: tuple[int, ...]
    is_tied: bool
    image_token_id: int
    video_token_id: int
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if len(self.rope_sections) != 3 or 2 * sum(self.rope_sections) != self.decoder.head_dim:
            raise ValueError(
                f"mrope_section is {list(self.rope_sections)} but must be three numbers that add up to half of "
                f"head_dim {self.decoder.head_dim}; correct the model's config.json"
            )
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError(
                f"text_config.pad_token_id is {self.pad_token_id} but must be below vocab_size {self.vocab_size}; "
                "correct the model's config.json"
            )
        if self.vision.d_out != self.decoder.d_model:
            raise ValueError(
                f"vision_config.out_hidden_size is {self.vision.d_out} but must equal text_config.hidden_size "
                f"{self.decoder.d_model}: features replace token embeddings; correct the model's config.json"
            )


def config_from_hf(hf: Mapping[str, Any]) -> Config:
    """The dict of a `config.json`; absent keys take the defaults of transformers 5.23.

    Both spellings of rope are read: `rope_parameters`, and the older `rope_scaling` beside `rope_theta`. Raises
    ValueError for values out of range and for settings mmfn does not implement (rope scaling, dropout, quantization).
    """
    outer = Section(hf)
    outer.only("quantization_config", None, "quantized weights are not supported")
    text = outer.section("text_config")
    text.only("hidden_act", "silu", "the feed-forward layer is SwiGLU")
    text.only("attention_dropout", 0.0, "there is no dropout")
    rotary = text.section("rope_parameters", "rope_scaling")
    rotary.only("rope_type", "default", "scaled rope is not supported")
    rotary.only("type", rotary.get("rope_type", "default"), "scaled rope is not supported")
    rotary.only("mrope_interleaved", True, "this family interleaves its rope sections")
    rotary.only("partial_rotary_factor", 1.0, "this family rotates whole heads")
    num_heads, d_model = text.integer("num_attention_heads", 32), text.integer("hidden_size", 4096)
    return Config(
        vocab_size=text.integer("vocab_size", 151_936),
        num_layers=text.integer("num_hidden_layers", 32),
        decoder=DecoderConfig(
            d_model=d_model,
            d_ff=text.integer("intermediate_size", 22_016),
            num_heads=num_heads,
            num_kv_heads=text.integer("num_key_value_heads", num_heads if "num_key_value_heads" in text.values else 32),
            head_dim=text.integer("head_dim", d_model // num_heads if "head_dim" in text.values else 128),
            norm_eps=text.number("rms_norm_eps", 1e-6),
            init_std=text.number("initializer_range", 0.02),
            has_bias=text.boolean("attention_bias", False),
        ),
        vision=_vision_from_hf(outer.section("vision_config")),
        rope_theta=rotary.number("rope_theta", text.number("rope_theta", 500_000.0, 1.0), 1.0),
        rope_sections=rotary.integers("mrope_section", (24, 20, 20)),
        is_tied=outer.boolean("tie_word_embeddings", False),
        image_token_id=outer.integer("image_token_id", 151_655, 0),
        video_token_id=outer.integer("video_token_id", 151_656, 0),
        pad_token_id=None if text.get("pad_token_id") is None else text.integer("pad_token_id", minimum=0),
    )


def _vision_from_hf(hf: Section) -> VisionConfig:
    rotary = hf.section("rope_parameters")
    rotary.only("rope_type", "axial", "patches turn by row and column")
    activations = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
    activation = hf.get("hidden_act", "gelu_pytorch_tanh")
    if activation not in activations:
        raise ValueError(f"vision_config.hidden_act is {activation!r} but must be one of {sorted(activations)}")
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
        activation=activations[activation],
        init_std=hf.number("initializer_range", 0.02),
    )


def specs(cfg: Config) -> Tree:
    """The parameters; without a `head` when it is tied to the embedding."""
    D, V, std = cfg.decoder.d_model, cfg.vocab_size, cfg.decoder.init_std
    tree = {
        "text": {
            "embed": {"weight": spec((V, D), "vocab embed", normal(std))},
            "layers": [decoder.specs(cfg.decoder) for _ in range(cfg.num_layers)],
            "norm": norm.rms_specs(D, "embed"),
        },
        "vision": {
            "patch_embed": vision.patch_embed_specs(cfg.vision),
            "positions": vision.position_specs(cfg.vision),
            "layers": [vision.block_specs(cfg.vision) for _ in range(cfg.vision.depth)],
            "merger": vision.merger_specs(cfg.vision, norm_merged=False),
            "deepstack": [vision.merger_specs(cfg.vision, norm_merged=True) for _ in cfg.vision.deepstack],
        },
    }
    if not cfg.is_tied:
        tree["head"] = linear.specs(V, D, "vocab embed", std=std)
    return tree


def apply(params: Tree, batch: Batch, cfg: Config, ops: Ops, cache: Cache | None = None) -> Output:
    """`Output(hidden_TD)`: the last hidden states, normalised, before the head.

    With a `cache`, keys and values of the tokens are written to it and `Output.cache` is the new one; a decode step
    (one token per row, `cache.slots.is_prefill` false) has no visual input and skips the tower.
    """
    table = ops.gather(params["text"]["embed"])["weight"]
    x_TD = embedding(batch.tokens_T, table, padding_idx=cfg.pad_token_id)
    deepstack: list[Tensor] = []
    if cache is None or cache.slots.is_prefill:
        features_ND, deepstack = encode(params["vision"], batch.visual, cfg.vision, ops)
        placed_TD = ops.place_features(features_ND.to(x_TD.dtype), batch.feature_index_T)
        is_visual_T = batch.feature_index_T < batch.visual.patches_PF.shape[0] // cfg.vision.merged
        x_TD = torch.where(is_visual_T[:, None], placed_TD, x_TD)

    def add_deepstack(i: int, x_TD: Tensor) -> Tensor:
        if i >= len(deepstack):
            return x_TD
        return x_TD + ops.place_features(deepstack[i].to(x_TD.dtype), batch.feature_index_T)

    cos_TR, sin_TR = rope.interleaved(batch.positions_3T, cfg.rope_sections, cfg.rope_theta)
    xs = (cos_TR.to(x_TD.dtype), sin_TR.to(x_TD.dtype), batch.segments)
    block = partial(decoder.decoder_block, cfg=cfg.decoder, ops=ops)
    layers = params["text"]["layers"]
    if cache is None:
        x_TD, _ = ops.stack(ops.layer, block, layers, x_TD, *xs, between=add_deepstack)
    else:
        x_TD, written = ops.stack(
            ops.layer, block, layers, x_TD, *xs, cache.slots, each=cache.layers, between=add_deepstack
        )
        cache = Cache(layers=written, slots=cache.slots)
    x_TD = norm.rms(ops.gather(params["text"]["norm"]), x_TD, cfg.decoder.norm_eps, ops)
    return Output(hidden_TD=x_TD, cache=cache)


def encode(params: Tree, visual: Visual, cfg: VisionConfig, ops: Ops) -> tuple[Tensor, list[Tensor]]:
    """`(features_ND, deepstack)`: merged features of all images and frames, and those tapped behind earlier blocks."""
    x_PD = vision.patch_embed(params["patch_embed"], visual.patches_PF, ops)
    x_PD = x_PD + vision.position_embed(params["positions"], visual.coords_P4, cfg, ops).to(x_PD.dtype)
    deepstack: list[Tensor] = []

    def tap(i: int, x_PD: Tensor) -> Tensor:
        if i in cfg.deepstack:
            merger = params["deepstack"][cfg.deepstack.index(i)]
            deepstack.append(vision.merge(merger, x_PD, cfg, ops, norm_merged=True))
        return x_PD

    cos_PR, sin_PR = rope.axial(visual.coords_P4, cfg.head_dim // 2, cfg.rope_theta)
    block = partial(vision.vision_block, cfg=cfg, ops=ops)
    x_PD, _ = ops.stack(ops.layer, block, params["layers"], x_PD, cos_PR, sin_PR, visual.segments, between=tap)
    return vision.merge(params["merger"], x_PD, cfg, ops, norm_merged=False), deepstack


def head(params: Tree, cfg: Config, ops: Ops) -> Tensor:
    """`weight_VD` of the language-model head."""
    weight_VD: Tensor = ops.gather(params["text"]["embed"] if cfg.is_tied else params["head"])["weight"]
    return weight_VD


def empty_cache(cfg: Config, num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device) -> list[Tree]:
    """An empty key-value cache per text layer; `num_columns` counts the spare one (see `layers.cache`)."""
    shape = (num_rows, num_columns, cfg.decoder.num_kv_heads, cfg.decoder.head_dim)
    return layer_cache.empty(cfg.num_layers, shape, dtype, device)


def positions(sample: Sample, cfg: Config) -> Tensor:
    """int64[3, T]: see `layers.positions.mrope`."""
    return layer_positions.mrope(sample, cfg.vision.merge_size)


def key_map(cfg: Config) -> KeyMap:
    """Hugging Face names of the leaves; the patch embedding is a convolution kernel there."""
    kernel = (cfg.vision.num_channels, cfg.vision.temporal_patch_size, cfg.vision.patch_size, cfg.vision.patch_size)
    shapes = {"vision/patch_embed/weight": (cfg.vision.d_model, *kernel)}
    entries = tuple(Entry(path=p, name=n, disk_shape=shapes.get(p)) for p, n in _NAMES)
    copies = {"lm_head.weight": "text/embed/weight"} if cfg.is_tied else {}
    return KeyMap(entries=entries, architecture="Qwen3VLForConditionalGeneration", copies=copies)


_TEXT, _VISION = "model.language_model", "model.visual"
_NAMES = (
    ("head/weight", "lm_head.weight"),
    ("text/embed/weight", f"{_TEXT}.embed_tokens.weight"),
    ("text/norm/weight", f"{_TEXT}.norm.weight"),
    ("text/layers/{i}/attention_norm/weight", f"{_TEXT}.layers.{{i}}.input_layernorm.weight"),
    ("text/layers/{i}/attention/q_norm/weight", f"{_TEXT}.layers.{{i}}.self_attn.q_norm.weight"),
    ("text/layers/{i}/attention/k_norm/weight", f"{_TEXT}.layers.{{i}}.self_attn.k_norm.weight"),
    ("text/layers/{i}/attention/{proj}/{leaf}", f"{_TEXT}.layers.{{i}}.self_attn.{{proj}}_proj.{{leaf}}"),
    ("text/layers/{i}/mlp_norm/weight", f"{_TEXT}.layers.{{i}}.post_attention_layernorm.weight"),
    ("text/layers/{i}/mlp/{proj}/{leaf}", f"{_TEXT}.layers.{{i}}.mlp.{{proj}}_proj.{{leaf}}"),
    ("vision/patch_embed/weight", f"{_VISION}.patch_embed.proj.weight"),
    ("vision/patch_embed/bias", f"{_VISION}.patch_embed.proj.bias"),
    ("vision/positions/weight", f"{_VISION}.pos_embed.weight"),
    ("vision/layers/{i}/attention_norm/{leaf}", f"{_VISION}.blocks.{{i}}.norm1.{{leaf}}"),
    ("vision/layers/{i}/attention/qkv/{leaf}", f"{_VISION}.blocks.{{i}}.attn.qkv.{{leaf}}"),
    ("vision/layers/{i}/attention/o/{leaf}", f"{_VISION}.blocks.{{i}}.attn.proj.{{leaf}}"),
    ("vision/layers/{i}/mlp_norm/{leaf}", f"{_VISION}.blocks.{{i}}.norm2.{{leaf}}"),
    ("vision/layers/{i}/mlp/up/{leaf}", f"{_VISION}.blocks.{{i}}.mlp.linear_fc1.{{leaf}}"),
    ("vision/layers/{i}/mlp/down/{leaf}", f"{_VISION}.blocks.{{i}}.mlp.linear_fc2.{{leaf}}"),
    ("vision/merger/norm/{leaf}", f"{_VISION}.merger.norm.{{leaf}}"),
    ("vision/merger/up/{leaf}", f"{_VISION}.merger.linear_fc1.{{leaf}}"),
    ("vision/merger/down/{leaf}", f"{_VISION}.merger.linear_fc2.{{leaf}}"),
    ("vision/deepstack/{i}/norm/{leaf}", f"{_VISION}.deepstack_merger_list.{{i}}.norm.{{leaf}}"),
    ("vision/deepstack/{i}/up/{leaf}", f"{_VISION}.deepstack_merger_list.{{i}}.linear_fc1.{{leaf}}"),
    ("vision/deepstack/{i}/down/{leaf}", f"{_VISION}.deepstack_merger_list.{{i}}.linear_fc2.{{leaf}}"),
)
