"""Blocks of attention by `npu_fusion_attention`, and their gradients by `npu_fusion_attention_grad`.

The operator keeps of each row of scores the maximum m and the sum s of `exp(score - m)`; log-sum-exp is `m + log(s)`.
Its gradient computes probabilities as `exp(score - m) / s` from any m and s of that log-sum-exp: given that of all
keys, not of the block, as `m = lse, s = 1`, gradients of blocks add up to those of the whole.

Legend: T queries, S keys, H query heads, K kv heads, C channels.
"""

import torch
from torch import Tensor

from mmfn.batch import Segments
from mmfn.dtypes import wide
from mmfn.ops import attention_block as portable
from mmfn.ops.npu import attention
from mmfn.ops.npu.limits import LIMITS, STATISTICS, Limits


def attention_block(
    q_THC: Tensor,
    k_SKC: Tensor,
    v_SKC: Tensor,
    segments: Segments,
    keys: Segments | None = None,
    *,
    is_causal: bool,
    limits: Limits = LIMITS,
) -> tuple[Tensor, Tensor]:
    """`mmfn.ops.attention_block.attention_block`: output and log-sum-exp, without a gradient.

    Raises ValueError as that does, and beyond the limits of the operator.
    """
    _check(q_THC, k_SKC, v_SKC, segments, keys, is_causal, limits)
    outs, sums = [], []
    for rows, others in attention.spans(segments, keys, q_THC, k_SKC, limits):
        qkv = rows.of(q_THC.detach()), others.of(k_SKC.detach()), others.of(v_SKC.detach())
        o_THC, most_TH8, sum_TH8, *_ = attention.call(*qkv, rows.ends, others.ends, is_causal=is_causal)
        outs.append((rows.first, o_THC))
        sums.append((rows.first, most_TH8[..., 0] + sum_TH8[..., 0].log()))
    T, no_lse_TH = q_THC.shape[0], q_THC.new_empty((0, q_THC.shape[1]), dtype=wide(q_THC.dtype))
    return attention.laid(outs, T, 0.0, q_THC), attention.laid(sums, T, -torch.inf, no_lse_TH)


def attention_block_grad(
    do_THC: Tensor,
    q_THC: Tensor,
    k_SKC: Tensor,
    v_SKC: Tensor,
    o_THC: Tensor,
    lse_TH: Tensor,
    segments: Segments,
    keys: Segments | None = None,
    *,
    is_causal: bool,
    limits: Limits = LIMITS,
) -> tuple[Tensor, Tensor, Tensor]:
    """`mmfn.ops.attention_block.attention_block_grad`: gradients, with the output and log-sum-exp of all keys.

    Raises ValueError as that does, and beyond the limits of the operator.
    """
    _check(q_THC, k_SKC, v_SKC, segments, keys, is_causal, limits)
    grads: list[list[tuple[int, Tensor]]] = [[], [], []]
    for rows, others in attention.spans(segments, keys, q_THC, k_SKC, limits):
        q, do, o, lse = (rows.of(x) for x in (q_THC, do_THC, o_THC, lse_TH))
        lse_TH8 = lse[..., None].repeat(1, 1, STATISTICS)
        found = torch.ops.npu.npu_fusion_attention_grad(
            q,
            others.of(k_SKC),
            others.of(v_SKC),
            do,
            q.shape[1],
            "TND",
            atten_mask=attention.causal_mask(q) if is_causal else None,
            softmax_max=lse_TH8,
            softmax_sum=torch.ones_like(lse_TH8),
            attention_in=o,
            scale_value=q.shape[2] ** -0.5,
            actual_seq_qlen=rows.ends,
            actual_seq_kvlen=others.ends,
            sparse_mode=attention.BOTTOM_RIGHT if is_causal else attention.ALL_PAIRS,
            softmax_layout="TND",
        )
        for parts, first, part in zip(grads, (rows.first, others.first, others.first), found, strict=False):
            parts.append((first, part))
    dq_THC, dk_SKC, dv_SKC = (
        attention.laid(parts, x.shape[0], 0.0, x) for parts, x in zip(grads, (q_THC, k_SKC, v_SKC), strict=True)
    )
    return dq_THC, dk_SKC, dv_SKC


def _check(
    q_THC: Tensor,
    k_SKC: Tensor,
    v_SKC: Tensor,
    segments: Segments,
    keys: Segments | None,
    is_causal: bool,
    limits: Limits,
) -> None:
    attention.check(q_THC, k_SKC, v_SKC, segments, keys or segments, limits)
    portable.check_keys(q_THC, k_SKC, segments, keys, is_causal)
