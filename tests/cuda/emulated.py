"""The numbers of torch's operators of GPUs, on the CPU and in any dtype: what their documents say, segment by segment.

Nothing of mmfn is used. What a kernel leaves unwritten is NaN here, so that whoever reads it is found.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

calls: Counter[str] = Counter()


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int, dropout: float,
    is_causal: bool, debug: bool, *, scale: float | None = None, **rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`aten::_flash_attention_forward` of packed rows [T, H, C]; the log-sum-exp is [H, T], +inf without keys."""
    calls["forward"] += 1
    _check(q, ends_q, ends_k, max_q, max_k, dropout, rest)
    out = torch.full_like(q, torch.nan)
    lse = torch.full((q.shape[1], q.shape[0]), torch.nan, dtype=_wide(q))
    for (a, b), (c, d) in zip(_spans(ends_q), _spans(ends_k), strict=True):
        scores = _scores(q[a:b], k[c:d], scale, is_causal)
        total = scores.logsumexp(-1) if d > c else scores.new_full(scores.shape[:2], torch.inf)
        probs = (scores - total[..., None]).exp()
        out[a:b] = torch.einsum("hqk,khc->qhc", probs, _heads(v[c:d], q)).to(q.dtype)
        lse[:, a:b] = total
    state = torch.zeros(2, dtype=torch.uint64)
    return out, lse, state, state.new_zeros(()), q.new_zeros(0)


def flash_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int,
    max_k: int, dropout: float, is_causal: bool, state: Tensor, unused: Tensor, *, scale: float | None = None,
    **rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`aten::_flash_attention_backward`: gradients by the log-sum-exp and output that are given."""
    calls["backward"] += 1
    _check(q, ends_q, ends_k, max_q, max_k, dropout, rest)
    assert lse.shape == (q.shape[1], q.shape[0])
    assert lse.is_contiguous()
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
    scale = q.shape[2] ** -0.5 if scale is None else scale
    for (a, b), (c, d) in zip(_spans(ends_q), _spans(ends_k), strict=True):
        probs = (_scores(q[a:b], k[c:d], scale, is_causal) - lse[:, a:b, None]).exp()
        wide_do, wide_o, wide_q = (x[a:b].to(_wide(q)) for x in (do, o, q))
        slope = torch.einsum("qhc,khc->hqk", wide_do, _heads(v[c:d], q)) - (wide_do * wide_o).sum(-1).T[..., None]
        ds = probs * slope * scale
        dq[a:b] = torch.einsum("hqk,khc->qhc", ds, _heads(k[c:d], q)).to(q.dtype)
        groups = (-1, k.shape[1], q.shape[1] // k.shape[1], q.shape[2])
        dk[c:d] = torch.einsum("hqk,qhc->khc", ds, wide_q).reshape(groups).sum(2).to(k.dtype)
        dv[c:d] = torch.einsum("hqk,qhc->khc", probs, wide_do).reshape(groups).sum(2).to(v.dtype)
    return dq, dk, dv


def grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    """`aten::_grouped_mm`: [R, D] x [E, D, F], groups of rows times a matrix each, or [F, R] x [R, D], columns times
    rows by groups."""
    calls["grouped_mm"] += 1
    assert offs is not None
    assert offs.dtype == torch.int32
    assert bias is None
    assert out_dtype in (None, a.dtype)
    ends = [0, *offs.tolist()]
    if b.ndim == 3:
        out = a.new_full((a.shape[0], b.shape[2]), torch.nan)
        for e, (start, end) in enumerate(pairwise(ends)):
            out[start:end] = a[start:end] @ b[e]
        return out
    return torch.stack([a[:, start:end] @ b[start:end] for start, end in pairwise(ends)])


def rms_norm(x: Tensor, shape: list[int], weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
    """`aten::_fused_rms_norm` over the last dim: in float32 or wider, rounded once; and the inverse of the root."""
    calls["rms_norm"] += 1
    assert weight is not None
    assert eps is not None
    assert weight.dtype == x.dtype
    assert list(shape) == list(weight.shape) == [x.shape[-1]]
    wide_x = x.to(_wide(x))
    rstd = (wide_x * wide_x).mean(-1, keepdim=True).add(eps).pow(-0.5)
    return (wide_x * rstd * weight.to(_wide(x))).to(x.dtype), rstd


def rms_norm_grad(
    dy: Tensor, x: Tensor, shape: list[int], rstd: Tensor, weight: Tensor | None, mask: list[bool]
) -> tuple[Tensor, Tensor | None]:
    """`aten::_fused_rms_norm_backward`: gradients of x and of the weight, None for what the mask leaves out."""
    calls["rms_norm_grad"] += 1
    assert weight is not None
    assert weight.dtype == x.dtype == dy.dtype
    assert dy.is_contiguous()
    assert x.is_contiguous()
    assert rstd.shape == (*x.shape[:-1], 1)
    assert list(shape) == [x.shape[-1]]
    assert mask[0] is True
    unit, slope = x.to(_wide(x)) * rstd, dy.to(_wide(x)) * weight.to(_wide(x))
    dx = (slope - unit * (slope * unit).mean(-1, keepdim=True)) * rstd
    dw = (dy.to(_wide(x)) * unit).reshape(-1, x.shape[-1]).sum(0)
    calls["rms_norm_grad of weights"] += mask[1]
    return dx.to(x.dtype), dw.to(weight.dtype) if mask[1] else None


KERNELS = {
    "_flash_attention_forward": flash_forward,
    "_flash_attention_backward": flash_backward,
    "_grouped_mm": grouped_mm,
    "_fused_rms_norm": rms_norm,
    "_fused_rms_norm_backward": rms_norm_grad,
}


@contextmanager
def emulated(**changed: Any) -> Iterator[None]:
    """CPU tensors have these operators for the time of the block. `changed`: others in their place."""
    calls.clear()
    library = torch.library.Library("aten", "IMPL")
    try:
        for name, fn in {**KERNELS, **changed}.items():
            library.impl(name, fn, "CPU", allow_override=True)
        yield
    finally:
        library._destroy()


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _spans(ends: Tensor) -> list[tuple[int, int]]:
    return list(pairwise(ends.tolist()))


def _heads(x: Tensor, q: Tensor) -> Tensor:
    return x.to(_wide(q)).repeat_interleave(q.shape[1] // x.shape[1], 1)


def _scores(q: Tensor, k: Tensor, scale: float | None, is_causal: bool) -> Tensor:
    """[H, Q, K] of one segment; a causal mask is aligned at the last query and the last key."""
    scores = torch.einsum("qhc,khc->hqk", q.to(_wide(q)), _heads(k, q)) * (
        q.shape[2] ** -0.5 if scale is None else scale
    )
    if is_causal:
        seen = torch.arange(k.shape[0]) <= torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores


def _check(q: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int, dropout: float, rest: Any) -> None:
    assert ends_q.dtype == ends_k.dtype == torch.int32
    assert ends_q.shape == ends_k.shape
    assert q.stride(-1) == 1
    assert dropout == 0
    assert min(max_q, max_k) > 0, "a kernel is not started for nothing"
    assert not {name for name, value in rest.items() if value is not None}, "windows and tables of blocks are not used"
    for ends, longest in ((ends_q, max_q), (ends_k, max_k)):
        assert int(ends.diff().max()) <= longest, "blocks behind the longest segment are not started"
