"""Floating-point operations of torch operators, from the shapes of what they are given.

A product of [m, k] and [k, n] counts 2 m k n; attention counts its two products over the pairs of a query and a key it
sees, half of a square under causality (five products in the backward, one of them a recomputation); all else counts
nothing. Each segment of packed attention counts by its own length, whether it is an operator of its own or all segments
are one.

There is one registry, torch's (`torch.utils.flop_counter`): operators of this package register there, so that
`FlopCounterMode` counts them too. `OWN` stands before it: operators that torch lacks, causal squares, which torch
counts whole, and products, whose formula there takes longer than a plan takes for the product. An operator of torch
whose kernel has buffers of its own says there what they are, as one of this package does (`Whole`).
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from mmfn.dtypes import wide
from mmfn.ops.kernel import Formula, Operators, Whole, declaration

FORMULAS = {
    "products": "2 m k n",
    "attention": "4 H C pairs, backward 10 H C pairs",
    "pairs": "queries * keys of a segment, with a causal mask queries * (queries + 1) / 2",
}
SPACES = frozenset({"aten", "prim", "prims", "c10d", "profiler"})  # of operators that count nothing if unknown
MOVES = frozenset({"all_to_all", "counted_empty", "fetch", "host_copy"})  # of programs of this package: they only copy


def register(operators: Mapping[str, Formula]) -> Operators:
    """Tell torch the FLOPs of operators of this package; returns them."""
    for name, formula in operators.items():
        register_flop_formula(packet(name), get_raw=True)(formula)
    return operators


def packet(name: str) -> Any:
    """The operator of a name such as "mmfn::attention", or None where this torch has none."""
    space, operator = name.split("::")
    return getattr(getattr(torch.ops, space), operator, None)


def formula_of(func: Any, declared: Mapping[Any, Formula | None]) -> Formula | None:
    """The formula of an operator, None where it counts nothing. `declared`: what a table declares (`of_table`).

    It is called with the operator's arguments and, as `out_val`, its result. Raises ValueError for an operator that
    neither torch nor this package brings and no op declares.
    """
    key = func.overloadpacket
    formula: Formula | None = declared[key] if key in declared else OWN.get(key) or flop_registry.get(key)
    is_known = formula is not None or key in declared or func.namespace in SPACES or func.namespace.startswith("_")
    is_known = is_known or (func.namespace == "mmfn" and func._schema.name.partition("::")[2] in MOVES)
    if not is_known:
        raise ValueError(
            f"no op of the table declares the operator {func.name()}, so its FLOPs are unknown; add it to the "
            "operators of the Kernel that runs it, with None if it multiplies no matrices"
        )
    return formula


def of_table(kernels: Mapping[str, Callable[..., Any]]) -> dict[Any, Formula | None]:
    """Formulas by operator that the ops of a table declare. Raises ValueError for an op that declares nothing."""
    found = [declaration(name, op).operators for name, op in kernels.items()]
    return {packet(name): formula for operators in found for name, formula in operators.items()}


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


def _attention_buffers(q_BHLC: Tensor, k_BHSC: Tensor, *_: Any) -> None:
    """What that operator's kernel holds: of a block the scores, their largest and their sums, and the output.

    Each thread has such buffers. Those of one are counted, so that a plan is the same on every machine: a block is
    never larger than 256 x 512, and so they matter in small models alone. Source: `FlashAttentionKernel.cpp` of torch.
    """
    L, S = _block(q_BHLC, k_BHSC)
    scores = q_BHLC.new_empty(L * (S + 2 + q_BHLC.shape[3]), dtype=wide(q_BHLC.dtype))
    if scores.dtype != q_BHLC.dtype:  # probabilities, as the products take them
        q_BHLC.new_empty(L * S)


def _attention_grad_buffers(do_BHLC: Tensor, q_BHLC: Tensor, k_BHSC: Tensor, *_: Any) -> None:
    """The same of the backward: the output's gradient, heads inside of tokens, and of a block scores, their gradients
    and a sum for each query."""
    L, S = _block(q_BHLC, k_BHSC)
    dtype = wide(q_BHLC.dtype)
    do_BLHC = do_BHLC.transpose(1, 2).contiguous()
    scores, sums = q_BHLC.new_empty(2 * L * S, dtype=dtype), q_BHLC.new_empty(L, dtype=dtype)
    if dtype != q_BHLC.dtype:
        q_BHLC.new_empty(2 * L * S)
    del do_BLHC, scores, sums


def _block(q_BHLC: Tensor, k_BHSC: Tensor) -> tuple[int, int]:
    """How many queries and keys the CPU's kernel takes at a time."""
    L, S = q_BHLC.shape[2], k_BHSC.shape[2]
    return min(L, 256 if L >= 768 else 64 if L >= 192 else 32), min(S, 512)


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
    **_: Any,
) -> int:
    """Of `mmfn::attention`. Keys with offsets of their own have no causal mask."""
    lengths_N = offsets_N.diff().long()  # whose squares int32 cannot hold
    keys_N = lengths_N if key_offsets_N is None else key_offsets_N.diff().long()
    pairs_N = lengths_N * (lengths_N + 1) // 2 if is_causal else lengths_N * keys_N
    return 4 * q_THC.shape[1] * q_THC.shape[2] * int(pairs_N.sum())


def packed_attention_grad(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *segments: Any, **_: Any
) -> int:
    """Of `mmfn::attention_grad`: five products for two."""
    return 5 * packed_attention(q, k, v, *segments) // 2


def grouped(x_RD: Tensor, weight_EFD: Tensor, counts_E: Tensor, **_: Any) -> int:
    """Of `mmfn::grouped_linear`."""
    return 2 * int(counts_E.sum()) * weight_EFD.shape[1] * weight_EFD.shape[2]


def grouped_grad(dy_RF: Tensor, x_RD: Tensor, counts_E: Tensor, **_: Any) -> int:
    """Of `mmfn::grouped_linear_grad`."""
    return 2 * int(counts_E.sum()) * dy_RF.shape[1] * x_RD.shape[1]


def _product(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * prod(a.shape) * b.shape[-1]


def _added_product(_: Tensor, a: Tensor, b: Tensor, **__: Any) -> int:
    return _product(a, b)


_aten = torch.ops.aten
OWN: dict[Any, Callable[..., int]] = {
    _aten.mv: lambda a, b, **_: 2 * prod(a.shape),
    _aten.mm: _product,
    _aten.bmm: _product,
    _aten.addmm: _added_product,
    _aten.addmm_: _added_product,
    _aten.baddbmm: _added_product,
    _aten._scaled_dot_product_flash_attention_for_cpu: Whole(_attention_buffers, attention),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: Whole(_attention_grad_buffers, attention_grad),
}
