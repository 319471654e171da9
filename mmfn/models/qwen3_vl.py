"""Qwen3-VL, dense. Source: `modeling_qwen3_vl.py` in transformers 5.23.

Images pass a vision tower; its features replace the embeddings of their placeholder tokens, and features tapped on the
way (deepstack) are added behind the first text blocks (`layers.vision_language`). The blocks are dense.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from mmfn.batch import Batch
from mmfn.models import Output
from mmfn.models.keymap import KeyMap
from mmfn.models.layers import decoder, vision_language
from mmfn.models.layers.cache import Cache
from mmfn.models.layers.vision_language import VisionLanguageConfig
from mmfn.ops import Ops
from mmfn.tree import Tree

DEFAULTS = {
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
}

head, positions, empty_cache = vision_language.head, vision_language.positions, vision_language.empty_cache
parts = vision_language.parts


@dataclass(frozen=True, kw_only=True)
class Config(VisionLanguageConfig):
    """A Qwen3-VL model."""


def config_from_hf(hf: Mapping[str, Any]) -> Config:
    """The dict of a `config.json`; absent keys take the defaults of transformers 5.23.

    Raises ValueError for values out of range and for settings mmfn does not implement.
    """
    return Config(**vision_language.fields_from_hf(hf, vision_language.text_section(hf, DEFAULTS)))


def specs(cfg: Config) -> Tree:
    """The parameters."""
    block = decoder.specs(cfg.decoder, mlp=decoder.mlp_specs(cfg.decoder))
    return vision_language.specs(cfg, [block] * cfg.num_layers)


def apply(params: Tree, batch: Batch, cfg: Config, ops: Ops, cache: Cache | None = None) -> Output:
    """See `vision_language.apply`."""
    feed_forward = partial(decoder.dense, ops=ops)
    block = partial(decoder.decoder_block, cfg=cfg.decoder, ops=ops, feed_forward=feed_forward)
    return vision_language.apply(params, batch, cfg, ops, block, cache)


def key_map(cfg: Config) -> KeyMap:
    """Hugging Face names of the leaves."""
    return KeyMap(
        entries=vision_language.entries(cfg),
        architecture="Qwen3VLForConditionalGeneration",
        copies=vision_language.copies(cfg),
    )
