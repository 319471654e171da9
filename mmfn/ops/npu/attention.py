"""Packed attention by `npu_fusion_attention`: all segments in one call, where they end told as lists or as tensors.

    lengths 5 3 0, 2 tokens of padding -> call on 8 tokens, ends [5, 8]; zeros behind them

Ends are cumulative, without the leading 0, and come from the host's copy that segments carry, so nothing waits for the
device. With lists, what is no segment's never reaches the operator. As tensors (of the host, too: the operator refuses
others) they need not be read, for graphs: shapes are static, and padding is one more segment, whose output is masked.

A mask says with true which pairs do NOT meet; without one all do, whatever the sparse mode. The default scale is 1.

Legend: T queries, S keys, H query heads, K kv heads, C channels, N segments, B rows, L tokens of a row.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfn.batch import Segments
from mmfn.errors import UserError
from mmfn.ops import attention as portable
from mmfn.ops.eager import is_eager
from mmfn.ops.kernel import Operators
from mmfn.ops.npu.limits import LIMITS, MASK_SIZE, Limits

Layout = Literal["TND", "BSND", "BNSD"]
Lengths = Literal["list", "tensor"]
ALL_PAIRS, BOTTOM_RIGHT = 0, 3  # sparse modes


def attention(
    q_THC: Tensor,
    k_SKC: Tensor,
    v_SKC: Tensor,
    segments: Segments,
    *,
    is_causal: bool,
    layout: Layout = "TND",
    lengths: Lengths = "list",
    limits: Limits = LIMITS,
) -> Tensor:
    """`mmfn.ops.attention.attention` by one call for all segments, or, with more than `limits.segments`, by a few.

    `layout`: "TND" is the packed one; "BSND" and "BNSD" take rows of equal length, so every run of segments of the same
    length is a call of its own. `lengths`: "list" reads the boundaries (no graph can), "tensor" hands them on
    unread (`npu_fusion_attention_v3`, "TND" alone). Raises ValueError as the portable one does, and
    beyond the limits of the operator.
    """
    check(q_THC, k_SKC, v_SKC, segments, segments, limits)
    if q_THC.shape[0] != k_SKC.shape[0]:
        raise ValueError(
            f"there are {q_THC.shape[0]} queries and {k_SKC.shape[0]} keys; they must be of the same tokens"
        )
    if lengths == "tensor":
        return _with_tensors(q_THC, k_SKC, v_SKC, segments, is_causal, limits)
    if torch.compiler.is_compiling():
        raise UserError(
            "attention with lists of lengths cannot be in a graph; use npu(lengths='tensor'), or compile nothing"
        )
    parts = []
    if layout == "TND":
        for rows, keys in spans(segments, None, q_THC, k_SKC, limits):
            qkv = rows.of(q_THC), keys.of(k_SKC), keys.of(v_SKC)
            out = call(*qkv, rows.ends, keys.ends, is_causal=is_causal)
            parts.append((rows.first, out[0]))
    else:
        for first, count, length in _runs(segments, q_THC):
            q, k, v = (_rows(x, first, count, length, layout) for x in (q_THC, k_SKC, v_SKC))
            o = call(q, k, v, None, None, is_causal=is_causal, layout=layout)[0]
            parts.append((first, (o if layout == "BSND" else o.transpose(1, 2)).flatten(0, 1)))
    return laid(parts, q_THC.shape[0], 0.0, q_THC)


def _rows(x_THC: Tensor, first: int, count: int, length: int, layout: Layout) -> Tensor:
    """`count` rows of `length` tokens from `first` on, as a batch: a view."""
    x_BLHC = x_THC[first : first + count * length].view(count, length, *x_THC.shape[1:])
    return x_BLHC if layout == "BSND" else x_BLHC.transpose(1, 2)


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Sequence[int] | None,
    key_ends: Sequence[int] | None,
    *,
    is_causal: bool,
    layout: Layout = "TND",
) -> Sequence[Any]:
    """The operator: output, and the scores' maximum and sum of each row, float32[T, H, 8], and what is of no use here.

    Without `softmax_layout` those of packed rows would lie head by head within each segment, in the same shape.
    """
    out: Sequence[Any] = torch.ops.npu.npu_fusion_attention(
        q,
        k,
        v,
        q.shape[1 if layout != "BSND" else 2],
        layout,
        atten_mask=causal_mask(q) if is_causal else None,
        scale=q.shape[-1] ** -0.5,
        actual_seq_qlen=ends,
        actual_seq_kvlen=key_ends,
        sparse_mode=BOTTOM_RIGHT if is_causal else ALL_PAIRS,
        softmax_layout="TND" if layout == "TND" else "",
    )
    return out


def _with_tensors(
    q_THC: Tensor, k_SKC: Tensor, v_SKC: Tensor, segments: Segments, is_causal: bool, limits: Limits
) -> Tensor:
    T, H, C = q_THC.shape
    limits.check("attention with a tensor of lengths", q_THC, ("segments", segments.num + 1, limits.segments))
    ends_N = F.pad(segments.host_N[1:].long(), (0, 1), value=T)
    o_THC: Tensor = torch.ops.npu.npu_fusion_attention_v3(
        q_THC,
        k_SKC,
        v_SKC,
        H,
        "TND",
        atten_mask=causal_mask(q_THC) if is_causal else None,
        scale=C**-0.5,
        actual_seq_qlen=ends_N,
        actual_seq_kvlen=ends_N,
        sparse_mode=BOTTOM_RIGHT if is_causal else ALL_PAIRS,
        softmax_layout="TND",
    )[0]
    is_real_T = torch.arange(T, device=q_THC.device) < segments.offsets_N[-1]
    return torch.where(is_real_T[:, None, None], o_THC, 0.0)


def causal_mask(q: Tensor) -> Tensor:
    """bool[2048, 2048], true above the diagonal: the causal mask of segments of any length, on q's device."""
    return _kept_mask(q.device) if is_eager(q) else _mask(q.device)


