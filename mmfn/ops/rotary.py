"""Rotary position embedding. Legend: T tokens, H heads, C channels of a head, R rotated channel pairs."""

import torch
from torch import Tensor


def rotary(x_THC: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + R) of the first 2R channels; the rest pass through."""
    return rotary_reference(x_THC, cos_TR, sin_TR)


def rotary_reference(x_THC: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """`rotary` as two halves and a cat."""
    R = cos_TR.shape[-1]
    wide = torch.promote_types(x_THC.dtype, cos_TR.dtype)
    a_THR, b_THR, rest_THC = x_THC.to(wide).split([R, R, x_THC.shape[-1] - 2 * R], dim=-1)
    cos_T1R, sin_T1R = cos_TR[:, None], sin_TR[:, None]
    turned = [a_THR * cos_T1R - b_THR * sin_T1R, b_THR * cos_T1R + a_THR * sin_T1R, rest_THC]
    return torch.cat(turned, dim=-1).to(x_THC.dtype)
