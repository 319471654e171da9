"""Packed attention and its blocks by the FlashAttention 2 kernels of the package flash-attn.

bfloat16 or float16, C a multiple of 8 up to 256; else ValueError. Its gradient gives the same bits each time where
torch is told to (`train.deterministic`).

Legend: T queries, S keys, H query heads, K kv heads, C channels, N segments.
"""

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from mmfn.ops.packages.package import Package, Refusal, Span
from mmfn.ops.varlen import check_kernel, grad_workspace, varlen

MODULE = "flash_attn.flash_attn_interface"
NO_WINDOW = (-1, -1)
DEFAULTS: dict[str, Any] = {"softcap": 0.0, "alibi_slopes": None}


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
    (T, H, C), (left, right) = q_THC.shape, NO_WINDOW
    if q_THC.is_meta:
        return torch.empty_like(q_THC), q_THC.new_empty(H, T, dtype=torch.float32)
    o_THC, lse_HT, *_ = import_module(MODULE)._flash_attn_varlen_forward(
        q_THC,
        k_SKC,
        v_SKC,
        offsets_N,
        key_offsets_N,
        longest,
        longest_key,
        dropout_p=0.0,
        softmax_scale=C**-0.5,
        causal=is_causal,
        window_size_left=left,
        window_size_right=right,
        **DEFAULTS,
    )
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
    dq_THC, dk_SKC, dv_SKC = map(torch.empty_like, (q_THC, k_SKC, v_SKC))
    (left, right), scale = NO_WINDOW, q_THC.shape[2] ** -0.5
    if q_THC.is_meta:
        grad_workspace(q_THC, k_SKC, offsets_N)
        return dq_THC, dk_SKC, dv_SKC
    import_module(MODULE)._flash_attn_varlen_backward(
        do_THC,
        q_THC,
        k_SKC,
        v_SKC,
        o_THC,
        lse_HT,
        dq_THC,
        dk_SKC,
        dv_SKC,
        offsets_N,
        key_offsets_N,
        longest,
        longest_key,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=is_causal,
        window_size_left=left,
        window_size_right=right,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **DEFAULTS,
    )
    return dq_THC, dk_SKC, dv_SKC


check = partial(check_kernel, owner="flash-attn", cure="remove 'flash-attn' from model.kernel_packages")
VARLEN = varlen("mmfn::flash_attn", _attend, _attend_grad, check)

PACKAGE = Package(
    name="flash-attn",
    distribution="flash-attn",
    module=MODULE,
    checked=Span((2, 7), (2, 9)),
    needs={"cuda": ()},
    refusals=(
        Refusal(
            distribution="flash-attn",
            versions=Span((0,), (2, 7)),
            reason="its functions take windows as pairs and are no operators of torch",
            cure="pip install 'flash-attn>=2.7,<2.9'",
        ),
    ),
    kernels=lambda: VARLEN.kernels,
)
