"""Rotary position embedding by `npu_rotary_mul`, half mode: `x * cos + [-second, first] * sin`.

The backward is the turn by the opposite angle, the same operator again: the operator's own gradient would keep x.
Legend: T tokens, H heads, C channels of a head, R rotated channel pairs.
"""

import torch
from torch import Tensor

from mmfn.ops import rotary as portable
from mmfn.ops.custom import Context, function
from mmfn.ops.kernel import Operators
from mmfn.ops.npu.limits import LIMITS, Limits


def rotary(x_THC: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, limits: Limits = LIMITS) -> Tensor:
    """`mmfn.ops.rotary.rotary`; channels behind the 2R turned ones are copied.

    Raises ValueError as the portable one does, and beyond the limits of the operator.
    """
    portable.check(x_THC, cos_TR, sin_TR)
    sizes = (("heads", x_THC.shape[1], limits.rotary_heads), ("channels", 2 * cos_TR.shape[1], limits.rotary_channels))
    limits.check("rotary", x_THC, *sizes)
    y_THC: Tensor = _rotary(x_THC, cos_TR, sin_TR)
    return y_THC


def _turn(x_THC: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """In the wider dtype of x and the angles, as one row of a batch: [1, T, H, 2R] with angles [1, T, 1, 2R]."""
    size, dtype = 2 * cos_TR.shape[1], torch.promote_types(x_THC.dtype, cos_TR.dtype)
    cos_1T1C, sin_1T1C = (torch.cat([x, x], -1).to(dtype)[None, :, None] for x in (cos_TR, sin_TR))
    x_1THC = x_THC[..., :size].to(dtype)[None]
    y_THC: Tensor = torch.ops.npu.npu_rotary_mul(x_1THC, cos_1T1C, sin_1T1C, "half")[0].to(x_THC.dtype)
    return y_THC if size == x_THC.shape[-1] else torch.cat([y_THC, x_THC[..., size:]], -1)


def _forward(ctx: Context, x_THC: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    ctx.save_for_backward(cos_TR, sin_TR)
    return _turn(x_THC, cos_TR, sin_TR)


def _backward(ctx: Context, dy_THC: Tensor) -> tuple[Tensor | None, ...]:
    cos_TR, sin_TR = ctx.saved_tensors
    return _turn(dy_THC, cos_TR, -sin_TR), None, None


_rotary = function(_forward, _backward)
OPERATORS: Operators = {"npu::npu_rotary_mul": None}
