"""Floating-point operations of torch operators, from the shapes of what they are given.

A product of [m, k] and [k, n] counts 2 m k n; attention counts its two products over the pairs of a query and a key it
sees, half of a square under causality (five products in the backward, one of them a recomputation); all else counts
nothing. Packed attention is one operator per segment, so each segment counts by its own length.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

FORMULAS = {
    "products": "2 m k n",
    "attention": "4 H C pairs, backward 10 H C pairs",
    "pairs": "queries * keys of a segment, with a causal mask queries * (queries + 1) / 2",
}


def count(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Of one call of the operator `func`; 0 for an operator that has no formula."""
    formula = _TABLE.get(func.overloadpacket)
    return 0 if formula is None else formula(*args, **kwargs)


def product(a: Tensor, b: Tensor, **_: Any) -> int:
    """Of `aten.mm` and `aten.bmm`: [..., m, k] and [..., k, n]."""
    return 2 * prod(a.shape) * b.shape[-1]


def added_product(_: Tensor, a: Tensor, b: Tensor, **options: Any) -> int:
    """Of `aten.addmm` and `aten.baddbmm`."""
    return product(a, b)


def attention(
    q_BHLC: Tensor, k_BHSC: Tensor, v_BHSC: Tensor, dropout: float = 0.0, is_causal: bool = False, **_: Any
) -> int:
    """Of `aten._scaled_dot_product_flash_attention_for_cpu`: scores and weighted values."""
    return 4 * _pairs(q_BHLC, k_BHSC, is_causal)


def attention_grad(
    do_BHLC: Tensor, q_BHLC: Tensor, k_BHSC: Tensor, v: Tensor, o: Tensor, lse: Tensor, p: float, causal: bool, **_: Any
) -> int:
    """Of its backward: scores again, then the gradients of values, probabilities, queries and keys."""
    return 10 * _pairs(q_BHLC, k_BHSC, causal)


def _pairs(q_BHLC: Tensor, k_BHSC: Tensor, is_causal: bool) -> int:
    (B, H, L, C), S = q_BHLC.shape, k_BHSC.shape[2]
    return B * H * C * (L * (L + 1) // 2 if is_causal else L * S)


_aten = torch.ops.aten
_TABLE: dict[Any, Callable[..., int]] = {
    _aten.mm: product,
    _aten.mv: lambda a, b, **_: 2 * prod(a.shape),
    _aten.bmm: product,
    _aten.addmm: added_product,
    _aten.addmm_: added_product,
    _aten.baddbmm: added_product,
    _aten._scaled_dot_product_flash_attention_for_cpu: attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_grad,
}
