"""Packages that compute what their documents say, in any dtype, token by token: modules for `sys.modules`.

Nothing of mmfn is used. Backwards are written by hand: operators run where autograd records nothing. What a kernel
leaves unwritten is NaN here, so that whoever reads it is found.
"""

import math
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.cuda.emulated import flash_backward, flash_forward

CHUNK = 64
calls: Counter[str] = Counter()


def l2norm_fwd(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Rows of unit length, and the inverse of their length."""
    wide = x.to(_wide(x))
    rstd = 1 / torch.sqrt((wide * wide).sum(-1) + eps)
    return (wide * rstd[..., None]).to(x.dtype), rstd.flatten()


def l2norm_bwd(y: Tensor, rstd: Tensor, dy: Tensor, eps: float = 1e-6) -> Tensor:
    """From what the forward returned."""
    wide_y, wide_dy = y.to(_wide(y)), dy.to(_wide(y))
    dx = (wide_dy - (wide_dy * wide_y).sum(-1, keepdim=True) * wide_y) * rstd.view(y.shape[:-1])[..., None]
    return dx.to(y.dtype)


def chunk_gated_delta_rule_fwd(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, initial_state: Tensor | None,
    output_final_state: bool, state_v_first: bool = False, cu_seqlens: Tensor | None = None, cp_context: Any = None,
    chunk_indices: Tensor | None = None, use_gate_in_kernel: bool = False, A_log: Tensor | None = None,
    dt_bias: Tensor | None = None, chunk_size: int = CHUNK,
) -> tuple[Any, ...]:  # fmt: skip
    """Decays summed within chunks, in powers of 2; the output; inverses of chunks; end states; states before; None."""
    calls["rule"] += 1
    assert (state_v_first, cp_context, use_gate_in_kernel, chunk_size) == (False, None, False, CHUNK)
    spans = _spans(cu_seqlens, chunk_indices, q, k, v, g, beta)
    kinds = _wide(g), v.dtype, k.dtype, _wide(v)
    q, k, v, g, beta = (x.double() for x in (q, k, v, g, beta))
    decay, o, inverse = torch.full_like(g, torch.nan), torch.full_like(v, torch.nan), _empty_inverse(k, beta)
    ends = _states(initial_state, q, v, len(spans))
    for n, (a, b) in enumerate(spans):
        for c in range(a, b, CHUNK):
            decay[0, c : min(c + CHUNK, b)] = g[0, c : min(c + CHUNK, b)].cumsum(0) / math.log(2)
            inverse[0, c : min(c + CHUNK, b)] = _inverse(k, beta, decay, c, min(c + CHUNK, b))
        for t, _, state, _ in _walk(k, v, g, beta, a, b, ends[n]):
            o[0, t] = torch.einsum("hcv,hc->hv", state, _heads(q, v)[t]) * scale
            ends[n] = state
    decay, o, inverse, ends = (x.to(kind) for x, kind in zip((decay, o, inverse, ends), kinds, strict=True))
    return decay, o, inverse, ends if output_final_state else None, initial_state, None


def chunk_gated_delta_rule_bwd(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, A: Tensor, scale: float, initial_state: Tensor | None,
    do: Tensor, dht: Tensor | None, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
    cp_context: Any = None, chunk_indices: Tensor | None = None, use_gate_in_kernel: bool = False,
    g_input: Tensor | None = None, A_log: Tensor | None = None, dt_bias: Tensor | None = None, chunk_size: int = CHUNK,
) -> tuple[Any, ...]:  # fmt: skip
    """Gradients of q, k, v, beta, g and the states before. `g` and `A` are what the forward returned."""
    calls["rule_grad"] += 1
    assert (state_v_first, cp_context, use_gate_in_kernel, chunk_size) == (False, None, False, CHUNK)
    spans = _spans(cu_seqlens, chunk_indices, q, k, v, g, beta, do)
    kinds, tolerance = (q.dtype, k.dtype, v.dtype, beta.dtype, g.dtype), 1e-9 if A.dtype == torch.float64 else 2e-2
    assert g.dtype == _wide(g), "sums are not narrow"
    q, k, v, g, beta, A, do = (x.double() for x in (q, k, v, g, beta, A, do))
    raw, dstates = torch.full_like(g, torch.nan), _states(dht, q, v, len(spans))
    for a, b in spans:
        for c in range(a, b, CHUNK):
            d = min(c + CHUNK, b)
            raw[0, c:d] = torch.diff(g[0, c:d], dim=0, prepend=torch.zeros_like(g[0, :1])) * math.log(2)
            torch.testing.assert_close(A[0, c:d], _inverse(k, beta, g, c, d), rtol=tolerance, atol=tolerance)
    dq, dk = (x.new_full((*v.shape[1:3], x.shape[3]), torch.nan) for x in (q, k))
    dv, dbeta, dg = (torch.full_like(x, torch.nan) for x in (v, beta, g))
    starts = _states(initial_state, q, v, len(spans))
    for n, (a, b) in enumerate(spans):
        dstate = dstates[n].clone()
        for t, before, state, error in reversed(list(_walk(k, v, raw, beta, a, b, starts[n]))):
            q_t, k_t, fade = _heads(q, v)[t], _heads(k, v)[t], raw[0, t].exp()
            dstate = dstate + torch.einsum("hc,hv->hcv", q_t, do[0, t]) * scale
            dq[t] = torch.einsum("hcv,hv->hc", state, do[0, t]) * scale
            dwritten = torch.einsum("hcv,hc->hv", dstate, k_t)
            dbeta[0, t] = (dwritten * error).sum(-1)
            dv[0, t] = dwritten * beta[0, t, :, None]
            faded = before * fade[:, None, None]
            dk[t] = torch.einsum("hcv,hv->hc", dstate, error * beta[0, t, :, None])
            dk[t] -= torch.einsum("hcv,hv->hc", faded, dv[0, t])
            dstate = dstate - torch.einsum("hc,hv->hcv", k_t, dv[0, t])
            dg[0, t] = (dstate * faded).sum((1, 2))
            dstate = dstate * fade[:, None, None]
        dstates[n] = dstate
    dq, dk = (x.view(len(x), k.shape[2], -1, x.shape[2]).sum(2)[None] for x in (dq, dk))
    grads = [x.to(kind) for x, kind in zip((dq, dk, dv, dbeta, dg), kinds, strict=True)]
    return *grads, dstates if initial_state is not None else None, None, None


def causal_conv1d_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, initial_state: Tensor | None = None,
    output_final_state: bool = False, activation: str | None = None, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_indices: Tensor | None = None, chunk_size: int = CHUNK,
    layout_fallback: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The convolution of every segment, then `activation`."""
    calls["conv"] += 1
    assert (bias, residual, initial_state, output_final_state) == (None, None, None, False)
    assert activation in (None, "silu")
    _check_host(cu_seqlens, cu_seqlens_cpu)
    y = torch.full_like(x, torch.nan)
    for a, b in _spans(cu_seqlens, chunk_indices, x):
        for t in range(a, b):
            y[0, t] = sum(x[0, t - j] * weight[:, -1 - j] for j in range(weight.shape[1]) if t - j >= a)
    return F.silu(y) if activation else y, None


def causal_conv1d_bwd(
    x: Tensor, dy: Tensor, dht: Tensor | None, weight: Tensor | None = None, bias: Tensor | None = None,
    residual: Tensor | None = None, initial_state: Tensor | None = None, activation: str | None = None,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None, chunk_indices: Tensor | None = None,
    chunk_size: int = CHUNK, layout_fallback: bool = False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, the weight, the bias, the residual and the state before."""
    calls["conv_grad"] += 1
    assert weight is not None
    assert (dht, residual) == (None, None)
    before, _ = causal_conv1d_fwd(
        x, weight, bias, None, initial_state, False, None, cu_seqlens, cu_seqlens_cpu, chunk_indices
    )
    s = before.sigmoid()
    dz = dy * s * (1 + before * (1 - s)) if activation else dy
    dx, dweight = torch.full_like(x, torch.nan), torch.zeros_like(weight)
    for a, b in _spans(cu_seqlens, chunk_indices, x, dy):
        for t in range(a, b):
            dx[0, t] = sum(dz[0, t + j] * weight[:, -1 - j] for j in range(weight.shape[1]) if t + j < b)
            for j in range(min(weight.shape[1], t - a + 1)):
                dweight[:, -1 - j] += dz[0, t] * x[0, t - j]
    return dx, dweight, None, None, None


def flash_attn_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, return_softmax: bool = False,
    block_table: Tensor | None = None, leftpad_k: Tensor | None = None, seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, the log-sum-exp [H, T], no probabilities, and the state of dropout."""
    calls["attention"] += 1
    _check_plain(window_size_left, window_size_right, softcap, alibi_slopes)
    assert (block_table, leftpad_k, seqused_k, zero_tensors, return_softmax) == (None, None, None, False, False)
    bounds = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    out, lse, *_ = flash_forward(q, k, v, *bounds, dropout_p, causal, False, scale=softmax_scale)
    return out, lse, q.new_zeros(0), torch.zeros(2, dtype=torch.int64)


def flash_attn_varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    rng_state: Tensor | None = None, zero_tensors: bool = False,
) -> Tensor:  # fmt: skip
    """Writes dq, dk and dv; returns the products of output and gradient."""
    calls["attention_grad"] += 1
    _check_plain(window_size_left, window_size_right, softcap, alibi_slopes)
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    assert (zero_tensors, rng_state) == (False, None)
    bounds, state = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), torch.zeros(2)
    grads = flash_backward(
        dout, q, k, v, out, softmax_lse, *bounds, dropout_p, causal, state, state, scale=softmax_scale
    )
    for mine, grad in zip((dq, dk, dv), grads, strict=True):
        assert mine is not None
        mine.copy_(grad)
    return (dout * out).sum(-1).T


