"""Qwen3.5, dense and with experts. Source: `modeling_qwen3_5.py` and `modeling_qwen3_5_moe.py` in transformers 5.23.

Most text blocks mix tokens by Gated DeltaNet, some by attention: a block's parameters say which. Where a checkpoint has
one, a block behind them predicts one token further ahead. Checkpoints of Qwen3.6 differ in the names of that block's
experts alone. Legend: T tokens, N features, D width, V vocabulary.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfn.batch import Batch
from mmfn.models import Output, ahead_loss
from mmfn.models.data import qwen_vision
from mmfn.models.hf_config import ConfigReader
from mmfn.models.keymap import Entry, KeyMap
from mmfn.models.layers import balance, decoder, delta, moe, mtp, norm, qwen3_tower, rope, text
from mmfn.models.layers import cache as layer_cache
from mmfn.models.layers import vision_language as shared
from mmfn.models.layers.delta import DeltaConfig
from mmfn.models.layers.moe import MoeConfig
from mmfn.models.work import Stage
from mmfn.ops import Ops
from mmfn.tree import Tree

DENSE = {
    "vocab_size": 248_320,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
WITH_EXPERTS = {**DENSE, "hidden_size": 2048, "num_hidden_layers": 40, "num_key_value_heads": 2}
ARCHITECTURES = {False: "Qwen3_5ForConditionalGeneration", True: "Qwen3_5MoeForConditionalGeneration"}
TOKENS = {"image_token_id": 248_056, "video_token_id": 248_057}
ROPE = shared.RopeDefaults(theta=10_000.0, sections=(11, 11, 10), is_interleaved=True, part=0.25)
KINDS = ("linear_attention", "full_attention")
TEXT_NAME, TOWER_NAME = "model.language_model", "model.visual"

head, at_depth, taps = shared.head, shared.at_depth, shared.taps
positions, towers, lay, kinds, example = shared.positions, shared.towers, shared.lay, shared.kinds, shared.example
experts_per_token = shared.experts_per_token
lora_targets = (r"text/layers/\d+/(attention/(q|k|v|o)|delta/(qkv|z|o))",)
data = replace(qwen_vision.SIDE, chat=replace(qwen_vision.SIDE.chat, templates=("qwen3_5", "qwen3_5_nothink")))


@dataclass(frozen=True, kw_only=True)
class Config(shared.VisionLanguageConfig):
    """`layer_types`: of every text block, one of `KINDS`. `num_ahead`: further tokens that are predicted, 0 or 1, and
    `ahead_weight`, how much that counts."""

    delta: DeltaConfig
    layer_types: tuple[str, ...]
    num_ahead: int = 0
    ahead_weight: float = 0.0


def config_from_hf(hf: Mapping[str, Any]) -> Config:
    """The dict of a `config.json`; absent keys take the defaults of transformers 5.23.

    `mtp_num_hidden_layers` (default 0) says whether there is a block that predicts one token further ahead, and
    `mtp_loss_scaling_factor` (default 0.1) how much that counts: with 0 it is no part of the model, and its tensors are
    copied into what is saved. Raises ValueError for values out of range and for settings mmfn does not implement.
    """
    has_experts = hf["model_type"] == "qwen3_5_moe"
    text_ = shared.text_section(hf, WITH_EXPERTS if has_experts else DENSE)
    text_.only("attn_output_gate", True, "attention has a gate")
    text_.only("mtp_use_dedicated_embeddings", False, "embedding and head are shared")
    tower = qwen3_tower.config_from_hf(ConfigReader(hf).section("vision_config"))
    block = decoder.config_from_hf(text_, has_gate=True, has_zero_centered_norms=True)
    fields = shared.fields_from_hf(shared.with_defaults(hf, **TOKENS), text_, ROPE, block=block, tower=tower)
    weight = text_.number("mtp_loss_scaling_factor", 0.1)
    if num_ahead := text_.integer("mtp_num_hidden_layers", 0, minimum=0):
        text_.only("mtp_num_hidden_layers", 1, "one token further ahead is predicted at most")
    cfg = Config(
        **fields,
        delta=delta.config_from_hf(text_),
        layer_types=_layer_types(text_, fields["num_layers"]),
        num_ahead=num_ahead if weight else 0,
        ahead_weight=weight,
    )
    return _with_experts(cfg, text_) if has_experts else cfg


def _layer_types(text_: ConfigReader, num_layers: int) -> tuple[str, ...]:
    every = text_.integer("full_attention_interval", 4)
    default = [KINDS[(i + 1) % every == 0] for i in range(num_layers)]
    return text_.strings("layer_types", KINDS, num_layers, default)


def _with_experts(cfg: Config, text_: ConfigReader) -> Config:
    text_.only("norm_topk_prob", True, "this family divides the weights of the chosen experts by their sum")
    text_.only("mlp_only_layers", [], "all blocks have experts")
    text_.only("decoder_sparse_step", 1, "all blocks have experts")
    experts = MoeConfig(
        d_model=cfg.decoder.d_model,
        d_ff=text_.integer("moe_intermediate_size", 512),
        num_experts=text_.integer("num_experts", 256),
        num_chosen=text_.integer("num_experts_per_tok", 8),
        d_shared=text_.integer("shared_expert_intermediate_size", 512),
        has_shared_gate=True,
        init_std=cfg.decoder.init_std,
    )
    everywhere = frozenset(range(cfg.num_layers))
    return replace(cfg, moe=experts, moe_layers=everywhere, router_aux_coef=balance.weight_from_hf(text_, 0.001))


def without_absent(cfg: Config, names: Collection[str]) -> Config:
    """The config of a checkpoint with tensors of these names: one that transformers saved lacks the block ahead."""
    return cfg if any(name.startswith("mtp.") for name in names) else replace(cfg, num_ahead=0)


def specs(cfg: Config) -> Tree:
    """The parameters. The block ahead has attention."""
    width = cfg.decoder
    feed = {"mlp": decoder.mlp_specs(width.d_model, width.d_ff, width.init_std)}
    feed = feed if cfg.moe is None else {"moe": moe.specs(cfg.moe)}
    full = decoder.specs(width, attention=decoder.attention_specs(width), **feed)
    block = {"linear_attention": decoder.specs(width, delta=delta.specs(cfg.delta), **feed), "full_attention": full}
    blocks = [block[kind] for kind in cfg.layer_types[: cfg.num_layers]]
    tree = shared.specs(cfg, blocks, vision=qwen3_tower.specs(cfg.vision))
    return {**tree, "mtp": mtp.specs(width, full)} if cfg.num_ahead else tree


def apply(params: Tree, batch: Batch, cfg: Config, ops: Ops, cache: layer_cache.Cache | None = None) -> Output:
    """The last hidden states, normalised, before the head, and those of the block ahead where the batch has `ahead`.

    With a `cache`, what each block remembers is written to it and `Output.cache` is the new one; a decode step (one
    token per row, `cache.slots.is_prefill` false) reads no images and skips the tower.
    """
    tokens = torch.cat([batch.tokens_T, *(ahead.tokens_T for ahead in batch.ahead)])
    x = text.embed(params["text"]["embed"], tokens, ops, pad_token_id=cfg.pad_token_id)
    if cache is None or cache.slots.is_prefill:
        tower = batch.towers["vision"]
        features_ND, _ = qwen3_tower.encode(params["vision"], tower, cfg.vision, ops)
        index = torch.cat([tower.index_T, *(ahead.index_T["vision"] for ahead in batch.ahead)])
        x = text.replace_by_features(x, features_ND, index, ops)
    x_TD, *next_tokens = x.tensor_split(1 + len(batch.ahead))
    run = partial(
        text.decode,
        angles=rope.interleaved(batch.positions_3T, cfg.rope_sections, cfg.rope_theta),
        batch=batch,
        cfg=cfg.decoder,
        ops=ops,
        mixer=partial(mixed, cfg=cfg, ops=ops),
        feed_forward=partial(moe.mixed, cfg=cfg.moe, ops=ops),
    )
    x_TD, routers, cache = run(params["text"]["layers"], x_TD, cache=cache)
    x_TD = norm.rms(ops.gather(params["text"]["norm"]), x_TD, cfg.decoder.norm_eps, ops)

    def further(next_TD: Tensor) -> Tensor:
        return mtp.hidden(
            params["mtp"], next_TD, x_TD, cfg.decoder, ops, decode=lambda layers, x: run(layers, x, name="mtp")[0]
        )

    return Output(
        hidden_TD=x_TD,
        ahead=tuple(partial(further, next_TD) for next_TD in next_tokens),
        losses=balance.router_losses(routers, ops),
        stats=balance.router_stats(routers),
        cache=cache,
    )


def mixed(params: Tree, *xs: Any, cfg: Config, ops: Ops) -> tuple[Tensor, Tree]:
    """The `Mixer` of a stack of both kinds."""
    if "delta" in params:
        return delta.mix(params, *xs, cfg=cfg.delta, ops=ops)
    return decoder.attend(params, *xs, cfg=cfg.decoder, ops=ops)


def flow(cfg: Config) -> dict[str, list[Stage]]:
    """The stages of the tower, of the text, whose mixers are of two kinds, and of the block ahead."""
    mixers = [
        shared.attention_flow(f"text/layers/{i}/attention", cfg)
        if kind == "full_attention"
        else delta.flow(f"text/layers/{i}/delta", cfg.delta)
        for i, kind in enumerate(cfg.layer_types[: cfg.num_layers])
    ]
    ahead = [*mtp.flow("mtp", shared.attention_flow("mtp/layers/0/attention", cfg)), shared.head_flow(cfg, 1)]
    found = {**shared.flow(cfg), "text": shared.text_flow(cfg, mixers)}
    return {**found, ahead_loss(0): ahead} if cfg.num_ahead else found


def is_recurrent(cfg: Config) -> bool:
    """Whether there is a layer that is."""
    return "linear_attention" in cfg.layer_types[: cfg.num_layers]


def num_ahead(cfg: Config) -> int:
    """Further tokens that are predicted."""
    return cfg.num_ahead


def loss_weights(cfg: Config) -> dict[str, float]:
    """Those of what is predicted further ahead, which has no part in the routers' loss, and of that."""
    return {**({ahead_loss(0): cfg.ahead_weight} if cfg.num_ahead else {}), **shared.loss_weights(cfg)}


