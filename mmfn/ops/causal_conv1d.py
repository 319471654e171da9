"""Causal depthwise convolution over packed rows, followed by silu.

    y_t = silu(sum over j < K of weight[:, K - 1 - j] x_(t - j)), x = 0 before the first token of t's segment

torch's own convolution wants channels first and one row at a time; here every segment is a few multiply-adds of whole
rows of channels, ROWS tokens at a time, and what is saved for the backward are the arguments alone.

Legend: T tokens, D channels, K taps of the kernel, N segments, B rows of a batch.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfn.batch import Segments
from mmfn.dtypes import wide
from mmfn.ops.attention import check_offsets, read_offsets
from mmfn.ops.custom import Context, operator, turns
from mmfn.ops.kernel import Kernel, Whole

BLOCK_VALUES = 2**17
"""Values worked on at a time: 512 KiB of float32, which a core's cache holds with the others of its block."""


def causal_conv1d(x_TD: Tensor, weight_DK: Tensor, segments: Segments) -> Tensor:
    """The formula above within every segment; y_TD in x's dtype.

    `x_TD`: floating[T, D]. `weight_DK`: floating[D, K], no bias. Computed in float32, or float64 where one of both is,
    and rounded once. Behind the last offset nothing is read; output and gradients are zero there. Boundaries are read
    from the host's copy. Raises ValueError for shapes or offsets that do not fit. Source: `causal_conv1d_fn` of
    transformers 5.23 (`F.conv1d` with groups, silu). Oracle: `causal_conv1d_reference`.
    """
    check(x_TD, weight_DK, segments)
    y_TD: Tensor = _conv(x_TD, weight_DK, segments.host_N)
    return y_TD


def causal_conv1d_reference(x_TD: Tensor, weight_DK: Tensor, segments: Segments) -> Tensor:
    """`causal_conv1d` by torch's convolution, one segment after the other."""
    check(x_TD, weight_DK, segments)
    dtype, (D, K), parts = wide(x_TD.dtype, weight_DK.dtype), weight_DK.shape, [x_TD[:0]]
    for first, last in itertools.pairwise([*segments.host_N.tolist(), len(x_TD)]):
        if first < last:
            x_1DL = F.pad(x_TD[first:last].to(dtype).T[None], (K - 1, 0))
            parts.append(F.silu(F.conv1d(x_1DL, weight_DK[:, None].to(dtype), groups=D)[0].T).to(x_TD.dtype))
    is_real_T1 = torch.arange(len(x_TD), device=x_TD.device)[:, None] < segments.offsets_N[-1]
    return torch.where(is_real_T1, torch.cat(parts), 0.0)


def causal_conv1d_step(x_BD: Tensor, weight_DK: Tensor, state_BKD: Tensor) -> tuple[Tensor, Tensor]:
    """One token of every row: y_BD, and the state behind it.

    `state_BKD`: the K - 1 inputs before, oldest first, of x's dtype (zeros before a row's first token); see
    `causal_conv1d_state`. Raises ValueError for shapes that do not fit. Oracle: `causal_conv1d_step_reference`.
    """
    _check_step(x_BD, weight_DK, state_BKD)
    x_BKD, dtype = torch.cat([state_BKD, x_BD[:, None]], 1), wide(x_BD.dtype, weight_DK.dtype)
    y_BD = (x_BKD.to(dtype) * weight_DK.T.to(dtype)).sum(1)
    return F.silu(y_BD).to(x_BD.dtype), x_BKD[:, 1:]


def causal_conv1d_step_reference(x_BD: Tensor, weight_DK: Tensor, state_BKD: Tensor) -> tuple[Tensor, Tensor]:
    """`causal_conv1d_step` as the last token of rows of K, which are all one packed row."""
    _check_step(x_BD, weight_DK, state_BKD)
    B, (D, K) = len(x_BD), weight_DK.shape
    x_BKD = torch.cat([state_BKD, x_BD[:, None]], 1)
    rows = Segments.of(torch.arange(0, B * K + 1, K, dtype=torch.int32))
    return causal_conv1d_reference(x_BKD.reshape(-1, D), weight_DK, rows).view(B, K, D)[:, -1], x_BKD[:, 1:]


def causal_conv1d_state(x_TD: Tensor, segments: Segments, num_inputs: int) -> Tensor:
    """The last `num_inputs` (K - 1) inputs of every segment, oldest first, zeros where it has fewer: [N, K - 1, D]."""
    offsets_N = segments.offsets_N.long()
    place_NK = offsets_N[1:, None] + torch.arange(-num_inputs, 0, device=x_TD.device)
    is_inside_NK = place_NK >= offsets_N[:-1, None]
    return F.pad(x_TD, (0, 0, 1, 0))[(place_NK + 1).where(is_inside_NK, 0)]  # row 0 is zero


def check(x_TD: Tensor, weight_DK: Tensor, segments: Segments) -> None:
    """Raise ValueError unless channels and offsets fit."""
    if x_TD.ndim != 2 or weight_DK.ndim != 2 or x_TD.shape[1] != weight_DK.shape[0] or weight_DK.shape[1] == 0:
        raise ValueError(
            f"x_TD {tuple(x_TD.shape)} and weight_DK {tuple(weight_DK.shape)} must be [T, D] and [D, K] with one D"
        )
    check_offsets(segments)


