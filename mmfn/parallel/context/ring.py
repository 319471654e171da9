"""Ring attention: keys and values travel around the ranks of an axis, each rank keeps its queries.

Every segment is cut into 2 * W chunks for W ranks, and rank r holds chunks r and 2W - 1 - r of each: under causality
all ranks have the same work. Its rows are all first chunks, then all second ones, so each half is a packed row of its
own with offsets `offsets_N // (2 * W)`, and no block needs a mask: a half meets another half of keys fully, causally
(its own), or not at all. Legend: T this rank's tokens, H query heads, K kv heads, C channels, N segments.
"""

from typing import Any

import torch
from torch import Tensor

from mmfn.batch import Segments
from mmfn.dtypes import wide
from mmfn.errors import UserError
from mmfn.ops import AttentionBlock, AttentionBlockGrad
from mmfn.ops.attention_block import merge_blocks
from mmfn.parallel.mesh.axis import Axis

SITE = "ring"


def ring_attention(
    q_THC: Tensor,
    k_TKC: Tensor,
    v_TKC: Tensor,
    segments: Segments,
    *,
    is_causal: bool,
    axis: Axis,
    block: AttentionBlock,
    block_grad: AttentionBlockGrad,
) -> Tensor:
    """Packed attention of this rank's queries to the keys of all ranks; o_THC.

    Tokens are in the order of `token_order.ring_order`; `segments`: of the whole row, lengths multiples of 2 * W. The
    forward shifts keys and values W - 1 times, each shift under way while the blocks before it are computed; the
    backward shifts them again, and their gradients W times. Only q, k, v, the merged output and its log-sum-exp are
    saved. Raises ValueError unless `is_causal`.
    Source: Liu et al. 2023 (arXiv:2310.01889); the zig-zag order of Brandon et al. 2023 (arXiv:2311.09431).
    """
    if not is_causal:
        raise UserError("ring attention is causal but got is_causal False; use context_parallel kind 'ulysses'")
    o_THC: Tensor = _Ring.apply(  # type: ignore[no-untyped-call]
        q_THC, k_TKC, v_TKC, segments.offsets_N, segments.host_N, axis, block, block_grad
    )
    return o_THC


def _blocks(index: int, step: int) -> tuple[tuple[int, int, bool], ...]:
    """(half of queries, half of keys, is_causal) to compute while the keys of rank `index - step` are here."""
    if step == 0:
        return (0, 0, True), (1, 0, False), (1, 1, True)
    return (1, 0, False), ((0, 0, False) if step <= index else (1, 1, False))


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_THC: Tensor,
        k_TKC: Tensor,
        v_TKC: Tensor,
        offsets_N: Tensor,
        host_N: Tensor,
        axis: Axis,
        block: AttentionBlock,
        block_grad: AttentionBlockGrad,
    ) -> Tensor:
        half = Segments(offsets_N=offsets_N, host_N=host_N).map(lambda x: x // (2 * axis.size))
        q, dtype = q_THC.chunk(2), wide(q_THC.dtype)
        o = [torch.zeros_like(x, dtype=dtype) for x in q]
        lse = [x.new_full(x.shape[:2], -torch.inf, dtype=dtype) for x in q]
        kv_2TKC = torch.stack([k_TKC, v_TKC])
        for step in range(axis.size):
            coming_2TKC = axis.issue_shift(kv_2TKC, 1, SITE) if step + 1 < axis.size else None
            k, v = (x.chunk(2) for x in kv_2TKC.unbind(0))
            for i, j, is_causal in _blocks(axis.index, step):
                part, part_lse = block(q[i], k[j], v[j], half, is_causal=is_causal)
                o[i], lse[i] = merge_blocks(o[i], lse[i], part, part_lse)
            kv_2TKC = kv_2TKC if coming_2TKC is None else axis.wait(coming_2TKC)
        o_THC = torch.cat(o).to(q_THC.dtype)
        ctx.save_for_backward(q_THC, k_TKC, v_TKC, o_THC, torch.cat(lse), half.offsets_N, half.host_N)
        ctx.axis, ctx.block_grad = axis, block_grad
        return o_THC

    @staticmethod
    def backward(ctx: Any, do_THC: Tensor) -> tuple[Tensor | None, ...]:
        q_THC, k_TKC, v_TKC, o_THC, lse_TH, offsets_N, host_N = ctx.saved_tensors
        axis, half = ctx.axis, Segments(offsets_N=offsets_N, host_N=host_N)
        q, o, lse, do = (x.chunk(2) for x in (q_THC, o_THC, lse_TH, do_THC))
        dq = [torch.zeros_like(x, dtype=lse_TH.dtype) for x in q]
        kv_2TKC = torch.stack([k_TKC, v_TKC])
        dkv_2TKC = torch.zeros_like(kv_2TKC, dtype=lse_TH.dtype)  # travels with the keys, one step behind them
        for step in range(axis.size):
            coming_2TKC = axis.issue_shift(kv_2TKC, 1, SITE) if step + 1 < axis.size else None
            k, v = (x.chunk(2) for x in kv_2TKC.unbind(0))
            dk, dv = (list(x.chunk(2)) for x in dkv_2TKC.unbind(0))
            for i, j, is_causal in _blocks(axis.index, step):
                parts = ctx.block_grad(do[i], q[i], k[j], v[j], o[i], lse[i], half, is_causal=is_causal)
                dq[i], dk[j], dv[j] = dq[i] + parts[0], dk[j] + parts[1], dv[j] + parts[2]
            kv_2TKC = kv_2TKC if coming_2TKC is None else axis.wait(coming_2TKC)
            dkv_2TKC = axis.shift(torch.stack([torch.cat(dk), torch.cat(dv)]), 1, SITE)  # the last one leads home
        dk_TKC, dv_TKC = dkv_2TKC.to(k_TKC.dtype).unbind(0)
        return torch.cat(dq).to(q_THC.dtype), dk_TKC, dv_TKC, None, None, None, None, None
