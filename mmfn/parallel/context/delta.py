"""The gated delta rule and its convolution over tokens that lie on several ranks: states pass, tokens stay.

The row is cut into contiguous pieces, one per rank or two (chunks r and 2W - 1 - r), numbered in the row's order. A
piece that the state S enters ends with N S + b. Every rank computes N and b of its own pieces from their tokens alone,
all are gathered, and each rank folds up what enters its pieces:

    forward     gather [b | N] of all pieces        S_0 = 0,  S_(p+1) = N_p S_p + b_p,  output of p from S_p
    backward    gather B, the gradient of S_p from the output of p alone
                D = 0 for the end of the last piece,  D_(p-1) = B_p + N_p^T D_p,  all gradients of p from S_p and D_p

Where a segment starts in a piece, N is exactly 0; where one starts with it, S_p and B_p are. The traffic does not grow
with the tokens: H C (C + V) values of float32 per piece and H C V in the backward, 6.3 MB for 32 heads of 128 channels,
where heads exchanged for tokens move 25 kB per token. Any number of heads, segments of any length. The convolution
takes the K - 1 tokens before a piece from the ends of all pieces, which are gathered.
Source: Blelloch 1990, "Prefix sums and their applications", for recurrences that are linear in the state.

Legend: T this rank's tokens, K heads of queries and keys, H of values, C key channels, V value channels, X = V + C,
P pieces, L tokens of a piece and those before it; D channels and K taps of the convolution.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfn.batch import Segments
from mmfn.dtypes import wide
from mmfn.errors import UserError
from mmfn.ops import GatedDeltaState, Ops
from mmfn.ops.kernel import wrapping
from mmfn.parallel.context.token_order import PIECE_KINDS, cut, pieces
from mmfn.parallel.mesh.axis import Axis, all_gather

SITE = "states"
HALO_SITE = "halo"


def spread_recurrence(ops: Ops, kind: str, axis: Axis) -> Ops:
    """The table with a gated delta rule and a causal convolution of tokens that are spread over cp.

    What is whole on a rank goes to the table's own. Raises ValueError, where one is called, as `check_recurrent` does.
    """
    whole_rule, whole_conv = ops.gated_delta_rule, ops.causal_conv1d
    piece_ops = PieceOps(
        ops.gated_delta_state, ops.gated_delta_piece, ops.gated_delta_piece_grad, ops.gated_delta_entry_grad
    )

    def rule(q_TKC: Tensor, k_TKC: Tensor, v_THV: Tensor, g_TH: Tensor, beta_TH: Tensor, segments: Segments) -> Tensor:
        if segments.spread != "cp":
            return whole_rule(q_TKC, k_TKC, v_THV, g_TH, beta_TH, segments)
        check_recurrent(kind)
        return passed_delta_rule(q_TKC, k_TKC, v_THV, g_TH, beta_TH, segments, kind=kind, axis=axis, ops=piece_ops)

    def conv(x_TD: Tensor, weight_DK: Tensor, segments: Segments) -> Tensor:
        if segments.spread != "cp":
            return whole_conv(x_TD, weight_DK, segments)
        check_recurrent(kind)
        return halo_conv1d(x_TD, weight_DK, segments, kind=kind, axis=axis, inner=whole_conv)

    return replace(
        ops, gated_delta_rule=wrapping(rule, whole_rule, *piece_ops), causal_conv1d=wrapping(conv, whole_conv)
    )


def check_recurrent(kind: str) -> None:
    """Raise ValueError where a kind of context parallelism has no pieces that a state could pass through."""
    if kind not in PIECE_KINDS:
        raise UserError(
            f"context_parallel({kind!r}) cuts every segment among the ranks, so no state can pass through it, and the "
            "model has recurrent layers; use kind 'ulysses' or 'gather'"
        )


class PieceOps(NamedTuple):
    """The ops of a table that pieces are computed with."""

    state: GatedDeltaState
    piece: Callable[..., Tensor]
    piece_grad: Callable[..., tuple[Tensor, ...]]
    entry_grad: Callable[..., Tensor]


def passed_delta_rule(
    q_TKC: Tensor,
    k_TKC: Tensor,
    v_THV: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
    segments: Segments,
    *,
    kind: str,
    axis: Axis,
    ops: PieceOps,
) -> Tensor:
    """`gated_delta_rule` of this rank's tokens, in the order of `token_order`; o_THV.

    `segments`: those of the whole row. One all-gather of states in the forward, one of their gradients in the backward.
    Saved: the arguments, the states that enter this rank's pieces, and N of all pieces.
    """
    o_THV: Tensor = _Pieces.apply(  # type: ignore[no-untyped-call]
        q_TKC, k_TKC, v_THV, g_TH, beta_TH, segments.offsets_N, segments.host_N, kind, axis, ops
    )
    return o_THV


def halo_conv1d(
    x_TD: Tensor,
    weight_DK: Tensor,
    segments: Segments,
    *,
    kind: str,
    axis: Axis,
    inner: Callable[[Tensor, Tensor, Segments], Tensor],
) -> Tensor:
    """`causal_conv1d` of this rank's tokens, in the order of `token_order`; y_TD.

    `segments`: those of the whole row. One all-gather of the last K - 1 tokens of all pieces, one reduce-scatter of
    their gradients. The weight's gradient is this rank's share of a sum.
    """
    bounds, num_past = pieces(kind, len(x_TD), axis), weight_DK.shape[1] - 1
    parts = x_TD.chunk(len(bounds))
    size = min(num_past, len(parts[0]))  # of a piece's end; where it is short, the ends are the whole row
    ends_PSD = torch.stack([part[len(part) - size :] for part in parts])
    ends_SD = in_row_order(all_gather(ends_PSD, axis, HALO_SITE), len(bounds), axis).flatten(0, 1)
    ends_SD = torch.cat([x_TD.new_zeros(num_past, x_TD.shape[1]), ends_SD])  # before the first piece
    outs = []
    for part, (start, end) in zip(parts, bounds, strict=True):
        last = num_past + start // len(part) * size
        row_LD = torch.cat([ends_SD[last - num_past : last], part])
        outs.append(inner(row_LD, weight_DK, _with_past(segments, start, end, num_past))[num_past:])
    return torch.cat(outs)


def in_row_order(x_P: Tensor, per_rank: int, axis: Axis) -> Tensor:
    """What ranks gathered of their pieces, `per_rank` each, in the order of the pieces in the row."""
    if per_rank == 1:
        return x_P
    first_W, second_W = x_P.unflatten(0, (axis.size, 2)).unbind(1)  # type: ignore[no-untyped-call]
    return torch.cat([first_W, second_W.flip(0)])


def _with_past(segments: Segments, start: int, end: int, num_past: int) -> Segments:
    """Segments of a piece behind `num_past` tokens before it; the first one holds what lies before the row, or none."""
    before = cut(segments, start - num_past, end)
    return before.map(lambda offsets_N: torch.cat([torch.zeros_like(offsets_N[:1]), offsets_N]))


def _last_run(segments: Segments, start: int, end: int) -> Segments:
    """Two segments of a piece: what lies before its last one, and that."""

    def bounds(offsets_N: Tensor) -> Tensor:
        first = offsets_N.where(offsets_N < end, 0).amax().clamp(start, end)
        last = offsets_N[-1].clamp(start, end)
        return torch.stack([torch.zeros_like(first), first.minimum(last) - start, last - start])

    return Segments(offsets_N=bounds(segments.offsets_N), host_N=bounds(segments.host_N))


def _is_entered(offsets_N: Tensor, start: int) -> Tensor:
    """Whether a segment spans the piece's start."""
    return ((offsets_N[:-1] < start) & (offsets_N[1:] > start)).any()


