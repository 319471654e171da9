"""Qwen3-VL, dense. Source: `modeling_qwen3_vl.py` in transformers 5.23.

Images pass a vision tower; its features replace the embeddings of their placeholder tokens, and features tapped on the
way (deepstack) are added behind the first text blocks. Legend: T tokens, N features, V vocabulary.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from mmfn.batch import Batch
from mmfn.models import Output
from mmfn.models.data import qwen_vision
from mmfn.models.hf_config import ConfigReader
from mmfn.models.keymap import KeyMap
from mmfn.models.layers import balance, decoder, moe, norm, qwen3_tower, rope, text
from mmfn.models.layers import vision_language as shared
from mmfn.models.layers.cache import Cache
from mmfn.models.layers.vision_language import VisionLanguageConfig as Config
from mmfn.ops import Ops
from mmfn.tree import Tree

DEFAULTS = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
}

TOKENS = {"image_token_id": 151_655, "video_token_id": 151_656}
DEEPSTACK = (8, 16, 24)  # the blocks of the tower that are tapped
ROPE = shared.RopeDefaults(theta=500_000.0, sections=(24, 20, 20), is_interleaved=True)
TEXT_NAME, TOWER_NAME = "model.language_model", "model.visual"

head, parts, at_depth, taps = shared.head, shared.parts, shared.at_depth, shared.taps
empty_cache, lora_targets, row_ids = shared.empty_cache, shared.LORA_TARGETS, shared.row_ids
positions, towers, lay, kinds, example = shared.positions, shared.towers, shared.lay, shared.kinds, shared.example
data, flow = qwen_vision.SIDE, shared.flow


def config_from_hf(hf: Mapping[str, Any]) -> Config:
    """The dict of a `config.json`; absent keys take the defaults of transformers 5.23.

    Raises ValueError for values out of range and for settings mmfn does not implement.
    """
    return dense_config(shared.with_defaults(hf, **TOKENS), shared.text_section(hf, DEFAULTS))


def dense_config(hf: Mapping[str, Any], text: ConfigReader) -> Config:
    """The config of everything but experts."""
    tower = qwen3_tower.config_from_hf(ConfigReader(hf).section("vision_config"), DEEPSTACK)
    return Config(**shared.fields_from_hf(hf, text, ROPE, block=decoder.config_from_hf(text), tower=tower))


def specs(cfg: Config) -> Tree:
    """The parameters, of a model with or without experts."""
    return shared.specs(cfg, shared.blocks(cfg), vision=qwen3_tower.specs(cfg.vision))


def apply(params: Tree, batch: Batch, cfg: Config, ops: Ops, cache: Cache | None = None) -> Output:
    """The last hidden states, normalised, before the head, of a model with or without experts.

    With a `cache`, keys and values of the tokens are written to it and `Output.cache` is the new one; a decode step
    (one token per row, `cache.slots.is_prefill` false) reads no images and skips the tower.
    """
    x_TD = text.embed(params["text"]["embed"], batch.tokens_T, ops, pad_token_id=cfg.pad_token_id)
    between = {}
    if cache is None or cache.slots.is_prefill:
        tower = batch.towers["vision"]
        features_ND, deepstack = qwen3_tower.encode(params["vision"], tower, cfg.vision, ops)
        x_TD = text.replace_by_features(x_TD, features_ND, tower.index_T, ops)
        for i, tapped_ND in enumerate(deepstack):
            between[i] = partial(text.add_features, features_ND=tapped_ND, index_T=tower.index_T, ops=ops)
    angles = rope.interleaved(batch.positions_3T, cfg.rope_sections, cfg.rope_theta)
    x_TD, routers, cache = text.decode(
        params["text"]["layers"],
        x_TD,
        angles,
        batch,
        cfg.decoder,
        ops,
        mixer=partial(decoder.attend, cfg=cfg.decoder, ops=ops),
        feed_forward=partial(moe.mixed, cfg=cfg.moe, ops=ops),
        between=between,
        cache=cache,
    )
    x_TD = norm.rms(ops.gather(params["text"]["norm"]), x_TD, cfg.decoder.norm_eps, ops)
    return Output(
        hidden_TD=x_TD,
        losses=balance.router_losses(routers, ops),
        stats=balance.router_stats(routers),
        cache=cache,
    )


def key_map(cfg: Config) -> KeyMap:
    """Hugging Face names of the leaves."""
    return KeyMap(
        entries=shared.entries(cfg, TEXT_NAME, TOWER_NAME),
        architecture="Qwen3VLForConditionalGeneration",
        copies=shared.copies(cfg),
    )
