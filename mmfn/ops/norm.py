"""RMS and layer normalisation over the last dim. Legend: D width, `...` any leading dims."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x**2) + eps)`, cast to x's dtype, then times the weight."""
    _check(x_D, weight_D)
    return rms_norm_reference(x_D, weight_D, eps)


def rms_norm_reference(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`rms_norm` as it is written in the paper."""
    wide_D = x_D.to(torch.promote_types(x_D.dtype, torch.float32))
    normed_D = wide_D * torch.rsqrt(wide_D.square().mean(-1, keepdim=True) + eps)
    return normed_D.to(x_D.dtype) * weight_D


def layer_norm(x_D: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """`(x - mean) / sqrt(var + eps) * weight + bias` with biased variance."""
    _check(x_D, weight_D)
    return F.layer_norm(x_D, weight_D.shape, weight_D, bias_D, eps)


def layer_norm_reference(x_D: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """`layer_norm` as it is written in the paper."""
    wide_D = x_D.to(torch.promote_types(x_D.dtype, torch.float32))
    centred_D = wide_D - wide_D.mean(-1, keepdim=True)
    normed_D = centred_D * torch.rsqrt(centred_D.square().mean(-1, keepdim=True) + eps)
    return (normed_D * weight_D + bias_D).to(x_D.dtype)


def _check(x_D: Tensor, weight_D: Tensor) -> None:
    if weight_D.shape != x_D.shape[-1:]:
        raise ValueError(
            f"weight has shape {tuple(weight_D.shape)} but x ends in {tuple(x_D.shape[-1:])}; make them equal"
        )