@lru_cache(maxsize=16)
def _kept_mask(device: torch.device) -> Tensor:
    """A constant: made once for all layers, which keep it for their backward."""
    with torch.inference_mode(False):
        return _mask(device)


def _mask(device: torch.device) -> Tensor:
    return torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.bool, device=device).triu(1)


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens of one call: from `first` on, and where each of their segments ends, counted from there."""

    first: int
    ends: tuple[int, ...]

    def of(self, x_THC: Tensor) -> Tensor:
        """The rows of x that are these tokens: a view."""
        return x_THC[self.first : self.first + self.ends[-1]]


def spans(
    segments: Segments, keys: Segments | None, q_THC: Tensor, k_SKC: Tensor, limits: Limits
) -> tuple[tuple[Span, Span], ...]:
    """Queries and keys of all calls. A segment without queries and keys is in none; one with either parts calls."""
    offsets = portable.read_offsets(segments.host_N, q_THC)
    key_offsets = offsets if keys is None else portable.read_offsets(keys.host_N, k_SKC)
    return _spans(offsets.tobytes(), key_offsets.tobytes(), limits.segments)


@lru_cache(maxsize=64)
def _spans(offsets: bytes, key_offsets: bytes, most: int) -> tuple[tuple[Span, Span], ...]:
    """`spans` of int32 boundaries. Cached, so that every layer is spared the work."""
    calls: list[list[tuple[int, int, int, int]]] = [[]]
    edges = (itertools.pairwise(memoryview(x).cast("i")) for x in (offsets, key_offsets))
    for (start, end), (key_start, key_end) in zip(*edges, strict=True):
        if start == end and key_start == key_end:
            continue
        if start == end or key_start == key_end or len(calls[-1]) == most:
            calls.append([])
        if start < end and key_start < key_end:
            calls[-1].append((start, end, key_start, key_end))
    return tuple(
        (
            Span(call[0][0], tuple(end - call[0][0] for _, end, _, _ in call)),
            Span(call[0][2], tuple(end - call[0][2] for *_, end in call)),
        )
        for call in calls
        if call
    )


def _runs(segments: Segments, q_THC: Tensor) -> list[tuple[int, int, int]]:
    """(first token, number of segments, their length) of neighbouring segments of one length."""
    runs: list[tuple[int, int, int]] = []
    for start, end in itertools.pairwise(portable.read_offsets(segments.host_N, q_THC).tolist()):
        if runs and runs[-1][2] == end - start:
            first, count, length = runs.pop()
            runs.append((first, count + 1, length))
        elif start < end:
            runs.append((start, 1, end - start))
    return runs


def laid(parts: Sequence[tuple[int, Tensor]], num_rows: int, fill: float, like: Tensor) -> Tensor:
    """Rows from their first place on, `fill` where there are none; the only part where it is all rows. `like`: whose
    shape behind the first dim, device and dtype rows have, and whose gradient is zero where there is no part."""
    if len(parts) == 1 and parts[0][1].shape[0] == num_rows:
        return parts[0][1]
    pieces, place = [like[:0]], 0
    for first, part in parts:
        pieces += [like.new_full((first - place, *like.shape[1:]), fill), part]
        place = first + part.shape[0]
    return torch.cat([*pieces, like.new_full((num_rows - place, *like.shape[1:]), fill)])


def check(q_THC: Tensor, k_SKC: Tensor, v_SKC: Tensor, segments: Segments, keys: Segments, limits: Limits) -> None:
    """Raise ValueError for shapes, dtypes or offsets that do not fit, and for what the operator does not take."""
    portable.check_inputs(q_THC, k_SKC, v_SKC, segments, keys)
    T, H, C = q_THC.shape
    sizes = (("heads", H, limits.heads), ("channels of a head", C, limits.channels))
    limits.check("attention", q_THC, *sizes, ("tokens", max(T, k_SKC.shape[0]), limits.tokens))


def check_choice(layout: str, lengths: str) -> None:
    """Raise ValueError for a layout and lengths that there are not together."""
    for name, value, choices in (("layout", layout, get_args(Layout)), ("lengths", lengths, get_args(Lengths))):
        if value not in choices:
            raise UserError(f"{name} is {value!r} but must be one of {', '.join(choices)}")
    if lengths == "tensor" and layout != "TND":
        raise UserError(f"tensors of lengths need the layout 'TND' but it is {layout!r}; leave one of them out")


def _flops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Any = None,
    padding_mask: Any = None,
    atten_mask: Any = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 0,
    next_tockens: int = 0,
    inner_precise: int = 0,
    prefix: Any = None,
    actual_seq_qlen: Any = None,
    actual_seq_kvlen: Any = None,
    *_: Any,
    **__: Any,
) -> int:
    """Of a forward, by the names and the order of its schema: two products over the pairs that meet."""
    if input_layout == "TND":
        pairs = zip(_lengths(actual_seq_qlen), _lengths(actual_seq_kvlen), strict=True)
    else:
        dim = 1 if input_layout == "BSND" else 2
        pairs = zip([query.shape[dim]] * query.shape[0], [key.shape[dim]] * key.shape[0], strict=True)
    num_pairs = sum(length * (length + 1) // 2 if atten_mask is not None else length * keys for length, keys in pairs)
    return 4 * head_num * query.shape[-1] * num_pairs


def _grad_flops(
    query: Tensor, key: Tensor, value: Tensor, dy: Tensor, head_num: int, input_layout: str, **settings: Any
) -> int:
    """Of a backward: five products for two."""
    return 5 * _flops(query, key, value, head_num, input_layout, **settings) // 2


def _lengths(ends: Any) -> list[int]:
    ends = ends.tolist() if isinstance(ends, Tensor) else ends
    return [end - start for start, end in itertools.pairwise((0, *ends))]


RESULTS = ("npu::npu_fusion_attention", "npu::npu_fusion_attention_v3")
OPERATORS: Operators = {
    **dict.fromkeys(RESULTS, _flops),
    **dict.fromkeys(("npu::npu_fusion_attention_grad", "npu::npu_fusion_attention_grad_v3"), _grad_flops),
}
