"""Qwen3-VL with experts. Source: `modeling_qwen3_vl_moe.py` in transformers 5.23.

As Qwen3-VL (`layers.vision_language`), but the feed-forward layer of most blocks is a mixture of experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from mmfn.batch import Batch
from mmfn.models import Output
from mmfn.models.keymap import Entry, KeyMap
from mmfn.models.layers import decoder, moe, vision_language
from mmfn.models.layers.cache import Cache
from mmfn.models.layers.moe import MoeConfig
from mmfn.models.layers.vision_language import VisionLanguageConfig
from mmfn.ops import Ops
from mmfn.tree import Tree

DEFAULTS = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}

head, positions, empty_cache = vision_language.head, vision_language.positions, vision_language.empty_cache
parts = vision_language.parts


@dataclass(frozen=True, kw_only=True)
class Config(VisionLanguageConfig):
    """A Qwen3-VL model with experts in the blocks `moe_layers`; the others keep a dense layer.

    `router_aux_coef`: weight of the load-balancing loss.
    """

    moe: MoeConfig
    moe_layers: frozenset[int]
    router_aux_coef: float


def config_from_hf(hf: Mapping[str, Any]) -> Config:
    """The dict of a `config.json`; absent keys take the defaults of transformers 5.23.

    The load-balancing loss always counts with `router_aux_loss_coef` (transformers adds it where
    `output_router_logits` is set). Raises ValueError for values out of range and for settings mmfn does not implement.
    """
    text = vision_language.text_section(hf, DEFAULTS)
    text.only("norm_topk_prob", True, "this family divides the weights of the chosen experts by their sum")
    fields = vision_language.fields_from_hf(hf, text)
    every, without = text.integer("decoder_sparse_step", 1), text.integers("mlp_only_layers", ())
    return Config(
        **fields,
        moe=MoeConfig(
            d_model=fields["decoder"].d_model,
            d_ff=text.integer("moe_intermediate_size", 1408),
            num_experts=text.integer("num_experts", text.integer("num_local_experts", 60)),  # older, newer spelling
            num_chosen=text.integer("num_experts_per_tok", 4),
            init_std=fields["decoder"].init_std,
        ),
        moe_layers=frozenset(i for i in range(fields["num_layers"]) if (i + 1) % every == 0 and i not in without),
        router_aux_coef=text.number("router_aux_loss_coef", 0.001),
    )


def specs(cfg: Config) -> Tree:
    """The parameters."""
    dense = decoder.specs(cfg.decoder, mlp=decoder.mlp_specs(cfg.decoder))
    sparse = decoder.specs(cfg.decoder, moe=moe.specs(cfg.moe))
    return vision_language.specs(cfg, [sparse if i in cfg.moe_layers else dense for i in range(cfg.num_layers)])


def apply(params: Tree, batch: Batch, cfg: Config, ops: Ops, cache: Cache | None = None) -> Output:
    """See `vision_language.apply`."""
    feed_forward = partial(moe.mixed, cfg=cfg.moe, ops=ops)
    block = partial(decoder.decoder_block, cfg=cfg.decoder, ops=ops, feed_forward=feed_forward)
    return vision_language.apply(params, batch, cfg, ops, block, cache)


def key_map(cfg: Config) -> KeyMap:
    """Hugging Face names of the leaves. The hub stores the experts' weights as [E, in, out]."""
    experts = [
        ("text/layers/{i}/moe/experts/gate_up", "model.language_model.layers.{i}.mlp.experts.gate_up_proj"),
        ("text/layers/{i}/moe/experts/down", "model.language_model.layers.{i}.mlp.experts.down_proj"),
    ]
    router = Entry(path="text/layers/{i}/moe/router/weight", name="model.language_model.layers.{i}.mlp.gate.weight")
    return KeyMap(
        entries=(router, *vision_language.entries(cfg)),
        architecture="Qwen3VLMoeForConditionalGeneration",
        layouts={
            "hub": tuple(Entry(path=path, name=name, dims=(0, 2, 1)) for path, name in experts),
            "transformers": tuple(Entry(path=path, name=name) for path, name in experts),
        },
        copies=vision_language.copies(cfg),
    )
