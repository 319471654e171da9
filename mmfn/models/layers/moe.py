"""Mixture of experts: a router sends every token to a few of many feed-forward layers.

Legend: T tokens, D width, F feed-forward width of an expert, E experts, X experts per token, R = T * X routed rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmfn.dtypes import wide
from mmfn.errors import UserError
from mmfn.models.hf_config import ConfigReader
from mmfn.models.keymap import Entry
from mmfn.models.layers import decoder, linear
from mmfn.ops import Ops
from mmfn.ops.route import RouteConfig
from mmfn.spec import ZEROS, normal, spec
from mmfn.tree import Tree


@dataclass(frozen=True, kw_only=True)
class MoeConfig(RouteConfig):
    """Sizes of one layer of experts, and how its router chooses.

    `d_shared`: width of the feed-forward layer that every token passes beside its experts (0: there is none), and
    `has_shared_gate`: whether what it adds is weighed by a sigmoid of the token. `is_wide`: the router computes in
    float32 whatever its weight's dtype. `bias_rule`: the rule that updates a bias of the choice (`ParamSpec.rule`; "":
    it stays as it is), None where there is no such bias. `judged`: how the router would choose that the load-balancing
    loss judges, of the same logits and without the bias; None: as this one does.
    """

    d_model: int
    d_ff: int
    num_experts: int
    init_std: float
    d_shared: int = 0
    has_shared_gate: bool = False
    is_wide: bool = False
    bias_rule: str | None = None
    judged: RouteConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts % self.num_groups:
            raise UserError(f"n_group is {self.num_groups} but must divide {self.num_experts}, the number of experts")
        most = self.num_experts // self.num_groups * self.num_chosen_groups
        if self.num_chosen > most:
            of = f" in topk_group {self.num_chosen_groups} of n_group {self.num_groups}" if self.num_groups > 1 else ""
            raise UserError(f"num_experts_per_tok is {self.num_chosen} of {most} experts{of}; correct one of them")


def layers_from_hf(text: ConfigReader, num_layers: int) -> frozenset[int]:
    """Which blocks have experts: every `decoder_sparse_step`-th (default: all) but those of `mlp_only_layers`."""
    every, without = text.integer("decoder_sparse_step", 1), text.integers("mlp_only_layers", ())
    return frozenset(i for i in range(num_layers) if (i + 1) % every == 0 and i not in without)


def specs(cfg: MoeConfig) -> Tree:
    """The router, whole on every rank, and the stacked weights of the experts (of `gate_up`, rows 0..F-1 the gate)."""
    E, F, D, std = cfg.num_experts, cfg.d_ff, cfg.d_model, cfg.init_std
    tree = {
        "router": linear.specs(E, D, "router embed", std=std),
        "experts": {
            "gate_up": spec((E, 2 * F, D), "experts mlp embed", normal(std), parts=2),
            "down": spec((E, D, F), "experts embed mlp", normal(std)),
        },
    }
    if cfg.bias_rule is not None:
        bias = spec((E,), "router", ZEROS)
        tree["router"]["choice_bias"] = replace(bias, dtype=torch.float32, is_frozen=True, rule=cfg.bias_rule)
    if cfg.d_shared:
        tree["shared"] = decoder.mlp_specs(D, cfg.d_shared, std)
    if cfg.has_shared_gate:
        tree["shared_gate"] = linear.specs(1, D, "gate embed", std=std)
    return tree


def apply(params: Tree, x_TD: Tensor, is_real_T: Tensor, *, cfg: MoeConfig, ops: Ops) -> tuple[Tensor, Tree]:
    """`(y_TD, statistics)`: the weighted sum of each token's experts, and what `total` adds up.

    `is_real_T`: bool[T]. Padding goes to no expert, wherever it lies: its rows come behind the last expert's, it gets
    zeros and counts nowhere. Statistics, sums over tokens in float32 or wider: `counts_E` tokens sent to each expert (a
    constant), `judged_E` the same and `probs_E` the probabilities as the load-balancing loss judges them, `rows`
    tokens, `dropped` rows that `ops.experts` leaves out. A token's experts are added in a fixed order. The router
    computes in its weight's dtype; where it has a leaf `choice_bias`, float32[E], that moves the choice of experts and
    not their weights. Source: `Qwen3VLMoeTextSparseMoeBlock`, `Qwen3_5MoeSparseMoeBlock` and `Glm4vMoeTextMoE` in
    transformers 5.23.
    """
    logits_TE = _logits(params["router"], x_TD, cfg, ops)
    weights_TX, experts_TX, probs_TE = ops.route(logits_TE, cfg, _bias(params))
    experts_TX = torch.where(is_real_T[:, None], experts_TX, cfg.num_experts)  # of padding: none
    x_RD, counts_E, place_TX = ops.dispatch(x_TD, experts_TX, cfg.num_experts)
    y_RD = ops.experts(x_RD, counts_E, params["experts"])
    y_TD = ops.combine(y_RD, place_TX, weights_TX.to(x_TD.dtype))
    if "shared" in params:
        y_TD = y_TD + shared(params, x_TD, ops)
    dropped_E = counts_E - ops.kept(counts_E, x_RD.shape[0])
    real_T, judged_E = is_real_T.to(probs_TE.dtype), counts_E.to(probs_TE.dtype)
    if cfg.judged is not None:
        _, judged_TX, probs_TE = ops.route(logits_TE, cfg.judged)
        judged_E = torch.zeros_like(probs_TE).scatter(1, judged_TX, real_T[:, None].expand_as(judged_TX)).sum(0)
    statistics = {
        "counts_E": counts_E.to(probs_TE.dtype),
        "judged_E": judged_E,
        "probs_E": real_T @ probs_TE,
        "rows": real_T.sum(),
        "dropped": dropped_E.sum().to(probs_TE.dtype),
    }
    return y_TD, statistics


def shared(params: Tree, x_TD: Tensor, ops: Ops) -> Tensor:
    """What every token gets beside its experts, weighed by its gate where there is one."""
    y_TD = decoder.mlp(params["shared"], x_TD, ops)
    if "shared_gate" in params:
        y_TD = linear.apply(params["shared_gate"], x_TD, ops).sigmoid() * y_TD
    return y_TD


def _logits(router: Tree, x_TD: Tensor, cfg: MoeConfig, ops: Ops) -> Tensor:
    weight_ED = router["weight"]
    if cfg.is_wide:
        router = {**router, "weight": (weight_ED := weight_ED.to(wide(weight_ED.dtype)))}
    return linear.apply(router, x_TD.to(weight_ED.dtype), ops)


def _bias(params: Tree) -> Tensor | None:
    bias_E: Tensor | None = params["router"].get("choice_bias")
    return bias_E


def total(statistics: Sequence[Tree]) -> Tree:
    """The statistics of several layers (None: a layer without a router) added up, None if there is none.

    Nothing is reduced over ranks here: every entry is a sum over tokens, so sums over ranks are the caller's.
    """
    given = [layer for layer in statistics if layer is not None]
    return {name: torch.stack([layer[name] for layer in given]).sum(0) for name in given[0]} if given else None


def mixed(params: Tree, x_TD: Tensor, is_real_T: Tensor, *, cfg: MoeConfig | None, ops: Ops) -> tuple[Tensor, Tree]:
    """The `FeedForward` of a stack in which some blocks have experts and the others an `mlp`."""
    if "moe" in params:
        assert cfg is not None, "a config without experts but parameters of some"
        return apply(params["moe"], x_TD, is_real_T, cfg=cfg, ops=ops)
    return decoder.dense(params, x_TD, is_real_T, ops=ops)


def names(path: str, name: str) -> list[tuple[str, str]]:
    """`(path, Hugging Face name)` of what a layer has beside its experts, in the models of Qwen."""
    return [
        (f"{path}/router/weight", f"{name}.gate.weight"),
        (f"{path}/shared/{{proj}}/weight", f"{name}.shared_expert.{{proj}}_proj.weight"),
        (f"{path}/shared_gate/weight", f"{name}.shared_expert_gate.weight"),
    ]


def fused_entries(path: str, name: str) -> tuple[Entry, ...]:
    """Experts stored as they are here, all in one tensor."""
    pairs = [("gate_up", "gate_up_proj"), ("down", "down_proj")]
    return tuple(Entry(path=f"{path}/experts/{own}", name=f"{name}.experts.{their}") for own, their in pairs)


def numbered_entries(path: str, name: str) -> tuple[Entry, ...]:
    """Experts stored one by one, gate and up apart."""
    one = f"{name}.experts.{{e}}"
    gate_up = (f"{one}.gate_proj.weight", f"{one}.up_proj.weight")
    return (
        Entry(path=f"{path}/experts/gate_up", name=gate_up, join=1),
        Entry(path=f"{path}/experts/down", name=f"{one}.down_proj.weight"),
    )