def _end(rows: tuple[Tensor, ...], segments: Segments, start: int, end: int, state: GatedDeltaState) -> Tensor:
    """[b | N] of a piece: its end state from an entry state of 0, and what becomes of the entry state."""
    _, k_TKC, v_THV, g_TH, beta_TH = rows
    (H, V), C, dtype = v_THV.shape[1:], k_TKC.shape[2], wide(v_THV.dtype)
    run = _last_run(segments, start, end)
    is_passed = _is_entered(segments.offsets_N, start) & (run.offsets_N[1] == 0)
    entry_CV = torch.cat([k_TKC.new_zeros(C, V, dtype=dtype), torch.eye(C, dtype=dtype, device=k_TKC.device)], 1)
    entry_2HCV = (entry_CV * is_passed).expand(2, H, C, V + C)
    return state(k_TKC, v_THV, g_TH, beta_TH, run, entry_2HCV)[1]


class _Pieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_TKC: Tensor,
        k_TKC: Tensor,
        v_THV: Tensor,
        g_TH: Tensor,
        beta_TH: Tensor,
        offsets_N: Tensor,
        host_N: Tensor,
        kind: str,
        axis: Axis,
        ops: PieceOps,
    ) -> Tensor:
        segments, V = Segments(offsets_N=offsets_N, host_N=host_N), v_THV.shape[2]
        bounds = pieces(kind, len(v_THV), axis)
        rows = tuple(zip(*(x.chunk(len(bounds)) for x in (q_TKC, k_TKC, v_THV, g_TH, beta_TH)), strict=True))
        ends = [_end(row, segments, *place, ops.state) for row, place in zip(rows, bounds, strict=True)]
        ends_PHCX = in_row_order(axis.all_gather(torch.stack(ends), SITE), len(bounds), axis)
        outs, entries = [], []
        for row, (start, end) in zip(rows, bounds, strict=True):
            entry_HCV = torch.zeros_like(ends_PHCX[0, ..., :V])
            for end_HCX in ends_PHCX[: start // (end - start)]:
                entry_HCV = end_HCX[..., V:] @ entry_HCV + end_HCX[..., :V]
            entries.append(entry_HCV.where(_is_entered(offsets_N, start), 0.0))
            outs.append(ops.piece(*row, cut(segments, start, end), entries[-1]))
        transitions_PHCC = ends_PHCX[..., V:].contiguous()
        ctx.save_for_backward(
            q_TKC, k_TKC, v_THV, g_TH, beta_TH, offsets_N, host_N, torch.stack(entries), transitions_PHCC
        )
        ctx.kind, ctx.axis, ctx.ops = kind, axis, ops
        return torch.cat(outs)

    @staticmethod
    def backward(ctx: Any, do_THV: Tensor) -> tuple[Tensor | None, ...]:
        *xs, offsets_N, host_N, entries_PHCV, transitions_PHCC = ctx.saved_tensors
        segments, ops = Segments(offsets_N=offsets_N, host_N=host_N), ctx.ops
        bounds = pieces(ctx.kind, len(do_THV), ctx.axis)
        rows = tuple(zip(*(x.chunk(len(bounds)) for x in (do_THV, *xs)), strict=True))
        parts = []
        for (do, q, k, _, g, beta), (start, end) in zip(rows, bounds, strict=True):
            dentry_HCV = ops.entry_grad(do, q, k, g, beta, cut(segments, start, end))
            parts.append(dentry_HCV.where(_is_entered(offsets_N, start), 0.0))
        dentries_PHCV = in_row_order(ctx.axis.all_gather(torch.stack(parts), SITE), len(bounds), ctx.axis)
        grads = []
        for row, entry_HCV, (start, end) in zip(rows, entries_PHCV, bounds, strict=True):
            dend_HCV = torch.zeros_like(entry_HCV)
            for p in reversed(range(start // (end - start) + 1, len(dentries_PHCV))):
                dend_HCV = transitions_PHCC[p].mT @ dend_HCV + dentries_PHCV[p]
            grads.append(ops.piece_grad(*row, cut(segments, start, end), entry_HCV, dend_HCV))
        return *(torch.cat(parts) for parts in zip(*grads, strict=True)), *(None,) * 5
