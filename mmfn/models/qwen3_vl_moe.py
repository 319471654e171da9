"""Qwen3-VL with experts. Source: `modeling_qwen3_vl_moe.py` in transformers 5.23.

The forward pass is that of `qwen3_vl`: what a block's feed-forward layer is, its parameters say. Here it is a mixture
of experts in most blocks.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mmfn.models import qwen3_vl
from mmfn.models.keymap import Entry, KeyMap
from mmfn.models.layers import balance, moe
from mmfn.models.layers import vision_language as shared
from mmfn.models.layers.moe import MoeConfig
from mmfn.models.layers.vision_language import VisionLanguageConfig as Config

DEFAULTS = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}

specs, apply, data, loss_weights = qwen3_vl.specs, qwen3_vl.apply, qwen3_vl.data, shared.loss_weights
head, parts, at_depth, taps = shared.head, shared.parts, shared.at_depth, shared.taps
empty_cache, lora_targets, row_ids = shared.empty_cache, shared.LORA_TARGETS, shared.row_ids
positions, towers, lay, kinds, example = shared.positions, shared.towers, shared.lay, shared.kinds, shared.example
experts_per_token, flow = shared.experts_per_token, shared.flow


def config_from_hf(hf: Mapping[str, Any]) -> Config:
    """The dict of a `config.json`; absent keys take the defaults of transformers 5.23.

    Raises ValueError for values out of range and for settings mmfn does not implement.
    """
    text = shared.text_section(hf, DEFAULTS)
    text.only("norm_topk_prob", True, "this family divides the weights of the chosen experts by their sum")
    dense = qwen3_vl.dense_config(shared.with_defaults(hf, **qwen3_vl.TOKENS), text)
    return replace(
        dense,
        moe=MoeConfig(
            d_model=dense.decoder.d_model,
            d_ff=text.integer("moe_intermediate_size", 1408),
            num_experts=text.integer("num_experts", text.integer("num_local_experts", 60)),  # older, newer spelling
            num_chosen=text.integer("num_experts_per_tok", 4),
            init_std=dense.decoder.init_std,
        ),
        moe_layers=moe.layers_from_hf(text, dense.num_layers),
        router_aux_coef=balance.weight_from_hf(text, 0.001),
    )


def key_map(cfg: Config) -> KeyMap:
    """Hugging Face names of the leaves. The hub stores the experts' weights as [E, in, out]."""
    own, layer = "text/layers/{i}/moe", f"{qwen3_vl.TEXT_NAME}.layers.{{i}}.mlp"
    experts = moe.fused_entries(own, layer)
    others = (Entry(path=path, name=name) for path, name in moe.names(own, layer))
    return KeyMap(
        entries=(*others, *shared.entries(cfg, qwen3_vl.TEXT_NAME, qwen3_vl.TOWER_NAME)),
        architecture="Qwen3VLMoeForConditionalGeneration",
        layouts={
            "hub": tuple(replace(entry, dims=(0, 2, 1)) for entry in experts),
            "transformers": experts,
        },
        copies=shared.copies(cfg),
    )
