"""What routers report, and the loss that balances them. Legend: E experts."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from mmfn.models import Loss, Rule
from mmfn.models.hf_config import ConfigReader
from mmfn.models.layers import moe
from mmfn.ops import Ops
from mmfn.tree import Tree

ROUTER_LOSS = "aux_loss"  # the name of the load-balancing loss


def weight_from_hf(text: ConfigReader, default: float) -> float:
    """The weight of the load-balancing loss: `router_aux_loss_coef`, as in transformers only where
    `output_router_logits` is set."""
    coef, is_balanced = text.number("router_aux_loss_coef", default), text.boolean("output_router_logits", False)
    return coef if is_balanced else 0.0


def router_losses(statistics: Sequence[Tree], ops: Ops) -> dict[str, Loss]:
    """The load-balancing loss of all layers with a router by its name; nothing without routers."""
    total = moe.total(statistics)
    return {} if total is None else {ROUTER_LOSS: partial(balance, total, ops)}


def router_stats(statistics: Sequence[Tree]) -> dict[str, Tensor]:
    """`dropped`, the routed rows that experts left out; nothing without routers."""
    total = moe.total(statistics)
    return {} if total is None else {"dropped": total["dropped"]}


def bias_changes(rate: float) -> Rule:
    """The rule of a bias of the choice: that of an expert with more tokens than the mean falls by `rate`, of one with
    fewer rises. Source: Wang et al. 2024 (arXiv:2408.15664), algorithm 1."""
    return lambda counts_E: rate * (counts_E.mean() - counts_E).sign()


def router_counts(statistics: Sequence[Tree]) -> dict[str, Tensor]:
    """What that rule reads, tokens sent to each expert, by the path of each bias in the text."""
    path = "text/layers/{}/moe/router/choice_bias"
    return {path.format(i): layer["counts_E"] for i, layer in enumerate(statistics) if layer is not None}


def balance(total: Mapping[str, Tensor], ops: Ops) -> Tensor:
    """This rank's share of the load-balancing loss of one micro-batch, 0-D: shares add up to the loss.

    `E * sum_e f_e p_e`: f_e tokens sent to expert e and p_e its probability (`MoeConfig.judged`), both per token, over
    all tokens of all layers with experts; equal loads give X, the experts per token. Only p_e carries a gradient.
    `total`: what `moe.total` gives for this rank, which `ops.psum` adds up over ranks once. A product of two means, it
    depends on how a batch is split into micro-batches, but not on how it is spread over ranks.
    Source: Fedus et al. 2021 (arXiv:2101.03961), equations 4 to 6; `load_balancing_loss_func` in transformers 5.23.
    """
    sums = ops.psum(torch.cat([total["judged_E"], total["rows"][None]]))
    counts_E, rows = sums[:-1], sums[-1].clamp(min=1)  # a batch of padding alone has no rows
    value: Tensor = counts_E.numel() * ((counts_E / rows) @ (total["probs_E"] / rows))
    return value