def empty_cache(cfg: Config, num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device) -> list[Tree]:
    """Keys and values of blocks of attention (`num_columns` counts the spare one), memories of the others."""
    shape = (num_rows, num_columns, cfg.decoder.num_kv_heads, cfg.decoder.head_dim)
    return [
        layer_cache.empty(1, shape, dtype, device)[0]
        if kind == "full_attention"
        else delta.empty(cfg.delta, num_rows, dtype, device)
        for kind in cfg.layer_types[: cfg.num_layers]
    ]


def row_ids(batch: Batch, cfg: Config) -> list[tuple[str, Tensor]]:
    """Which rows parameters compute with, by the beginning of their path."""
    return [*shared.row_ids(batch, cfg), ("mtp/", batch.token_ids_T)]


def parts(cfg: Config) -> dict[str, str]:
    """Regexes over the paths of the parts a run can freeze."""
    return {**shared.parts(cfg), **({"mtp": r"mtp/.*"} if cfg.num_ahead else {})}


def key_map(cfg: Config) -> KeyMap:
    """Hugging Face names of the leaves.

    Experts are fused in the text and one by one ahead ("hub", Qwen3.5), fused everywhere ("transformers", as it holds
    them, and Qwen3.6), or one by one everywhere ("apart", as transformers saves a model that it made).
    """
    text_, ahead = (f"{TEXT_NAME}.layers.{{i}}", "text/layers/{i}"), ("mtp.layers.{i}", "mtp/layers/{i}")
    width = (sum(cfg.delta.widths), 1, cfg.delta.kernel_size)
    conv = Entry(
        path="text/layers/{i}/delta/conv/kernel", name=f"{text_[0]}.linear_attn.conv1d.weight", disk_shape=width
    )
    pairs = [*delta.names("text/layers/{i}/delta", f"{text_[0]}.linear_attn"), *mtp.names("mtp", "mtp")]
    pairs += [pair for name, path in (text_, ahead) for pair in moe.names(f"{path}/moe", f"{name}.mlp")]
    pairs += decoder.names(ahead[1], ahead[0])
    fused, apart = moe.fused_entries, moe.numbered_entries
    layouts = {"hub": (fused, apart), "transformers": (fused, fused), "apart": (apart, apart)}
    return KeyMap(
        entries=(
            conv,
            *(Entry(path=path, name=name) for path, name in pairs),
            *shared.entries(cfg, TEXT_NAME, TOWER_NAME),
        ),
        architecture=ARCHITECTURES[cfg.moe is not None],
        layouts={
            layout: tuple(
                entry
                for entries, (name, path) in zip(both, (text_, ahead), strict=True)
                for entry in entries(f"{path}/moe", f"{name}.mlp")
            )
            for layout, both in layouts.items()
        },
        copies=shared.copies(cfg),
        verbatim=() if cfg.num_ahead else (r"mtp\..*",),
    )
