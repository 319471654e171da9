"""Packed attention and its blocks by the FlashAttention kernels that torch has for GPUs.

bfloat16 or float16, C a multiple of 8 up to 256; else ValueError.

Legend: T queries, S keys, H query heads, K kv heads, C channels, N segments.
"""

from functools import partial

import torch
from torch import Tensor

from mmfn.ops.varlen import check_kernel, grad_workspace, varlen

_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward


def _attend(
    q_THC: Tensor,
    k_SKC: Tensor,
    v_SKC: Tensor,
    offsets_N: Tensor,
    key_offsets_N: Tensor,
    longest: int,
    longest_key: int,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    bounds, scale = (offsets_N, key_offsets_N, longest, longest_key), q_THC.shape[2] ** -0.5
    o_THC, lse_HT, *_ = _forward(q_THC, k_SKC, v_SKC, *bounds, 0.0, is_causal, False, scale=scale)
    return o_THC, lse_HT


def _attend_grad(
    do_THC: Tensor,
    q_THC: Tensor,
    k_SKC: Tensor,
    v_SKC: Tensor,
    o_THC: Tensor,
    lse_HT: Tensor,
    offsets_N: Tensor,
    key_offsets_N: Tensor,
    longest: int,
    longest_key: int,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors, bounds = (do_THC, q_THC, k_SKC, v_SKC, o_THC, lse_HT), (offsets_N, key_offsets_N, longest, longest_key)
    seed = torch.zeros(2, dtype=torch.uint64, device=q_THC.device)  # of dropout, of which there is none
    nothing, scale = q_THC.new_empty(0), q_THC.shape[2] ** -0.5
    held = grad_workspace(q_THC, k_SKC, offsets_N) if q_THC.is_meta else []
    dq_THC, dk_SKC, dv_SKC = _backward(*tensors, *bounds, 0.0, is_causal, seed, nothing, scale=scale)
    del held
    return dq_THC, dk_SKC, dv_SKC


check = partial(check_kernel, owner="the cuda table", cure="use model.kernels=portable")
KERNELS = varlen("mmfn::varlen_attention", _attend, _attend_grad, check).kernels