def _check_step(x_BD: Tensor, weight_DK: Tensor, state_BKD: Tensor) -> None:
    B, (D, K) = len(x_BD), weight_DK.shape
    if x_BD.shape != (B, D) or state_BKD.shape != (B, K - 1, D):
        raise ValueError(
            f"x_BD {tuple(x_BD.shape)} and state_BKD {tuple(state_BKD.shape)} must be [B, D] and [B, K - 1, D] for "
            f"weight_DK {(D, K)}"
        )


def _blocks(offsets_N: Tensor, x_TD: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Segments in blocks of tokens: the segment's first token, the block's, and those behind the block and segment."""
    rows = max(1, BLOCK_VALUES // max(1, x_TD.shape[1]))
    for first, last in itertools.pairwise(read_offsets(offsets_N, x_TD).tolist()):
        for start in turns(range(first, last, rows), x_TD):
            yield first, start, min(last, start + rows), last


def _with_past(x_TD: Tensor, first: int, start: int, end: int, weight_KD: Tensor) -> Tensor:
    """Tokens from `start` to `end` behind the K - 1 before, zeros where the segment has none; in the weight's dtype."""
    num_past = len(weight_KD) - 1
    x_LD = weight_KD.new_zeros(num_past + end - start, x_TD.shape[1])
    origin = max(first, start - num_past)
    x_LD[num_past - (start - origin) :] = x_TD[origin:end]
    return x_LD


def _taps(x_LD: Tensor, weight_KD: Tensor) -> Tensor:
    """The convolution of all tokens but the K - 1 first."""
    size = len(x_LD) - len(weight_KD) + 1
    z_LD = x_LD[:size] * weight_KD[0]
    for i in range(1, len(weight_KD)):
        z_LD.addcmul_(x_LD[i : i + size], weight_KD[i])
    return z_LD


def _forward(x_TD: Tensor, weight_DK: Tensor, offsets_N: Tensor) -> Tensor:
    y_TD, weight_KD = x_TD.new_empty(x_TD.shape), _wide_taps(x_TD, weight_DK)
    y_TD[int(offsets_N[-1]) :] = 0
    for first, start, end, _ in _blocks(offsets_N, x_TD):
        z_LD = _taps(_with_past(x_TD, first, start, end, weight_KD), weight_KD)
        y_TD[start:end] = F.silu(z_LD, inplace=True)
    return y_TD


def _backward(
    dy_TD: Tensor, x_TD: Tensor, weight_DK: Tensor, offsets_N: Tensor, needs_dweight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight (or zeros); a block reads the gradient of the K - 1 tokens behind it as well."""
    dx_TD, weight_KD, K = x_TD.new_empty(x_TD.shape), _wide_taps(x_TD, weight_DK), weight_DK.shape[1]
    dx_TD[int(offsets_N[-1]) :] = 0
    dweight_KD = torch.zeros_like(weight_KD)
    for first, start, end, last in _blocks(offsets_N, x_TD):
        size, reach = end - start, min(last, end + K - 1)
        x_LD = _with_past(x_TD, first, start, reach, weight_KD)
        dy_LD = dy_TD[start:reach].to(weight_KD.dtype)
        dz_LD = torch.ops.aten.silu_backward(dy_LD, _taps(x_LD, weight_KD))
        dx_LD = dz_LD[:size] * weight_KD[-1]
        for i in range(K):
            later_LD = dz_LD[K - 1 - i : K - 1 - i + size]
            if i < K - 1:
                dx_LD[: len(later_LD)].addcmul_(later_LD, weight_KD[i])
            if needs_dweight:
                dweight_KD[i] += (dz_LD[:size] * x_LD[i : i + size]).sum(0)
        dx_TD[start:end] = dx_LD
    return dx_TD, dweight_KD.T.to(weight_DK.dtype).contiguous()


def _wide_taps(x_TD: Tensor, weight_DK: Tensor) -> Tensor:
    return weight_DK.T.to(wide(x_TD.dtype, weight_DK.dtype)).contiguous()


def _save(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Context, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
    needs_dweight = ctx.needs_input_grad[1]
    dx_TD, dweight_DK = CONV_GRAD(dy_TD, *ctx.saved_tensors, needs_dweight)
    return dx_TD, dweight_DK if needs_dweight else None, None


CONV = operator("mmfn::causal_conv1d", _forward, lambda x, weight, offsets: x.new_empty(x.shape), is_whole=True)
CONV_GRAD = operator(
    "mmfn::causal_conv1d_grad",
    _backward,
    lambda dy, x, weight, offsets, needs_dweight: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
    is_whole=True,
)
_conv = CONV.with_gradient(_save, _gradient)
OPERATORS = {op.name: Whole(op.direct) for op in (CONV, CONV_GRAD)}
KERNEL = Kernel(causal_conv1d, operators=OPERATORS, results=(CONV.name,))
