"""Mixture of experts: a router sends every token to a few of many feed-forward layers.

Legend: T tokens, D width, F feed-forward width of an expert, E experts, X experts per token, R = T * X routed rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfn.errors import UserError
from mmfn.models.layers import decoder, linear
from mmfn.ops import Ops
from mmfn.spec import normal, spec
from mmfn.tree import Tree


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Sizes of one layer of experts; `num_chosen`: experts per token."""

    d_model: int
    d_ff: int
    num_experts: int
    num_chosen: int
    init_std: float

    def __post_init__(self) -> None:
        if self.num_chosen > self.num_experts:
            raise UserError(
                f"num_experts_per_tok is {self.num_chosen} of {self.num_experts} experts; correct one of them"
            )


def specs(cfg: MoeConfig) -> Tree:
    """The router, whole on every rank, and the stacked weights of the experts (of `gate_up`, rows 0..F-1 the gate)."""
    E, F, D, init = cfg.num_experts, cfg.d_ff, cfg.d_model, normal(cfg.init_std)
    return {
        "router": linear.specs(E, D, "router embed", std=cfg.init_std),
        "experts": {
            "gate_up": spec((E, 2 * F, D), "experts mlp embed", init, parts=2),
            "down": spec((E, D, F), "experts embed mlp", init),
        },
    }


def apply(params: Tree, x_TD: Tensor, is_real_T: Tensor, *, cfg: MoeConfig, ops: Ops) -> tuple[Tensor, Tree]:
    """`(y_TD, statistics)`: the weighted sum of each token's experts, and what `total` adds up.

    `is_real_T`: bool[T]. Padding gets zeros, counts nowhere and is dealt to the experts in turn, so that it never
    crowds one of them. Statistics, sums over tokens in float32 or wider: `counts_E` tokens sent to each expert (a
    constant), `probs_E` the router's probabilities, `rows` tokens, `dropped` rows that `ops.experts` leaves out. A
    token's experts are added in a fixed order; on a GPU the gradient of x is only under
    `torch.use_deterministic_algorithms`. The router computes in its weight's dtype. Source:
    `Qwen3VLMoeTextSparseMoeBlock` in transformers 5.23.
    """
    (T, D), E, X = x_TD.shape, cfg.num_experts, cfg.num_chosen
    logits_TE = linear.apply(params["router"], x_TD.to(params["router"]["weight"].dtype))
    weights_TX, experts_TX, probs_TE = ops.route(logits_TE, X)
    weights_TX = weights_TX.to(x_TD.dtype)
    slots_TX = torch.arange(T * X, device=x_TD.device).view(T, X)
    is_real_T1 = is_real_T[:, None]
    experts_TX = torch.where(is_real_T1, experts_TX, slots_TX % E)
    weights_TX = torch.where(is_real_T1, weights_TX, 0.0)

    sorted_R, order_R = experts_TX.flatten().sort(stable=True)
    ends_E = torch.searchsorted(sorted_R, torch.arange(E, device=x_TD.device), right=True)
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    y_RD = ops.experts(x_TD.index_select(0, order_R // X), counts_E, params["experts"])
    place_R = torch.empty_like(order_R).scatter(0, order_R, slots_TX.flatten())
    y_TXD = y_RD.index_select(0, place_R).view(T, X, D)
    kept_E = ops.kept(counts_E, T * X)
    return (y_TXD * weights_TX[..., None]).sum(1), _statistics(probs_TE, experts_TX, is_real_T, kept_E)


def _statistics(probs_TE: Tensor, experts_TX: Tensor, is_real_T: Tensor, kept_E: Tensor) -> Tree:
    """`kept_E`: rows computed, padding included; of an expert's rows, padding is taken to be the last."""
    real_T = is_real_T.to(probs_TE.dtype)
    real_R = real_T.repeat_interleave(experts_TX.shape[1])
    counts_E = probs_TE.new_zeros(probs_TE.shape[1]).scatter_add(0, experts_TX.flatten(), real_R)
    return {
        "counts_E": counts_E,
        "probs_E": real_T @ probs_TE,
        "rows": real_T.sum(),
        "dropped": (counts_E - kept_E).clamp(min=0).sum(),
    }


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
