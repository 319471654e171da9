"""RMS and layer normalisation over the last dim.

`rms_norm` has no fused CPU kernel in torch, so eager execution enters a hand-written Function: 0.3 to 0.8 of the plain
formula's time forward and backward, and one saved tensor besides x. A compiler fuses the plain formula better than
that. `layer_norm` has a fused kernel. Legend: D width, behind any leading dims.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfn.dtypes import wide
from mmfn.ops.custom import Context, function
from mmfn.ops.eager import is_eager


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x**2) + eps)` in float32 or wider, cast to x's dtype, then times the weight.

    `x_D`: floating[..., D]. `weight_D`: floating[D]. Returns x's shape and dtype. A weight wider than x is multiplied
    with before the cast. Raises ValueError when the weight is not [D]. Source: Zhang and Sennrich 2019
    (arXiv:1910.07467), with the casts of text models in transformers 5.23, whose weight is never wider than x.
    """
    check(x_D, weight_D)
    if is_eager(x_D):
        y_D: Tensor = _eager_rms_norm(x_D, weight_D, eps)
        return y_D
    return rms_norm_reference(x_D, weight_D, eps)


def rms_norm_reference(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`rms_norm` as it is written in the paper."""
    wide_D = x_D.to(wide(x_D.dtype))
    normed_D = wide_D * torch.rsqrt(wide_D.square().mean(-1, keepdim=True) + eps)
    return _weighted(normed_D, weight_D, x_D.dtype)


def rms_norm_gated(x_D: Tensor, gate_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`rms_norm(x, weight, eps) * silu(gate)`, the product and silu in float32 or wider; in x's shape and dtype.

    Shapes and dtypes as in `rms_norm`; `gate_D` as x. Raises ValueError for other shapes. Source: the gated norm of
    Gated DeltaNet layers in transformers 5.23, casts included.
    """
    check_gated(x_D, gate_D, weight_D)
    if is_eager(x_D):
        y_D: Tensor = _eager_rms_norm_gated(x_D, gate_D, weight_D, eps)
        return y_D
    return rms_norm_gated_reference(x_D, gate_D, weight_D, eps)


def rms_norm_gated_reference(x_D: Tensor, gate_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`rms_norm_gated` as it is written there."""
    check_gated(x_D, gate_D, weight_D)
    wide_D = x_D.to(wide(x_D.dtype))
    normed_D = (wide_D * torch.rsqrt(wide_D.square().mean(-1, keepdim=True) + eps)).to(x_D.dtype) * weight_D
    return (normed_D * F.silu(gate_D.to(wide(gate_D.dtype)))).to(x_D.dtype)


def layer_norm(x_D: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """`(x - mean) / sqrt(variance + eps) * weight + bias` with the biased variance, in float32 or wider.

    `x_D`: floating[..., D]. `weight_D`, `bias_D`: [D] of x's dtype or wider. Returns x's shape and dtype. Raises
    ValueError when weight or bias is not [D]. Source: Ba et al. 2016 (arXiv:1607.06450); `torch.nn.LayerNorm`.
    """
    check(x_D, weight_D)
    check(x_D, bias_D)
    dtype = torch.promote_types(weight_D.dtype, bias_D.dtype)  # kernels of accelerators take one dtype
    return F.layer_norm(x_D.to(dtype), weight_D.shape, weight_D.to(dtype), bias_D.to(dtype), eps).to(x_D.dtype)


def layer_norm_reference(x_D: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """`layer_norm` as it is written in the paper."""
    wide_D = x_D.to(wide(x_D.dtype))
    centred_D = wide_D - wide_D.mean(-1, keepdim=True)
    normed_D = centred_D * torch.rsqrt(centred_D.square().mean(-1, keepdim=True) + eps)
    return (normed_D * weight_D + bias_D).to(x_D.dtype)


def check(x_D: Tensor, weight_D: Tensor) -> None:
    """Raise ValueError unless a weight or bias is [D]."""
    if x_D.ndim < 1 or weight_D.shape != x_D.shape[-1:]:
        raise ValueError(
            f"weight or bias has shape {tuple(weight_D.shape)} but x has {tuple(x_D.shape)}; give it x's last dim"
        )


def check_gated(x_D: Tensor, gate_D: Tensor, weight_D: Tensor) -> None:
    """Raise ValueError unless the weight is [D] and the gate of x's shape."""
    check(x_D, weight_D)
    if gate_D.shape != x_D.shape:
        raise ValueError(f"the gate has shape {tuple(gate_D.shape)} but x has {tuple(x_D.shape)}; make them agree")


def _weighted(normed_D: Tensor, weight_D: Tensor, dtype: torch.dtype) -> Tensor:
    """`normed * weight` in `dtype`; multiplied in it, or in the weight's where that is wider."""
    return (normed_D.to(torch.promote_types(dtype, weight_D.dtype)) * weight_D).to(dtype)


def _rms_norm(ctx: Context, x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    wide_D = x_D.to(wide(x_D.dtype))
    norm_1 = torch.linalg.vector_norm(wide_D, dim=-1, keepdim=True)
    rstd_1 = norm_1.square_().div_(x_D.shape[-1]).add_(eps).rsqrt_()
    ctx.save_for_backward(x_D, weight_D, rstd_1)
    normed_D = wide_D * rstd_1
    if weight_D.dtype != x_D.dtype:
        return _weighted(normed_D, weight_D, x_D.dtype)
    y_D: Tensor = normed_D.to(x_D.dtype).mul_(weight_D)
    return y_D


def _rms_norm_grad(ctx: Context, dy_D: Tensor) -> tuple[Tensor | None, ...]:
    """With n = x * rstd: dx = (dy * w - n * mean(dy * w * n)) * rstd and dw = sum(dy * n)."""
    x_D, weight_D, rstd_1 = ctx.saved_tensors
    needs_dx, needs_dw, _ = ctx.needs_input_grad
    normed_D = x_D * rstd_1
    product_D = dy_D * normed_D
    weight_wide_D = weight_D.to(product_D.dtype)
    dw_D = product_D.reshape(-1, x_D.shape[-1]).sum(0).to(weight_D.dtype) if needs_dw else None
    if not needs_dx:
        return None, dw_D, None
    mean_1 = torch.matmul(product_D, weight_wide_D).div_(-x_D.shape[-1])[..., None]
    dx_D = torch.mul(dy_D, weight_wide_D, out=product_D).addcmul_(normed_D, mean_1).mul_(rstd_1)
    return dx_D.to(x_D.dtype), dw_D, None


_eager_rms_norm = function(_rms_norm, _rms_norm_grad)


def _rms_norm_gated(ctx: Context, x_D: Tensor, gate_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    wide_D = x_D.to(wide(x_D.dtype))
    norm_1 = torch.linalg.vector_norm(wide_D, dim=-1, keepdim=True)
    rstd_1 = norm_1.square_().div_(x_D.shape[-1]).add_(eps).rsqrt_()
    ctx.save_for_backward(x_D, gate_D, weight_D, rstd_1)
    normed_D = (wide_D * rstd_1).to(x_D.dtype) * weight_D
    return F.silu(gate_D.to(wide(gate_D.dtype))).mul_(normed_D).to(x_D.dtype)


def _rms_norm_gated_grad(ctx: Context, dy_D: Tensor) -> tuple[Tensor | None, ...]:
    """That of `rms_norm` with dy silu(gate) for dy, and dgate = dy n w silu'(gate)."""
    x_D, gate_D, weight_D, rstd_1 = ctx.saved_tensors
    _, needs_dgate, needs_dw, _ = ctx.needs_input_grad
    D, dtype = x_D.shape[-1], wide(x_D.dtype, gate_D.dtype)
    gate_wide_D, weight_wide_D = gate_D.to(dtype), weight_D.to(dtype)
    normed_D = x_D * rstd_1
    dnormed_D = F.silu(gate_wide_D).mul_(dy_D)
    dgate_D = None
    if needs_dgate:
        dgate_D = (dy_D * normed_D).mul_(weight_wide_D)
        dgate_D = torch.ops.aten.silu_backward(dgate_D, gate_wide_D).to(gate_D.dtype)
    dw_D = None
    if needs_dw:
        dw_D = (dnormed_D * normed_D).reshape(-1, D).sum(0).to(weight_D.dtype)
    dnormed_D.mul_(weight_wide_D)
    mean_1 = (dnormed_D * normed_D).mean(-1, keepdim=True)
    dx_D = dnormed_D.addcmul_(normed_D, mean_1, value=-1).mul_(rstd_1).to(x_D.dtype)
    return dx_D, dgate_D, dw_D, None


_eager_rms_norm_gated = function(_rms_norm_gated, _rms_norm_gated_grad)
