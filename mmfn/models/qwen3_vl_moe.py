"""Qwen3-VL with experts. Source: `modeling_qwen3_vl_moe.py` in transformers 5.23.

The forward pass is that of `qwen3_vl`: what a block's feed-forward layer is, its parameters say. Here it is a mixture
of experts in most blocks.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mmfn.models import qwen3_vl
from mmfn.models.keymap import Entry, KeyMap
from mmfn.models.layers import vision
from mmfn.models.layers import vision_language as shared
from mmfn.models.layers.moe import MoeConfig
from mmfn.models.layers.vision_language import VisionLanguageConfig as Config
from mmfn.tree import Tree

DEFAULTS = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}

apply, data, loss_weights = qwen3_vl.apply, qwen3_vl.data, shared.loss_weights
head, parts, at_depth, taps = shared.head, shared.parts, shared.at_depth, shared.taps
empty_cache, lora_targets, row_ids = shared.empty_cache, shared.LORA_TARGETS, shared.row_ids
positions, towers, lay, kinds, example = shared.positions, shared.towers, shared.lay, shared.kinds, shared.example


def config_from_hf(hf: Mapping[str, Any]) -> Config:
    """The dict of a `config.json`; absent keys take the defaults of transformers 5.23.

    As in transformers the load-balancing loss counts only with `output_router_logits`, by `router_aux_loss_coef`.
    Raises ValueError for values out of range and for settings mmfn does not implement.
    """
    text = shared.text_section(hf, DEFAULTS)
    text.only("norm_topk_prob", True, "this family divides the weights of the chosen experts by their sum")
    dense = qwen3_vl.dense_config(shared.with_defaults(hf, **qwen3_vl.TOKENS), text)
    coef, is_balanced = text.number("router_aux_loss_coef", 0.001), text.boolean("output_router_logits", False)
    every, without = text.integer("decoder_sparse_step", 1), text.integers("mlp_only_layers", ())
    return replace(
        dense,
        moe=MoeConfig(
            d_model=dense.decoder.d_model,
            d_ff=text.integer("moe_intermediate_size", 1408),
            num_experts=text.integer("num_experts", text.integer("num_local_experts", 60)),  # older, newer spelling
            num_chosen=text.integer("num_experts_per_tok", 4),
            init_std=dense.decoder.init_std,
        ),
        moe_layers=frozenset(i for i in range(dense.num_layers) if (i + 1) % every == 0 and i not in without),
        router_aux_coef=coef if is_balanced else 0.0,
    )


def specs(cfg: Config) -> Tree:
    """The parameters."""
    return shared.specs(cfg, shared.blocks(cfg), vision=vision.specs(cfg.vision))


def key_map(cfg: Config) -> KeyMap:
    """Hugging Face names of the leaves. The hub stores the experts' weights as [E, in, out]."""
    layer = f"{qwen3_vl.TEXT_NAME}.layers.{{i}}.mlp"
    experts = [
        ("text/layers/{i}/moe/experts/gate_up", f"{layer}.experts.gate_up_proj"),
        ("text/layers/{i}/moe/experts/down", f"{layer}.experts.down_proj"),
    ]
    router = Entry(path="text/layers/{i}/moe/router/weight", name=f"{layer}.gate.weight")
    return KeyMap(
        entries=(router, *shared.entries(cfg, qwen3_vl.TEXT_NAME, qwen3_vl.TOWER_NAME)),
        architecture="Qwen3VLMoeForConditionalGeneration",
        layouts={
            "hub": tuple(Entry(path=path, name=name, dims=(0, 2, 1)) for path, name in experts),
            "transformers": tuple(Entry(path=path, name=name) for path, name in experts),
        },
        copies=shared.copies(cfg),
    )
