"""Floating-point operations of torch operators, from the shapes of what they are given.

A product of [m, k] and [k, n] counts 2 m k n; attention counts its two products over the pairs of a query and a key it
sees, half of a square under causality (five products in the backward, one of them a recomputation); all else counts
nothing. Each segment of packed attention counts by its own length, whether it is an operator of its own or all segments
are one.
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


def packed_attention(
    q_THC: Tensor,
    k_SKC: Tensor,
    v_SKC: Tensor,
    offsets_N: Tensor,
    is_causal: bool,
    key_offsets_N: Tensor | None = None,
) -> int:
    """Of `mmfn.attention`. Keys with offsets of their own have no causal mask."""
    lengths_N = offsets_N.diff()
    keys_N = lengths_N if key_offsets_N is None else key_offsets_N.diff()
    pairs_N = lengths_N * (lengths_N + 1) // 2 if is_causal else lengths_N * keys_N
    return 4 * q_THC.shape[1] * q_THC.shape[2] * int(pairs_N.sum())


def packed_attention_grad(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *segments: Any) -> int:
    """Of `mmfn.attention_grad`: five products for two."""
    return 5 * packed_attention(q, k, v, *segments) // 2


def grouped(x_RD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> int:
    """Of `mmfn.grouped_linear`."""
    return 2 * int(counts_E.sum()) * weight_EFD.shape[1] * weight_EFD.shape[2]


def grouped_grad(dy_RF: Tensor, x_RD: Tensor, counts_E: Tensor) -> int:
    """Of `mmfn.grouped_linear_grad`."""
    return 2 * int(counts_E.sum()) * dy_RF.shape[1] * x_RD.shape[1]


_aten, _mmfn = torch.ops.aten, torch.ops.mmfn
_TABLE: dict[Any, Callable[..., int]] = {
    _aten.mm: product,
    _aten.mv: lambda a, b, **_: 2 * prod(a.shape),
    _aten.bmm: product,
    _aten.addmm: added_product,
    _aten.addmm_: added_product,
    _aten.baddbmm: added_product,
    _aten._scaled_dot_product_flash_attention_for_cpu: attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_grad,
    _mmfn.attention: packed_attention,
    _mmfn.attention_grad: packed_attention_grad,
    _mmfn.grouped_linear: grouped,
    _mmfn.grouped_linear_grad: grouped_grad,
}
