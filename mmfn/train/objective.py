"""The objective: one weight per token, computed once per global step from label counts alone.

The loss is `sum_t weights_T[t] * cross_entropy_T[t]`, so values and gradients of micro-batches (and of ranks) are
summed, never averaged. Legend: M micro-batches, N segments (samples) of a micro-batch, T tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from mmfn.batch import IGNORE, Batch
from mmfn.models import Family
from mmfn.ops import Ops, portable
from mmfn.tree import Tree

Objective = Callable[[Tensor], Tensor]
"""counts_MN: int64[M, N], supervised tokens per micro-batch and sample -> float64[M, N], weight of each such token."""


def default(counts_MN: Tensor) -> Tensor:
    """Mean over micro-batches of each one's mean over its supervised tokens. Depends on how samples are split.

    A micro-batch without supervised tokens does not count: ranks add empty ones to have equally many.
    """
    counts_M1 = counts_MN.sum(1, keepdim=True)
    return _reciprocal(counts_M1 * (counts_M1 > 0).sum()).expand(counts_MN.shape)


def per_token_loss(counts_MN: Tensor) -> Tensor:
    """Mean over all supervised tokens of the global batch. Any split of the same batch gives the same gradient."""
    return _reciprocal(counts_MN.sum()).expand(counts_MN.shape)


OBJECTIVES: dict[str, Objective] = {"default": default, "per_token_loss": per_token_loss}


def resolve(objective: str | Objective) -> Objective:
    """The function of a name in `OBJECTIVES`, or the function itself. Raises ValueError naming the nearest known."""
    if not isinstance(objective, str):
        return objective
    if objective not in OBJECTIVES:
        near = get_close_matches(objective, OBJECTIVES, n=1, cutoff=0.0)
        raise ValueError(f"objective {objective!r} is unknown; nearest is {near[0]!r}, known: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[objective]


Exchange = Callable[[Tensor], tuple[Tensor, int]]
"""counts_MN of this rank's shares -> (those of all micro-batches of all ranks, where this rank's stand among them)."""


def alone(counts_MN: Tensor) -> tuple[Tensor, int]:
    """The exchange of a rank that holds the whole global batch."""
    return counts_MN, 0


def weigh(microbatches: Sequence[Batch], objective: str | Objective, exchange: Exchange = alone) -> list[Batch]:
    """All micro-batches of one step with `weights_T` and `aux_weight` set; only labels and segments are read.

    Weights are float32, or float64 where the batch's own `weights_T` are; zero where a token is not supervised. Raises
    ValueError for an unknown objective or no micro-batch. Source: the loss types of MindSpeed-MM (`loss_cfg`).
    """
    if not microbatches:
        raise ValueError("weigh received no micro-batch; a global step needs at least one")
    width = max(b.num_segments for b in microbatches)
    counts_MN, first = exchange(torch.stack([_counts(b, width) for b in microbatches]))
    own_MN = resolve(objective)(counts_MN)[first : first + len(microbatches)]
    weighed = [_spread(b, weights_N) for b, weights_N in zip(microbatches, own_MN.unbind(0), strict=True)]
    return [replace(b, aux_weight=b.weights_T.new_full((), 1 / len(weighed))) for b in weighed]


def loss_fn(params: Tree, batch: Batch, family: Family, cfg: Any, ops: Ops) -> tuple[Tensor, dict[str, Tensor]]:
    """`(loss, metrics)` of one weighed micro-batch: its share of the global loss, a plain weighted sum.

    `loss`: 0-D, float32 or wider: cross entropies and, of a family with routers, `cfg.router_aux_coef` times the
    load-balancing loss. `metrics`: 0-D tensors to be summed over micro-batches and ranks: `loss`, `tokens`, the number
    of supervised tokens, and with routers `aux_loss`, the load-balancing loss (its mean over micro-batches), and
    `dropped`, routed rows that the experts left out.
    """
    out = family.apply(params, batch, cfg, ops)
    weight_VD = family.head(params, cfg, ops)
    value = ops.linear_cross_entropy(out.hidden_TD, weight_VD, batch.labels_T, batch.weights_T)
    metrics = {"tokens": (batch.labels_T != IGNORE).sum()}
    if out.aux is not None:
        aux_loss = batch.aux_weight * balance(out.aux, ops)
        value = value + cfg.router_aux_coef * aux_loss
        metrics |= {"aux_loss": aux_loss.detach(), "dropped": out.aux["dropped"]}
    return value, {"loss": value.detach(), **metrics}


def balance(aux: Tree, ops: Ops) -> Tensor:
    """This rank's share of the load-balancing loss of one micro-batch, 0-D: shares add up to the loss.

    `E * sum_e f_e p_e`: f_e tokens sent to expert e and p_e its probability, both per token, over all tokens of all
    layers with experts; equal loads give X, the experts per token. Only p_e carries a gradient. `aux`: the statistics
    of this rank, which `ops.psum` adds up over ranks once. A product of two means, it depends on how a batch is split
    into micro-batches, but not on how it is spread over ranks.
    Source: Fedus et al. 2021 (arXiv:2101.03961), equations 4 to 6; `load_balancing_loss_func` in transformers 5.23.
    """
    sums = ops.psum(torch.cat([aux["counts_E"], aux["rows"][None]]))
    counts_E, rows = sums[:-1], sums[-1].clamp(min=1)  # a batch of padding alone has no rows
    value: Tensor = counts_E.numel() * ((counts_E / rows) @ (aux["probs_E"] / rows))
    return value


def loss(
    params: Tree, batch: Batch, model: Any, *, objective: str | Objective = "per_token_loss", ops: Ops | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """`(loss, metrics)` of one batch taken as the whole global step; differentiable with respect to `params`.

    `params`: shaped like `model.params`. `model`: a `Model` (its `family` and `cfg` are used). `ops` defaults to
    `ops.portable()`. Raises ValueError for an unknown objective.

    >>> (value, metrics), grads = mmfn.value_and_grad(mmfn.loss, has_aux=True)(model.params, batch, model)
    """
    (weighed,) = weigh([batch], objective)
    return loss_fn(params, weighed, model.family, model.cfg, ops or portable())


def _reciprocal(counts: Tensor) -> Tensor:
    """1 / counts in float64, and 0 where there is nothing to weigh."""
    return torch.where(counts > 0, 1.0 / counts.clamp(min=1).to(torch.float64), 0.0)


def _counts(batch: Batch, width: int) -> Tensor:
    """Supervised tokens of every segment: int64[width], zeros behind the last segment."""
    zeros = torch.zeros(width + 1, dtype=torch.int64, device=batch.labels_T.device)
    return zeros.index_add(0, batch.segment_T, (batch.labels_T != IGNORE).long())[:width]


def _spread(batch: Batch, weights_N: Tensor) -> Batch:
    """Give each supervised token the weight of its segment (padding belongs to none)."""
    weights_T = torch.nn.functional.pad(weights_N[: batch.num_segments], (0, 1))[batch.segment_T]
    weights_T = torch.where(batch.labels_T != IGNORE, weights_T, 0.0)
    return replace(batch, weights_T=weights_T.to(batch.weights_T.dtype))