FUNCTIONS = {
    "fla.modules.norm.l2norm": {"l2norm_fwd": l2norm_fwd, "l2norm_bwd": l2norm_bwd},
    "fla.ops.gated_delta_rule.chunk": {
        "chunk_gated_delta_rule_fwd": chunk_gated_delta_rule_fwd,
        "chunk_gated_delta_rule_bwd": chunk_gated_delta_rule_bwd,
    },
    "fla.modules.causal_conv1d": {"causal_conv1d_fwd": causal_conv1d_fwd, "causal_conv1d_bwd": causal_conv1d_bwd},
    "flash_attn.flash_attn_interface": {
        "_flash_attn_varlen_forward": flash_attn_varlen_forward,
        "_flash_attn_varlen_backward": flash_attn_varlen_backward,
    },
}
"""Module -> its functions that are called."""


@contextmanager
def installed() -> Iterator[dict[str, ModuleType]]:
    """The modules are there for the time of the block."""
    calls.clear()
    modules = {name: ModuleType(name) for name in FUNCTIONS}
    for name, functions in FUNCTIONS.items():
        modules[name].__dict__.update(functions)
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield modules
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _walk(
    k: Tensor, v: Tensor, g: Tensor, beta: Tensor, a: int, b: int, state: Tensor
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Of each token of a segment: its place, the states before and behind it, and what the state has wrong of v."""
    for t in range(a, b):
        before = state
        state, k_t = before * g[0, t].exp()[:, None, None], _heads(k, v)[t]
        error = v[0, t] - torch.einsum("hcv,hc->hv", state, k_t)
        state = state + torch.einsum("hc,hv->hcv", k_t, error * beta[0, t, :, None])
        yield t, before, state, error


def _heads(x: Tensor, v: Tensor) -> Tensor:
    """[T, H, C]: head h of values has head h // (H / K) of keys."""
    return x[0].repeat_interleave(v.shape[2] // x.shape[2], 1)


def _inverse(k: Tensor, beta: Tensor, decay: Tensor, a: int, b: int) -> Tensor:
    """Of tokens a to b, a chunk: rows of (1 + strictly lower part of beta k k^T by decays)^-1, zeros behind them."""
    keys = k[0, a:b].repeat_interleave(beta.shape[2] // k.shape[2], 1).transpose(0, 1)
    sums = decay[0, a:b].T * math.log(2)
    products = (keys @ keys.mT) * (sums[:, :, None] - sums[:, None, :]).exp() * beta[0, a:b].T[..., None]
    inverse = torch.linalg.inv(products.tril(-1) + torch.eye(b - a, dtype=products.dtype))
    return F.pad(inverse, (0, CHUNK - (b - a))).transpose(0, 1).to(k.dtype)


def _empty_inverse(k: Tensor, beta: Tensor) -> Tensor:
    return k.new_zeros(1, *beta.shape[1:], CHUNK)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _states(states: Tensor | None, q: Tensor, v: Tensor, num: int) -> Tensor:
    if states is None:
        return v.new_zeros(num, v.shape[2], q.shape[3], v.shape[3])
    assert states.shape == (num, v.shape[2], q.shape[3], v.shape[3])
    return states.to(v.dtype, copy=True)


def _spans(cu_seqlens: Tensor | None, chunk_indices: Tensor | None, *rows: Tensor) -> list[tuple[int, int]]:
    """Segments of a batch of one, whose rows are dense; their chunks are those that are given."""
    assert cu_seqlens is not None
    assert chunk_indices is not None
    assert all(x.shape[0] == 1 for x in rows)
    assert all(x.is_contiguous() for x in rows)
    spans = list(pairwise(cu_seqlens.tolist()))
    expected = [[n, i] for n, (a, b) in enumerate(spans) for i in range(-(-(b - a) // CHUNK))]
    assert chunk_indices.tolist() == expected
    return spans


def _check_host(cu_seqlens: Tensor | None, on_host: Tensor | None) -> None:
    assert cu_seqlens is not None
    assert on_host is not None
    assert on_host.device.type == "cpu"
    assert torch.equal(cu_seqlens.cpu(), on_host)


def _check_plain(left: int, right: int, softcap: float, slopes: Tensor | None) -> None:
    """No window, no cap of scores, no slopes."""
    assert (left, right, softcap, slopes) == (-1, -1, 0.0, None)
