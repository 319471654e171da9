"""RMS normalisation by torch's fused kernels for GPUs. Legend: D width, behind any leading dims."""

from typing import Any

import torch
from torch import Tensor

from mmfn.dtypes import wide
from mmfn.ops import norm
from mmfn.ops.custom import Context, operator
from mmfn.ops.kernel import Kernel, Whole

_fused = torch.ops.aten._fused_rms_norm
_fused_grad = torch.ops.aten._fused_rms_norm_backward


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`mmfn.ops.norm.rms_norm` in one kernel, which computes in float32 or wider and rounds once.

    So with a weight of x's dtype or narrower it rounds once where the portable form rounds before the weight too, and
    is off by two units in the last place of that at most. With a wider weight (those of `precision`, and 1 + w) x is
    widened to it and numbers are rounded where they are there. In a graph that torch.compile makes it is the formula,
    which is fused with what stands around it. Raises ValueError when the weight is not [D].
    """
    norm.check(x_D, weight_D)
    if torch.compiler.is_compiling():
        return norm.rms_norm_reference(x_D, weight_D, eps)
    y_D: Tensor = _norm(x_D, weight_D, eps)
    return y_D


def _forward(x_D: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x_D.dtype, weight_D.dtype)  # the kernel has one for both
    y_D, rstd_1 = _fused(x_D.to(dtype), weight_D.shape, weight_D.to(dtype), eps)
    return y_D.to(x_D.dtype), rstd_1


def _backward(dy_D: Tensor, x_D: Tensor, weight_D: Tensor, rstd_1: Tensor, needs_dw: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight; without `needs_dw`, of a frozen one, the kernel for that is not started."""
    if x_D.numel() == 0:
        return torch.zeros_like(x_D), torch.zeros_like(weight_D) if needs_dw else weight_D.new_empty(0)
    dtype = torch.promote_types(x_D.dtype, weight_D.dtype)
    rows = dy_D.to(dtype).contiguous(), x_D.to(dtype).contiguous()
    dx_D, dw_D = _fused_grad(*rows, weight_D.shape, rstd_1, weight_D.to(dtype), [True, needs_dw])
    return dx_D.to(x_D.dtype), dw_D.to(weight_D.dtype) if needs_dw else weight_D.new_empty(0)


def _forward_fake(x_D: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x_D.new_empty(x_D.shape), x_D.new_empty(*x_D.shape[:-1], 1, dtype=wide(x_D.dtype, weight_D.dtype))


def _backward_fake(
    dy_D: Tensor, x_D: Tensor, weight_D: Tensor, rstd_1: Tensor, needs_dw: bool
) -> tuple[Tensor, Tensor]:
    return x_D.new_empty(x_D.shape), weight_D.new_empty(weight_D.shape if needs_dw else 0)


def _forward_held(x_D: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x and y in the weight's dtype, where that is wider."""
    held = _widened(x_D, weight_D, 2)
    out = _forward_fake(x_D, weight_D, eps)
    del held
    return out


def _backward_held(
    dy_D: Tensor, x_D: Tensor, weight_D: Tensor, rstd_1: Tensor, needs_dw: bool
) -> tuple[Tensor, Tensor]:
    """x, dy and dx likewise."""
    held = _widened(x_D, weight_D, 3)
    out = _backward_fake(dy_D, x_D, weight_D, rstd_1, needs_dw)
    del held
    return out


def _widened(x_D: Tensor, weight_D: Tensor, num: int) -> list[Tensor]:
    dtype = torch.promote_types(x_D.dtype, weight_D.dtype)
    return [x_D.new_empty(x_D.shape, dtype=dtype) for _ in range(num if dtype != x_D.dtype else 0)]


def _save(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2], output[1])


def _gradient(ctx: Context, dy_D: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy_D is None:
        return None, None, None
    needs_dx, needs_dw, _eps = ctx.needs_input_grad
    dx_D, dw_D = NORM_GRAD(dy_D, *ctx.saved_tensors, needs_dw)
    return dx_D if needs_dx else None, dw_D if needs_dw else None, None


NORM = operator("mmfn::fused_rms_norm", _forward, _forward_fake, is_whole=True)
NORM_GRAD = operator("mmfn::fused_rms_norm_grad", _backward, _backward_fake, is_whole=True)
_norm = NORM.with_gradient(_save, _gradient)
KERNEL = Kernel(rms_norm, operators={NORM.name: Whole(_forward_held), NORM_GRAD.name: Whole(_backward_held)})
