"""Experts by `npu_grouped_matmul`, which has no gradient of its own: it is written here, as two more of its calls.

    y = x @ w_e.T       [x], [w.T]      rows grouped (group_type 0), one output (split_item 2)
    dx = dy @ w_e       [dy], [w]       the same
    dw_e = dy_e.T @ x_e [dy.T], [x]     the summed dim grouped (group_type 2), one output (split_item 3)

Groups are told by where they end (group_list_type 0), and the last one has to end with the rows: it takes in the
padding behind the last expert's. So padding enters as zeros, and comes out so, forward and backward.

Legend: R routed rows, E experts, D width, F feed-forward width (of `grouped_linear`: widths in and out).
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfn.ops import experts as portable
from mmfn.ops.custom import Context, function
from mmfn.ops.kernel import Operators
from mmfn.ops.npu.activation import SWIGLU, swiglu_halves
from mmfn.ops.npu.limits import LIMITS, Limits
from mmfn.tree import Tree

ROWS, SUMMED = 0, 2  # group types
ENDS = 0  # kind of list


def experts(x_RD: Tensor, counts_E: Tensor, weights: Tree, *, limits: Limits = LIMITS) -> Tensor:
    """`mmfn.ops.experts.experts` with counts that stay on the device.

    Raises ValueError as the portable one does, and beyond the limits of the operator.
    """
    R = x_RD.shape[0]
    is_real_R1 = (torch.arange(R, device=x_RD.device) < counts_E.sum())[:, None]
    ends_E = F.pad(counts_E[:-1].cumsum(0), (0, 1), value=R)
    product = partial(grouped_linear, counts_E=counts_E, ends_E=ends_E, limits=limits)
    gate_up_RF = portable.adapted(product, _real_rows(x_RD, is_real_R1), weights, "gate_up")
    y_RD = portable.adapted(product, swiglu_halves(gate_up_RF, limits=limits), weights, "down")
    out_RD: Tensor = _real_gradient(y_RD, is_real_R1)
    return out_RD


def grouped_linear(x_RD: Tensor, weight_EFD: Tensor, counts_E: Tensor, ends_E: Tensor, *, limits: Limits) -> Tensor:
    """`y_RF[r] = weight_EFD[e] @ x_RD[r]` where row r is expert e's, the last expert's where it is none's."""
    portable.check(x_RD, weight_EFD, counts_E)
    E, F_, D = weight_EFD.shape
    limits.check("experts", x_RD, ("experts", E, limits.experts), ("channels", max(F_, D), limits.width))
    y_RF: Tensor = _product(x_RD, weight_EFD, counts_E, ends_E)
    return y_RF


def _multiply(x: Tensor, weight: Tensor, ends_E: Tensor, group_type: int, split_item: int) -> Tensor:
    """The operator, for one tensor of rows, one of weights, one of results."""
    y: Tensor = torch.ops.npu.npu_grouped_matmul(
        [x], [weight], group_list=ends_E, split_item=split_item, group_type=group_type, group_list_type=ENDS
    )[0]
    return y


def _forward(ctx: Context, x_RD: Tensor, weight_EFD: Tensor, counts_E: Tensor, ends_E: Tensor) -> Tensor:
    ctx.save_for_backward(x_RD, weight_EFD, counts_E, ends_E)
    return _multiply(x_RD, weight_EFD.transpose(1, 2), ends_E, ROWS, 2)


def _backward(ctx: Context, dy_RF: Tensor) -> tuple[Tensor | None, ...]:
    x_RD, weight_EFD, counts_E, ends_E = ctx.saved_tensors
    needs_dx, needs_dw, *_ = ctx.needs_input_grad
    dy_RF = dy_RF.contiguous()
    dx_RD = _multiply(dy_RF, weight_EFD, ends_E, ROWS, 2) if needs_dx else None
    dw_EFD = weight_grad(dy_RF, x_RD, counts_E, ends_E) if needs_dw else None
    return dx_RD, dw_EFD, None, None


def weight_grad(dy_RF: Tensor, x_RD: Tensor, counts_E: Tensor, ends_E: Tensor) -> Tensor:
    """The gradient [E, F, D] of the weight, of contiguous rows."""
    dw_EFD = _multiply(dy_RF.t(), x_RD, ends_E, SUMMED, 3)
    return dw_EFD.masked_fill_((counts_E == 0)[:, None, None], 0)  # no document says what it is without rows


def _zero_padding(ctx: Context, x_RD: Tensor, is_real_R1: Tensor) -> Tensor:
    return torch.where(is_real_R1, x_RD, 0.0)


def _same_gradient(ctx: Context, dx_RD: Tensor) -> tuple[Tensor, None]:
    return dx_RD, None  # zero in padding already: what it was computed from is


def _same_rows(ctx: Context, y_RD: Tensor, is_real_R1: Tensor) -> Tensor:
    ctx.save_for_backward(is_real_R1)
    return y_RD.view_as(y_RD)


def _zero_gradient(ctx: Context, dy_RD: Tensor) -> tuple[Tensor, None]:
    return torch.where(ctx.saved_tensors[0], dy_RD, 0.0), None


def _flops(x: list[Tensor], weight: list[Tensor], **_: Any) -> int:
    """All rows meet a weight, padding too; of the gradient of weights, all meet a row."""
    rows, depth = x[0].shape
    return 2 * rows * depth * weight[0].shape[-1]


_product = function(_forward, _backward)
_real_rows = function(_zero_padding, _same_gradient)
_real_gradient = function(_same_rows, _zero_gradient)
RESULTS = ("npu::npu_grouped_matmul",)
OPERATORS: Operators = {**dict.fromkeys(RESULTS, _flops), **SWIGLU}
