"""Attention with gathered keys: all keys and values come to every rank, queries stay. Any segment lengths.

The whole row is cut into 2 * W chunks for W ranks, and rank r holds chunks r and 2W - 1 - r, which balances causal
work where segments are long. A chunk's queries meet the chunk's own keys (packed, causal), and those of the segment
that began before the chunk also its earlier keys (one full block); the two merge by their log-sum-exp, and no mask
over all pairs is ever made. Legend: T this rank's tokens, S tokens of all ranks, H query heads, K kv heads, C channels.
"""

from typing import Any

import torch
from torch import Tensor

from mmfn.batch import Segments
from mmfn.errors import UserError
from mmfn.ops import AttentionBlock, AttentionBlockGrad
from mmfn.ops.attention_block import merge_blocks
from mmfn.parallel.context.token_order import cut, pieces
from mmfn.parallel.mesh.axis import Axis, all_gather

SITE = "keys"


def key_gather_attention(
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

    Tokens are in the order of `token_order.chunk_order`; `segments`: those of the whole row. One all-gather in the
    forward, one reduce-scatter in the backward; the gathered keys and values are saved (remat drops them). Raises
    ValueError unless `is_causal`. Source: the context parallelism of Llama 3 (arXiv:2407.21783, section 3.3.2).
    """
    if not is_causal:
        raise UserError("attention to gathered keys is causal but got is_causal False; use kind 'ulysses'")
    kv_S2KC = all_gather(torch.stack([k_TKC, v_TKC], 1), axis, SITE)
    first_W, second_W = kv_S2KC.unflatten(0, (axis.size, 2, -1)).unbind(1)  # type: ignore[no-untyped-call]
    k_SKC, v_SKC = torch.cat([first_W, second_W.flip(0)]).flatten(0, 1).unbind(1)
    o_THC: Tensor = _Chunks.apply(  # type: ignore[no-untyped-call]
        q_THC, k_SKC, v_SKC, segments.offsets_N, segments.host_N, axis, block, block_grad
    )
    return o_THC


def _earlier(segments: Segments, start: int, end: int) -> tuple[Segments, Segments]:
    """Queries of the segment that spans the chunk's start, and its keys before the start: both may be none.

    Two segments each: what comes before those keys, which no query attends to, and they themselves.
    """

    def queries(offsets_N: Tensor) -> Tensor:
        first_N, last_N = offsets_N[:-1], offsets_N[1:]
        spans_N = (first_N < start) & (last_N > start)
        num_queries = ((last_N.clamp(max=end) - start) * spans_N).sum(dtype=offsets_N.dtype)
        zero = torch.zeros_like(num_queries)
        return torch.stack([zero, zero, num_queries])

    def keys(offsets_N: Tensor) -> Tensor:
        first_N, last_N = offsets_N[:-1], offsets_N[1:]
        spans_N = (first_N < start) & (last_N > start)
        num_keys = ((start - first_N) * spans_N).sum(dtype=offsets_N.dtype)
        zero = torch.zeros_like(num_keys)
        return torch.stack([zero, start - num_keys, zero + start])

    return segments.map(queries), segments.map(keys)


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_THC: Tensor,
        k_SKC: Tensor,
        v_SKC: Tensor,
        offsets_N: Tensor,
        host_N: Tensor,
        axis: Axis,
        block: AttentionBlock,
        block_grad: AttentionBlockGrad,
    ) -> Tensor:
        segments, parts = Segments(offsets_N=offsets_N, host_N=host_N), []
        for q, (start, end) in zip(q_THC.chunk(2), pieces("gather", q_THC.shape[0], axis), strict=True):
            queries, keys = _earlier(segments, start, end)
            own = block(q, k_SKC[start:end], v_SKC[start:end], cut(segments, start, end), is_causal=True)
            earlier = block(q, k_SKC[:start], v_SKC[:start], queries, keys, is_causal=False)
            parts.append(merge_blocks(*own, *earlier))
        o_THC, lse_TH = (torch.cat(x) for x in zip(*parts, strict=True))
        o_THC = o_THC.to(q_THC.dtype)
        ctx.save_for_backward(q_THC, k_SKC, v_SKC, o_THC, lse_TH, offsets_N, host_N)
        ctx.axis, ctx.block_grad = axis, block_grad
        return o_THC

    @staticmethod
    def backward(ctx: Any, do_THC: Tensor) -> tuple[Tensor | None, ...]:
        q_THC, k_SKC, v_SKC, o_THC, lse_TH, offsets_N, host_N = ctx.saved_tensors
        whole = Segments(offsets_N=offsets_N, host_N=host_N)
        dk_SKC, dv_SKC = (torch.zeros_like(x, dtype=lse_TH.dtype) for x in (k_SKC, v_SKC))
        dq = []
        halves = zip(*(x.chunk(2) for x in (do_THC, q_THC, o_THC, lse_TH)), strict=True)
        for (do, q, o, lse), (start, end) in zip(halves, pieces("gather", q_THC.shape[0], ctx.axis), strict=True):
            queries, keys = _earlier(whole, start, end)
            k, v, segments = k_SKC[start:end], v_SKC[start:end], cut(whole, start, end)
            own = ctx.block_grad(do, q, k, v, o, lse, segments, is_causal=True)
            k, v = k_SKC[:start], v_SKC[:start]
            earlier = ctx.block_grad(do, q, k, v, o, lse, queries, keys, is_causal=False)
            dq.append(own[0] + earlier[0])
            for grad, own_part, earlier_part in zip((dk_SKC, dv_SKC), own[1:], earlier[1:], strict=True):
                grad[start:end] += own_part
                grad[:start] += earlier_part
        return torch.cat(dq), dk_SKC.to(k_SKC.dtype), dv_SKC.to(v_SKC.dtype), None, None, None, None, None
