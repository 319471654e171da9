"""What families of a text decoder that sees through a vision tower share.

Features of the tower replace the embeddings of their placeholder tokens, and features tapped on the way (deepstack) are
added behind the first text blocks. A family brings the blocks: their parameters, and the function that runs one.

Legend: T tokens, D width, N features, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from mmfn.batch import Batch, Sample
from mmfn.lora import with_drops
from mmfn.models import Output
from mmfn.models.hf_config import Section
from mmfn.models.keymap import Entry
from mmfn.models.layers import cache as layer_cache
from mmfn.models.layers import decoder, linear, moe, norm, rope, vision
from mmfn.models.layers import positions as layer_positions
from mmfn.models.layers.cache import Cache
from mmfn.models.layers.decoder import DecoderConfig
from mmfn.models.layers.vision import VisionConfig
from mmfn.ops import Block, Ops
from mmfn.spec import normal, spec
from mmfn.tree import Tree


@dataclass(frozen=True, kw_only=True)
class VisionLanguageConfig:
    """The fields all such families have. `rope_sections`: rotated pairs that follow time, height and width.

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


def text_section(hf: Mapping[str, Any], defaults: Mapping[str, Any]) -> Section:
    """The `text_config` of a `config.json` with a family's defaults for absent keys (a null stays null)."""
    text = Section(hf).section("text_config")
    return Section({**defaults, **text.values}, text.name)


def fields_from_hf(hf: Mapping[str, Any], text: Section) -> dict[str, Any]:
    """The fields of `VisionLanguageConfig`. `text`: what `text_section` returns.

    Both spellings of rope are read: `rope_parameters`, and the older `rope_scaling` beside `rope_theta`. Raises
    ValueError for values out of range and for settings mmfn does not implement (rope scaling, dropout, quantization).
    """
    outer = Section(hf)
    outer.only("quantization_config", None, "quantized weights are not supported")
    rotary = text.section("rope_parameters", "rope_scaling")
    rotary.only("rope_type", "default", "scaled rope is not supported")
    rotary.only("type", rotary.get("rope_type", "default"), "scaled rope is not supported")
    rotary.only("mrope_interleaved", True, "this family interleaves its rope sections")
    rotary.only("partial_rotary_factor", 1.0, "this family rotates whole heads")
    return {
        "vocab_size": text.integer("vocab_size", 151_936),
        "num_layers": text.integer("num_hidden_layers"),
        "decoder": decoder.config_from_hf(text),
        "vision": vision.config_from_hf(outer.section("vision_config")),
        "rope_theta": rotary.number("rope_theta", text.number("rope_theta", 500_000.0, 1.0), 1.0),
        "rope_sections": rotary.integers("mrope_section", (24, 20, 20)),
        "is_tied": outer.boolean("tie_word_embeddings", False),
        "image_token_id": outer.integer("image_token_id", 151_655, 0),
        "video_token_id": outer.integer("video_token_id", 151_656, 0),
        "pad_token_id": None if text.get("pad_token_id") is None else text.integer("pad_token_id", minimum=0),
    }


def specs(cfg: VisionLanguageConfig, layers: Sequence[Tree]) -> Tree:
    """The parameters around the specs of the text blocks; without a `head` when it is tied to the embedding."""
    D, V, std = cfg.decoder.d_model, cfg.vocab_size, cfg.decoder.init_std
    tree = {
        "text": {
            "embed": {"weight": spec((V, D), "vocab embed", normal(std))},
            "layers": list(layers),
            "norm": norm.rms_specs(D, "embed"),
        },
        "vision": vision.specs(cfg.vision),
    }
    if not cfg.is_tied:
        tree["head"] = linear.specs(V, D, "vocab embed", std=std)
    return tree


