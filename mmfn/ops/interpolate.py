"""Rows of a table, interpolated: what a position between the places of a learned grid gets.

torch's `embedding_bag` adds up weighted rows without a copy of them; its own gradient is slow, that by another bag over
the places that used a row is not (4,096 patches, 16 taps, width 1,536 on one core: 6 ms forward and 11 ms backward;
tap by tap 166 and 68). Legend: P places, K taps of each, N rows of the table, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfn.dtypes import wide
from mmfn.ops.custom import Context, operator
from mmfn.ops.kernel import Kernel


def interpolate(table_ND: Tensor, rows_PK: Tensor, parts_PK: Tensor) -> Tensor:
    """`y_PD[p] = sum over k of parts_PK[p, k] * table_ND[rows_PK[p, k]]`, in float32 or wider.

    Half of row 1 and half of row 2: `interpolate(table_ND, tensor([[1, 2]]), tensor([[0.5, 0.5]]))`.

    `table_ND`: floating[N, D]. `rows_PK`: int64[P, K]. `parts_PK`: floating[P, K], constants. Taps are added in order,
    and no row of them is copied: beside the result it takes nothing of its size. Result in the wider of float32 and the
    table's dtype. Raises ValueError for shapes that do not fit, or parts that need a gradient.
    Oracle: `interpolate_reference`.
    """
    _check(table_ND, rows_PK, parts_PK)
    dtype = wide(table_ND.dtype)
    y_PD: Tensor = _interpolated(table_ND.to(dtype), rows_PK, parts_PK.to(dtype))
    return y_PD


def interpolate_reference(table_ND: Tensor, rows_PK: Tensor, parts_PK: Tensor) -> Tensor:
    """`interpolate` with all taps at once."""
    _check(table_ND, rows_PK, parts_PK)
    dtype = wide(table_ND.dtype)
    return (table_ND.to(dtype)[rows_PK] * parts_PK[..., None].to(dtype)).sum(1)


def _check(table_ND: Tensor, rows_PK: Tensor, parts_PK: Tensor) -> None:
    if table_ND.ndim != 2 or rows_PK.ndim != 2 or rows_PK.shape != parts_PK.shape:
        raise ValueError(
            f"table_ND {tuple(table_ND.shape)}, rows_PK {tuple(rows_PK.shape)} and parts_PK {tuple(parts_PK.shape)} "
            "must be [N, D] and twice [P, K]"
        )
    if parts_PK.requires_grad:
        raise ValueError("parts_PK requires a gradient but interpolate treats it as constant; detach it")


def _weighted_rows(table_ND: Tensor, rows_PK: Tensor, parts_PK: Tensor) -> Tensor:
    return F.embedding_bag(rows_PK, table_ND, mode="sum", per_sample_weights=parts_PK)


def _weighted_places(dy_PD: Tensor, rows_PK: Tensor, parts_PK: Tensor, num_rows: int) -> Tensor:
    """The gradient of the table: for each row the places that used it, in their order."""
    sorted_R, order_R = rows_PK.flatten().sort(stable=True)
    starts_N = torch.searchsorted(sorted_R, torch.arange(num_rows, device=sorted_R.device))
    places_R, parts_R = order_R // max(1, rows_PK.shape[1]), parts_PK.flatten()[order_R]
    return F.embedding_bag(places_R, dy_PD.contiguous(), starts_N, mode="sum", per_sample_weights=parts_R)


def _save(ctx: Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    table_ND, rows_PK, parts_PK = inputs
    ctx.save_for_backward(rows_PK, parts_PK)
    ctx.settings = table_ND.shape[0]


def _of_table(ctx: Context, dy_PD: Tensor) -> tuple[Tensor | None, ...]:
    return WEIGHTED_PLACES(dy_PD, *ctx.saved_tensors, ctx.settings), None, None


WEIGHTED_ROWS = operator(
    "mmfn::weighted_rows", _weighted_rows, lambda table, rows, parts: table.new_empty(rows.shape[0], table.shape[1])
)
WEIGHTED_PLACES = operator(
    "mmfn::weighted_places", _weighted_places, lambda dy, rows, parts, n: dy.new_empty(n, dy.shape[1])
)
_interpolated = WEIGHTED_ROWS.with_gradient(_save, _of_table)
KERNEL = Kernel(
    interpolate, operators=dict.fromkeys((WEIGHTED_ROWS.name, WEIGHTED_PLACES.name)), results=(WEIGHTED_ROWS.name,)
)
