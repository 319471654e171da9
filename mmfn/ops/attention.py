"""Packed attention within segments, and attention of single queries against a cache.

The CPU kernel of torch is run segment by segment. Lengths are data: the loop is inside one operator, so that a graph
sees static shapes and other lengths never recompile it. What costs time with many short segments is the number of
kernel calls, hence `_plan`: a run of segments of equal length is one call on a view, and short segments of similar
length are gathered into one padded call. Right padding needs no mask under causality: a real query never sees a padded
key, and the gradient of a padded query's output is zero.

Legend: T queries, S keys, H query heads, K kv heads, C channels, N segments, B rows, L tokens of a row.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfn.batch import Segments
from mmfn.dtypes import wide
from mmfn.ops import flops
from mmfn.ops.custom import Context, operator
from mmfn.ops.kernel import Kernel
from mmfn.torch_private import FLASH_CPU, FLASH_CPU_GRAD

Boundaries = Any  # a NumPy array, int32[N + 1], as `Tensor.numpy` gives it: small, and read without torch

# When a segment joins a padded call: the padding and the copies it costs, in scores times channels, against one more
# kernel call forward and backward (about 0.3 ms). Copying one token costs about as much as 16 scores.
MERGE_BUDGET = 2**20
COPY_SCORES = 16


def attention(q_THC: Tensor, k_SKC: Tensor, v_SKC: Tensor, segments: Segments, *, is_causal: bool) -> Tensor:
    """Softmax attention of every token to the tokens of its segment, scaled by `C**-0.5`; o_THC.

    `q_THC`: floating[T, H, C]. `k_SKC`, `v_SKC`: the same dtype, [S, K, C] with S == T and K dividing H (query head h
    uses kv head h // (H / K)). With `is_causal` a token sees itself and those before it. Behind the last offset the
    output and all gradients are zero. CPU tensors use the kernel described above, in eager and in compiled graphs
    alike; tensors of other devices one `scaled_dot_product_attention` per segment that is not empty, a portable
    fallback. Boundaries are read from the host's copy.

    Raises ValueError for shapes, dtypes or offsets that do not fit. Source: Dao 2023 (arXiv:2307.08691), packed form;
    oracle `torch.nn.functional.scaled_dot_product_attention` with a block mask.
    """
    _check(q_THC, k_SKC, v_SKC, segments)
    if q_THC.device.type not in ("cpu", "meta"):
        return _per_segment(q_THC, k_SKC, v_SKC, segments, is_causal)
    o_THC: Tensor = _attend(q_THC, k_SKC, v_SKC, segments.host_N, is_causal, None)
    return o_THC


def attention_reference(q_THC: Tensor, k_SKC: Tensor, v_SKC: Tensor, segments: Segments, *, is_causal: bool) -> Tensor:
    """`attention` as a masked softmax over all pairs of tokens."""
    return dense(q_THC, k_SKC, v_SKC, segments.offsets_N, segments.offsets_N, is_causal)[0]


def attention_cached(q_BHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, lengths_B: Tensor) -> Tensor:
    """Attention of one query per row to the first `lengths_B[b]` cached keys of its row; o_BHC.

    `q_BHC`: floating[B, H, C]. `k_BSKC`, `v_BSKC`: [B, S, K, C] of the same dtype, K dividing H. `lengths_B`:
    integer[B] in [1, S]; behind it the cache must hold finite numbers, which do not count. Raises ValueError for shapes
    that do not fit. Oracle: `attention_cached_reference`.
    """
    (B, H, C), (S, K) = q_BHC.shape, k_BSKC.shape[1:3]
    if k_BSKC.shape != (B, S, K, C) or v_BSKC.shape != k_BSKC.shape or H % K or lengths_B.shape != (B,):
        raise ValueError(
            f"q_BHC {(B, H, C)}, k_BSKC {tuple(k_BSKC.shape)}, v_BSKC {tuple(v_BSKC.shape)} and lengths_B "
            f"{tuple(lengths_B.shape)} must agree in B and C, with K dividing H"
        )
    mask_BS = torch.arange(S, device=q_BHC.device) < lengths_B[:, None]
    k_BKSC, v_BKSC = k_BSKC.transpose(1, 2), v_BSKC.transpose(1, 2)
    mask_B11S = mask_BS[:, None, None]
    return F.scaled_dot_product_attention(q_BHC[:, :, None], k_BKSC, v_BKSC, mask_B11S, enable_gqa=True)[:, :, 0]


def attention_cached_reference(q_BHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, lengths_B: Tensor) -> Tensor:
    """`attention_cached` row by row, each against its own keys only."""
    G = q_BHC.shape[1] // k_BSKC.shape[2]
    outs = []
    for q_HC, k_SKC, v_SKC, length in zip(q_BHC, k_BSKC, v_BSKC, lengths_B.tolist(), strict=True):
        k_SHC, v_SHC = (x[:length].repeat_interleave(G, 1) for x in (k_SKC, v_SKC))
        scores_HS = torch.einsum("hc,shc->hs", q_HC, k_SHC) * q_HC.shape[1] ** -0.5
        outs.append(torch.einsum("hs,shc->hc", scores_HS.softmax(-1), v_SHC))
    return torch.stack(outs)


def dense(
    q_THC: Tensor, k_SKC: Tensor, v_SKC: Tensor, offsets_N: Tensor, key_offsets_N: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by a T x S mask; scores and softmax in float32 or wider."""
    (H, C), dtype = q_THC.shape[1:], wide(q_THC.dtype)
    mask_TS = dense_mask(q_THC, k_SKC, offsets_N, key_offsets_N, is_causal)
    k_SHC, v_SHC = (x.to(dtype).repeat_interleave(H // x.shape[1], 1) for x in (k_SKC, v_SKC))
    scores_HTS = torch.einsum("thc,shc->hts", q_THC.to(dtype), k_SHC) * C**-0.5
    scores_HTS = scores_HTS.masked_fill(~mask_TS, torch.finfo(dtype).min)
    lse_HT = scores_HTS.logsumexp(-1)
    probs_HTS = (scores_HTS - lse_HT[..., None]).exp() * mask_TS
    o_THC = torch.einsum("hts,shc->thc", probs_HTS, v_SHC).to(q_THC.dtype)
    return o_THC, lse_HT.T.where(mask_TS.any(1)[:, None], -torch.inf)


def dense_mask(q_THC: Tensor, k_SKC: Tensor, offsets_N: Tensor, key_offsets_N: Tensor, is_causal: bool) -> Tensor:
    """bool[T, S], true where a query attends to a key."""
    index_T, index_S = (torch.arange(x.shape[0], device=x.device) for x in (q_THC, k_SKC))
    segment_T = torch.searchsorted(offsets_N, index_T, right=True)
    segment_S = torch.searchsorted(key_offsets_N, index_S, right=True)
    mask_TS = (segment_T[:, None] == segment_S) & (index_S < key_offsets_N[-1])
    return mask_TS & (index_T[:, None] >= index_S) if is_causal else mask_TS


def _per_segment(q_THC: Tensor, k_SKC: Tensor, v_SKC: Tensor, segments: Segments, is_causal: bool) -> Tensor:
    """Any device: one call of the device's own kernel per segment, differentiated by autograd."""
    offsets = _used(read_offsets(segments.host_N, q_THC)).tolist()
    parts = [q_THC[:0]]
    for start, end in itertools.pairwise(offsets):
        if start == end:
            continue
        q_1HLC, k_1KLC, v_1KLC = (x[start:end].transpose(0, 1)[None] for x in (q_THC, k_SKC, v_SKC))
        o_1HLC = F.scaled_dot_product_attention(q_1HLC, k_1KLC, v_1KLC, is_causal=is_causal, enable_gqa=True)
        parts.append(o_1HLC[0].transpose(0, 1))
    return torch.cat([*parts, torch.zeros_like(q_THC[offsets[-1] :])])


def _check(q_THC: Tensor, k_SKC: Tensor, v_SKC: Tensor, segments: Segments) -> None:
    check_inputs(q_THC, k_SKC, v_SKC, segments)
    if q_THC.shape[0] != k_SKC.shape[0]:
        raise ValueError(
            f"q_THC {tuple(q_THC.shape)} and k_SKC {tuple(k_SKC.shape)} must be of the same tokens; make T agree"
        )


def check_inputs(q_THC: Tensor, k_SKC: Tensor, v_SKC: Tensor, *segments: Segments) -> None:
    """Raise ValueError unless heads, channels and dtypes fit."""
    shapes = f"q_THC {tuple(q_THC.shape)}, k_SKC {tuple(k_SKC.shape)}, v_SKC {tuple(v_SKC.shape)}"
    if q_THC.ndim != 3 or k_SKC.ndim != 3 or k_SKC.shape != v_SKC.shape or q_THC.shape[2] != k_SKC.shape[2]:
        raise ValueError(f"{shapes} must be [T, H, C], [S, K, C], [S, K, C]; make S, K and C agree")
    if k_SKC.shape[1] == 0 or q_THC.shape[1] % k_SKC.shape[1]:
        raise ValueError(f"{shapes}: the number of kv heads must divide the number of query heads; correct the heads")
    if not q_THC.dtype == k_SKC.dtype == v_SKC.dtype or not q_THC.is_floating_point():
        raise ValueError(f"q, k, v are {q_THC.dtype}, {k_SKC.dtype}, {v_SKC.dtype}; cast them to one floating dtype")
    check_offsets(*segments)


def check_offsets(*segments: Segments) -> None:
    """Raise ValueError unless offsets are a vector with a copy on the host."""
    for offsets_N, host_N in ((s.offsets_N, s.host_N) for s in segments):
        if offsets_N.ndim != 1 or offsets_N.numel() < 1:
            raise ValueError(f"offsets_N has shape {tuple(offsets_N.shape)} but must be [N + 1]; start it with 0")
        if host_N.shape != offsets_N.shape or host_N.device.type != "cpu":
            raise ValueError(
                f"host_N, {tuple(host_N.shape)} on {host_N.device}, must be a copy of offsets_N, "
                f"{tuple(offsets_N.shape)}, on the CPU; make both with Segments.of"
            )


def read_offsets(offsets_N: Tensor, x_T: Tensor) -> Boundaries:
    """The offsets on the host, checked; every layer does this, so no number of them becomes one of Python."""
    offsets: Boundaries = offsets_N.numpy().astype("int32", copy=False)
    if offsets[0] != 0 or offsets[-1] > x_T.shape[0] or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(
            f"offsets {tuple(offsets.tolist())} must rise from 0 to at most the {x_T.shape[0]} tokens; correct the "
            "packing"
        )
    return offsets


def _used(offsets: Boundaries) -> Boundaries:
    """Without the entries at the end that repeat the last one, of which a static batch has many."""
    return offsets[: offsets.searchsorted(offsets[-1]) + 1]


@dataclass(frozen=True, kw_only=True)
class _Padding:
    """Where the tokens of a padded call lie among its slots; all int64.

    `index`: the token of every slot, padding repeating its segment's last token so that probabilities stay finite.
    `tokens`, `slots`: the real tokens and their slots, in pairs. `pads`: the other slots.
    """

    index: Tensor
    tokens: Tensor
    slots: Tensor
    pads: Tensor


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Tokens one kernel call reads: `count` rows of `length`, end to end from token `start` unless they are padded."""

    start: int
    count: int
    length: int
    padding: _Padding | None = None

    def rows(self, x_THC: Tensor, *, zero_pads: bool = False) -> Tensor:
        """[T, H, ...] -> [B, H, L, ...]: a view, or a padded copy."""
        if self.padding is None:
            x_THC = x_THC[self.start : self.start + self.count * self.length]
        else:
            x_THC = x_THC.index_select(0, self.padding.index)
            if zero_pads:
                x_THC.index_fill_(0, self.padding.pads, 0)
        return x_THC.view(self.count, self.length, *x_THC.shape[1:]).transpose(1, 2)

    def put_(self, out_THC: Tensor, x_BHLC: Tensor) -> None:
        """Write rows back to their tokens."""
        x_THC = x_BHLC.transpose(1, 2).flatten(0, 1)
        if self.padding is None:
            out_THC[self.start : self.start + self.count * self.length] = x_THC
        else:
            out_THC.index_copy_(0, self.padding.tokens, x_THC.index_select(0, self.padding.slots))

    def covers(self, x_THC: Tensor) -> bool:
        """Whether these are all tokens of a tensor, in order."""
        return self.padding is None and self.count * self.length == x_THC.shape[0]


def _calls(
    offsets_N: Tensor, key_offsets_N: Tensor | None, is_causal: bool, q_THC: Tensor, k_SKC: Tensor
) -> Sequence[tuple[_Rows, _Rows]]:
    """Queries and keys of all kernel calls; a segment without queries or without keys has none."""
    offsets = read_offsets(offsets_N, q_THC)
    if key_offsets_N is None:
        return [(rows, rows) for rows in _plan(_used(offsets).tobytes(), is_causal, q_THC.shape[1] * q_THC.shape[2])]
    key_offsets = read_offsets(key_offsets_N, k_SKC)
    is_used = (offsets[1:] > offsets[:-1]) & (key_offsets[1:] > key_offsets[:-1])
    edges = (x[is_used].tolist() for x in (offsets[:-1], offsets[1:], key_offsets[:-1], key_offsets[1:]))
    return [
        (_Rows(start=q, count=1, length=q_end - q), _Rows(start=k, count=1, length=k_end - k))
        for q, q_end, k, k_end in zip(*edges, strict=True)
    ]


@lru_cache(maxsize=64)
def _plan(boundaries: bytes, is_causal: bool, width: int) -> tuple[_Rows, ...]:
    """Kernel calls that cover all segments of int32 `boundaries`; `width` is H * C. Cached, so that every layer is
    spared the work."""
    runs: list[_Rows] = []
    for start, end in itertools.pairwise(memoryview(boundaries).cast("i")):
        last = runs[-1] if runs else None
        if last and end - start == last.length:
            runs[-1] = _Rows(start=last.start, count=last.count + 1, length=last.length)
        elif end > start:
            runs.append(_Rows(start=start, count=1, length=end - start))
    groups: list[list[_Rows]] = []
    for run in sorted(runs, key=lambda r: -r.length):
        longest = groups[-1][0].length if groups else 0
        extra = longest**2 - run.length**2 + COPY_SCORES * run.length
        fits = is_causal or run.length == longest
        if groups and fits and extra * run.count * width <= MERGE_BUDGET:
            groups[-1].append(run)
        else:
            groups.append([run])
    return tuple(group[0] if len(group) == 1 else _padded(group) for group in groups)


def _padded(group: list[_Rows]) -> _Rows:
    length = group[0].length
    spans = [(run.start + i * run.length, run.length) for run in group for i in range(run.count)]
    slot_BL = torch.arange(length)[None]
    start_B1, size_B1 = torch.tensor(spans)[:, :, None].unbind(1)
    index = (start_B1 + slot_BL.minimum(size_B1 - 1)).flatten()
    is_real = (slot_BL < size_B1).flatten()
    slots, pads = is_real.nonzero()[:, 0], (~is_real).nonzero()[:, 0]
    padding = _Padding(index=index, tokens=index[slots], slots=slots, pads=pads)
    return _Rows(start=spans[0][0], count=len(spans), length=length, padding=padding)


def forward(
    q_THC: Tensor,
    k_SKC: Tensor,
    v_SKC: Tensor,
    offsets_N: Tensor,
    is_causal: bool,
    key_offsets_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; without `key_offsets_N` the keys lie where the queries do."""
    calls = _calls(offsets_N, key_offsets_N, is_causal, q_THC, k_SKC)
    q_THC, k_SKC, v_SKC = (_dense_channels(x) for x in (q_THC, k_SKC, v_SKC))
    o_THC = q_THC.new_empty(q_THC.shape)
    lse_TH = q_THC.new_empty(q_THC.shape[:2], dtype=wide(q_THC.dtype))
    first = 0 if key_offsets_N is not None else int(offsets_N[-1])  # the first token that no call may write
    o_THC[first:] = 0
    lse_TH[first:] = -torch.inf
    for queries, keys in calls:
        o_BHLC, lse_BHL = FLASH_CPU(queries.rows(q_THC), keys.rows(k_SKC), keys.rows(v_SKC), 0.0, is_causal)
        if queries.covers(q_THC):
            return o_BHLC.transpose(1, 2).reshape(o_THC.shape), lse_BHL.transpose(1, 2).reshape(lse_TH.shape)
        queries.put_(o_THC, o_BHLC)
        queries.put_(lse_TH, lse_BHL)
    return o_THC, lse_TH


def backward(
    do_THC: Tensor,
    q_THC: Tensor,
    k_SKC: Tensor,
    v_SKC: Tensor,
    o_THC: Tensor,
    lse_TH: Tensor,
    offsets_N: Tensor,
    is_causal: bool,
    key_offsets_N: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of the output."""
    calls = _calls(offsets_N, key_offsets_N, is_causal, q_THC, k_SKC)
    do_THC, q_THC, k_SKC, v_SKC, o_THC = (_dense_channels(x) for x in (do_THC, q_THC, k_SKC, v_SKC, o_THC))
    grads = [x.new_empty(x.shape) for x in (q_THC, k_SKC, v_SKC)]
    first = 0 if key_offsets_N is not None else int(offsets_N[-1])
    for grad in grads:
        grad[first:] = 0
    for queries, keys in calls:
        do_BHLC, o_BHLC, lse_BHL = queries.rows(do_THC, zero_pads=True), queries.rows(o_THC), queries.rows(lse_TH)
        qkv = queries.rows(q_THC), keys.rows(k_SKC), keys.rows(v_SKC)
        parts = FLASH_CPU_GRAD(do_BHLC, *qkv, o_BHLC, lse_BHL, 0.0, is_causal)
        if queries.covers(q_THC) and keys.covers(k_SKC):
            dq_THC, dk_SKC, dv_SKC = (
                part.transpose(1, 2).reshape(grad.shape) for part, grad in zip(parts, grads, strict=True)
            )
            return dq_THC, dk_SKC, dv_SKC
        for rows, grad, part in zip((queries, keys, keys), grads, parts, strict=True):
            rows.put_(grad, part)
    return grads[0], grads[1], grads[2]


def _dense_channels(x_THC: Tensor) -> Tensor:
    """The kernel wants neighbouring channels; other strides are free."""
    return x_THC if x_THC.stride(-1) == 1 else x_THC.contiguous()


def fake(q_THC: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    """`forward` of tensors without values."""
    return q_THC.new_empty(q_THC.shape), q_THC.new_empty(q_THC.shape[:2], dtype=wide(q_THC.dtype))


def fake_grad(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    """`backward` of tensors without values."""
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *qkv, offsets_N, ctx.settings, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*qkv, *output, offsets_N)


def _gradient(ctx: Context, do_THC: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if do_THC is None:
        return (None,) * 6
    return *ATTENTION_GRAD(do_THC, *ctx.saved_tensors, ctx.settings, None), None, None, None


ATTENTION = operator("mmfn::attention", forward, fake)
ATTENTION_GRAD = operator("mmfn::attention_grad", backward, fake_grad)
_attend = ATTENTION.with_gradient(_save, _gradient)

OPERATORS = flops.register(
    {"mmfn::attention": flops.packed_attention, "mmfn::attention_grad": flops.packed_attention_grad}
)
OF_TORCH = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
)
"""What `attention` appears as on other devices."""
KERNEL = Kernel(attention, operators=OPERATORS, results=("mmfn::attention", *OF_TORCH))