def apply(
    params: Tree, batch: Batch, cfg: VisionLanguageConfig, ops: Ops, block: Block, cache: Cache | None = None
) -> Output:
    """`Output(hidden_TD, aux, cache)`: the last hidden states, normalised, before the head.

    `block`: a `decoder.decoder_block` that lacks only its positional arguments. `aux`: the router statistics of all
    blocks added up, None without a router. With a `cache`, keys and values of the tokens are written to it and
    `Output.cache` is the new one; a decode step (one token per row, `cache.slots.is_prefill` false) has no visual
    input and skips the tower.
    """
    x_TD = embedding(batch.tokens_T, ops.gather(params["text"]["embed"])["weight"], padding_idx=cfg.pad_token_id)
    deepstack: list[Tensor] = []
    if cache is None or cache.slots.is_prefill:
        features_ND, deepstack = vision.encode(params["vision"], batch.visual, cfg.vision, ops, batch.salts)
        placed_TD = ops.place_features(features_ND.to(x_TD.dtype), batch.feature_index_T)
        is_visual_T = batch.feature_index_T >= 0
        x_TD = torch.where(is_visual_T[:, None], placed_TD, x_TD)

    def add(features_ND: Tensor, x_TD: Tensor) -> Tensor:
        return x_TD + ops.place_features(features_ND.to(x_TD.dtype), batch.feature_index_T)

    cos_TR, sin_TR = rope.interleaved(batch.positions_3T, cfg.rope_sections, cfg.rope_theta)
    is_real_T = batch.segment_T < batch.num_segments
    xs = (cos_TR.to(x_TD.dtype), sin_TR.to(x_TD.dtype), batch.segments, is_real_T)
    between = {i: partial(add, features_ND) for i, features_ND in enumerate(deepstack)}
    layers = with_drops(params["text"]["layers"], batch.token_ids_T, batch.salts, "text/layers")
    stack = partial(ops.stack, ops.layer, block, layers, x_TD, *xs, name="text", between=between)
    if cache is None:
        x_TD, outs = stack()
    else:
        x_TD, outs = stack(cache.slots, each=cache.layers)
        cache = Cache(layers=[out["cached"] for out in outs], slots=cache.slots)
    x_TD = norm.rms(ops.gather(params["text"]["norm"]), x_TD, cfg.decoder.norm_eps, ops)
    return Output(hidden_TD=x_TD, aux=moe.total([out["router"] for out in outs]), cache=cache)


def head(params: Tree, cfg: VisionLanguageConfig, ops: Ops) -> Tensor:
    """`weight_VD` of the language-model head, or those of its rows that `ops.linear_cross_entropy` takes."""
    weight_VD: Tensor = ops.gather_head(params["text"]["embed"] if cfg.is_tied else params["head"])["weight"]
    return weight_VD


def empty_cache(
    cfg: VisionLanguageConfig, num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device
) -> list[Tree]:
    """An empty key-value cache per text layer; `num_columns` counts the spare one (see `layers.cache`)."""
    shape = (num_rows, num_columns, cfg.decoder.num_kv_heads, cfg.decoder.head_dim)
    return layer_cache.empty(cfg.num_layers, shape, dtype, device)


def positions(sample: Sample, cfg: VisionLanguageConfig) -> Tensor:
    """int64[3, T]: see `layers.positions.mrope`."""
    return layer_positions.mrope(sample, cfg.vision.merge_size)


def parts(cfg: VisionLanguageConfig) -> dict[str, str]:
    """Regexes over the paths of the parts a run can freeze; a tied head is the embedding, so no part of its own."""
    found = {
        "vision_encoder": r"vision/(patch_embed|positions|layers)/.*",
        "vision_projector": r"vision/(merger|deepstack)/.*",
        "text_decoder": r"text/.*",
    }
    return found if cfg.is_tied else {**found, "lm_head": r"head/.*"}


def entries(cfg: VisionLanguageConfig) -> tuple[Entry, ...]:
    """Hugging Face names of the leaves; the patch embedding is a convolution kernel there."""
    kernel = (cfg.vision.num_channels, cfg.vision.temporal_patch_size, cfg.vision.patch_size, cfg.vision.patch_size)
    shapes = {"vision/patch_embed/weight": (cfg.vision.d_model, *kernel)}
    names = (*_NAMES, *decoder.NAMES, *vision.NAMES)
    return tuple(Entry(path=path, name=name, disk_shape=shapes.get(path)) for path, name in names)


def copies(cfg: VisionLanguageConfig) -> dict[str, str]:
    """The stored name of a head that is tied to the embedding."""
    return {"lm_head.weight": "text/embed/weight"} if cfg.is_tied else {}


_NAMES = (
    ("head/weight", "lm_head.weight"),
    ("text/embed/weight", "model.language_model.embed_tokens.weight"),
    ("text/norm/weight", "model.language_model.norm.weight"),
)
