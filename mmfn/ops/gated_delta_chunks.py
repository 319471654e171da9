"""The gated delta rule in chunks of tokens: its forward, its backward and its states, for one packed row.

The rule, for one head, from a state S = 0 before a segment's first token (q and k of unit length, o to be scaled):

    S_t = e^g_t (I - beta_t k_t k_t^T) S_(t-1) + beta_t k_t v_t^T        o_t = S_t^T q_t

A chunk of L tokens, S the state before it, sum_i the sum of g from the chunk's or the segment's first token to i:

    pairs_ij = e^(sum_i - sum_j) [j <= i, one segment]    enter_i = e^sum_i [the segment of the token before the chunk]
    leave_j = e^(sum_L - sum_j) [the segment of the last token]    whole = e^sum_L [one segment, from before on]
    [U | Y] = (I + strict lower(beta_i (k_i . k_j) pairs_ij))^-1 beta [v | enter k]        u = U - Y S
    o = enter (q S) + ((q k^T) pairs) u                                 S' = whole S + (leave k)^T u

Masks come before exponentials, so factors between segments are exact zeros and what is in one changes no bit of
another. Everything of a chunk but the state is computed for all chunks at once, for a block of heads at a time, in
float32 or wider; the backward computes it again. Padding behind the last segment is left out.
Source: Yang et al. 2024 (arXiv:2412.06464), equations 8 to 10; Yang et al. 2024 (arXiv:2406.06484) for the chunks.

Legend: T tokens, K heads of queries and keys, H of values, C key channels, V value channels, N segments; B chunks of L
tokens. In chunks a block of heads of values has as many of keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfn.dtypes import wide
from mmfn.ops.attention import read_offsets
from mmfn.ops.custom import turns

CHUNK = 64
"""Tokens of a chunk: float32 is off by 1e-6 of float64 at 64, twice that at 128, and products of 32 are slower."""
BLOCK_VALUES = 2**17
"""Values of one tensor of a block of heads: 512 KiB of float32. A head of more is a block of its own; larger blocks
take more time, and memory in proportion."""
NORM_EPS = 1e-6  # of the length of q and k, as in transformers


def row_forward(
    q_TKC: Tensor,
    k_TKC: Tensor,
    v_THV: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
    offsets_N: Tensor,
    state_HCV: Tensor | None,
) -> Tensor:
    """o_THV in v's dtype. `state_HCV`: before the first token (None: zero). Offsets are on the host, here and below."""
    T, run_T, (o_THV,) = _prepare(offsets_N, v_THV)
    q_TKC, k_TKC, v_THV, g_TH, beta_TH = (x[:T] for x in (q_TKC, k_TKC, v_THV, g_TH, beta_TH))
    dtype, scale = wide(v_THV.dtype), q_TKC.shape[2] ** -0.5
    for keys, groups in _blocks(k_TKC, v_THV):
        q, k = (_unit(_to_chunks(x[:, keys].to(dtype)))[0] for x in (q_TKC, k_TKC))
        for heads in groups:
            chunks = _chunks(k, _to_chunks(v_THV[:, heads].to(dtype)), g_TH[:, heads], beta_TH[:, heads], run_T)
            states = _scan(chunks, _state(chunks, state_HCV, heads))[:-1]
            u = _add_(chunks.u, chunks.y, states, -1)
            o_BHLV = _add_((q * chunks.enter) @ states, (q @ k.mT).mul_(chunks.pairs), u)
            o_THV[:T, heads] = _from_chunks(o_BHLV.mul_(scale), T)
    return o_THV


def row_backward(
    do_THV: Tensor,
    q_TKC: Tensor,
    k_TKC: Tensor,
    v_THV: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
    offsets_N: Tensor,
    state_HCV: Tensor | None,
    dend_HCV: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g and beta from those of the output and of the last segment's end state (None: zero)."""
    T, run_T, grads = _prepare(offsets_N, q_TKC, k_TKC, v_THV, g_TH, beta_TH)
    dq_TKC, dk_TKC, dv_THV, dg_TH, dbeta_TH = grads
    do_THV, q_TKC, k_TKC, v_THV, g_TH, beta_TH = (x[:T] for x in (do_THV, q_TKC, k_TKC, v_THV, g_TH, beta_TH))
    dtype, scale = wide(v_THV.dtype), q_TKC.shape[2] ** -0.5
    for keys, groups in _blocks(k_TKC, v_THV):
        (q, q_rlength), (k, k_rlength) = (_unit(_to_chunks(x[:, keys].to(dtype))) for x in (q_TKC, k_TKC))
        dq = dk = k.new_zeros(())
        for heads in groups:
            v, do = _to_chunks(v_THV[:, heads].to(dtype)), _to_chunks(do_THV[:, heads].to(dtype) * scale)
            chunks = _chunks(k, v, g_TH[:, heads], beta_TH[:, heads], run_T)
            state, dend = _state(chunks, state_HCV, heads), _state(chunks, dend_HCV, heads)
            dq_part, dk_part, *parts = _chunk_gradients(do, q, v, chunks, state, dend)
            dq, dk = dq_part.add_(dq), dk_part.add_(dk)
            dv_THV[:T, heads], dg_TH[:T, heads], dbeta_TH[:T, heads] = (_from_chunks(x, T) for x in parts)
        dq_TKC[:T, keys] = _from_chunks(_unit_grad(dq, q, q_rlength), T)
        dk_TKC[:T, keys] = _from_chunks(_unit_grad(dk, k, k_rlength), T)
    return dq_TKC, dk_TKC, dv_THV, dg_TH, dbeta_TH


def entry_backward(
    do_THV: Tensor, q_TKC: Tensor, k_TKC: Tensor, g_TH: Tensor, beta_TH: Tensor, offsets_N: Tensor
) -> Tensor:
    """The gradient of the state before the first token from that of the output; it does not depend on v."""
    T, run_T = _runs(offsets_N, do_THV)
    do_THV, q_TKC, k_TKC, g_TH, beta_TH = (x[:T] for x in (do_THV, q_TKC, k_TKC, g_TH, beta_TH))
    dtype, scale = wide(do_THV.dtype), q_TKC.shape[2] ** -0.5
    dstate_HCV = do_THV.new_zeros(do_THV.shape[1], k_TKC.shape[2], do_THV.shape[2], dtype=dtype)
    for keys, groups in _blocks(k_TKC, do_THV):
        q, k = (_unit(_to_chunks(x[:, keys].to(dtype)))[0] for x in (q_TKC, k_TKC))
        for heads in groups:
            do = _to_chunks(do_THV[:, heads].to(dtype) * scale)
            chunks = _chunks(k, do[..., :0], g_TH[:, heads], beta_TH[:, heads], run_T)
            du = (q @ k.mT).mul_(chunks.pairs).mT @ do
            dstate_HCV[heads] = _scan_back(chunks, q * chunks.enter, do, du, dstate_HCV[heads])[0]
    return dstate_HCV


def end_states(
    k_TKC: Tensor, v_THV: Tensor, g_TH: Tensor, beta_TH: Tensor, offsets_N: Tensor, state_NHCV: Tensor | None
) -> Tensor:
    """The state behind the last token of every segment, float32 or wider; `state_NHCV` may be wider than v."""
    C, (H, V), dtype = k_TKC.shape[2], v_THV.shape[1:], wide(v_THV.dtype)
    if state_NHCV is None:
        end_NHCV = v_THV.new_zeros(len(offsets_N) - 1, H, C, V, dtype=dtype)
    else:
        end_NHCV = state_NHCV.to(dtype, copy=True, memory_format=torch.contiguous_format)
    for n, (first, last) in _segments(offsets_N, v_THV):
        _to_end_(end_NHCV[n], *(x[first:last] for x in (k_TKC, v_THV, g_TH, beta_TH)))
    return end_NHCV


def _to_end_(state_HCV: Tensor, k_LKC: Tensor, v_LHV: Tensor, g_LH: Tensor, beta_LH: Tensor) -> None:
    """Bring a state from before the first token of one segment behind its last."""
    run_L, more = torch.zeros(len(v_LHV), dtype=torch.int64, device=v_LHV.device), state_HCV.shape[2] - v_LHV.shape[2]
    for keys, groups in _blocks(k_LKC, v_LHV):
        k = _unit(_to_chunks(k_LKC[:, keys].to(state_HCV.dtype)))[0]
        for heads in groups:
            v = F.pad(_to_chunks(v_LHV[:, heads].to(state_HCV.dtype)), (0, more))
            chunks = _chunks(k, v, g_LH[:, heads], beta_LH[:, heads], run_L)
            state_HCV[heads] = _scan(chunks, state_HCV[heads])[-1]


def _segments(offsets_N: Tensor, x: Tensor) -> list[tuple[int, tuple[int, int]]]:
    """Number, first and last token of every segment; for x on the meta device (see `turns`) one of each length."""
    segments = list(enumerate(pairwise(read_offsets(offsets_N, x).tolist())))
    return list({last - first: (n, (first, last)) for n, (first, last) in segments}.values()) if x.is_meta else segments


@dataclass(frozen=True, kw_only=True)
class _Chunks:
    """A block of heads in chunks: unit keys, the factors of the module's docstring and the solutions U and Y.

    `k`, `y`, `leaving` (leave k): [B, H, L, C]. `u`: [B, H, L, V], to be overwritten by u. `pairs`, `kk` (products of
    keys) and `inverse` (of the triangle): [B, H, L, L]. `beta`, `enter`, `leave`: [B, H, L, 1]. `whole`: [B, H, 1, 1].
    `same`: [B, 1, L, L], 1 where j <= i are of one segment.
    """

    k: Tensor
    u: Tensor
    y: Tensor
    pairs: Tensor
    kk: Tensor
    inverse: Tensor
    beta: Tensor
    enter: Tensor
    leave: Tensor
    leaving: Tensor
    whole: Tensor
    same: Tensor


def _chunks(k: Tensor, v: Tensor, g_TH: Tensor, beta_TH: Tensor, run_T: Tensor) -> _Chunks:
    """`k`: [B, H, L, C], unit keys. `v`: [B, H, L, V]."""
    g, beta = (_to_chunks(x.to(k.dtype))[..., None] for x in (g_TH, beta_TH))
    run_BL = torch.cat([run_T, run_T[-1:].expand(-len(run_T) % CHUNK)]).view(-1, CHUNK)
    before_B1 = torch.cat([run_BL[:1, :1], run_BL[:-1, -1:]])
    lower_LL = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=k.device).tril()
    same_B1LL = ((run_BL[:, :, None] == run_BL[:, None, :]) & lower_LL)[:, None]
    is_first_B1L1, is_last_B1L1 = ((run_BL == x)[:, None, :, None] for x in (before_B1, run_BL[:, -1:]))
    sum_BHL1 = same_B1LL.to(k.dtype) @ g
    pairs = (sum_BHL1 - sum_BHL1.mT).masked_fill_(~same_B1LL, -torch.inf).exp_()
    enter = sum_BHL1.masked_fill(~is_first_B1L1, -torch.inf).exp_()
    leave = (sum_BHL1[:, :, -1:] - sum_BHL1).masked_fill_(~is_last_B1L1, -torch.inf).exp_()
    kk = k @ k.mT
    inverse = _inverse((kk * pairs).mul_(beta))
    return _Chunks(
        k=k,
        u=inverse @ (v * beta),
        y=inverse @ (k * enter).mul_(beta),
        pairs=pairs,
        kk=kk,
        inverse=inverse,
        beta=beta,
        enter=enter,
        leave=leave,
        leaving=k * leave,
        whole=enter[:, :, -1:],
        same=same_B1LL.to(k.dtype),
    )


def _scan(chunks: _Chunks, state_HCV: Tensor) -> Tensor:
    """States before every chunk and, last, behind all: [B + 1, H, C, V]."""
    states = state_HCV.new_empty(len(chunks.k) + 1, *state_HCV.shape)
    states[0] = state_HCV
    for i in turns(range(len(chunks.k)), chunks.k):
        u_HLV = torch.baddbmm(chunks.u[i], chunks.y[i], states[i], alpha=-1)
        torch.mul(states[i], chunks.whole[i], out=states[i + 1]).baddbmm_(chunks.leaving[i].mT, u_HLV)
    return states


def _scan_back(chunks: _Chunks, entering_q: Tensor, do: Tensor, du: Tensor, dend_HCV: Tensor) -> Tensor:
    """Gradients of the states of `_scan`. `du`: what comes from the output inside the chunks."""
    dstates = dend_HCV.new_empty(len(chunks.k) + 1, *dend_HCV.shape)
    dstates[-1] = dend_HCV
    torch.matmul(entering_q.mT, do, out=dstates[:-1])
    for i in turns(range(len(chunks.k))[::-1], chunks.k):
        du_HLV = torch.baddbmm(du[i], chunks.leaving[i], dstates[i + 1])
        dstates[i].baddbmm_(chunks.y[i].mT, du_HLV, alpha=-1).addcmul_(dstates[i + 1], chunks.whole[i])
    return dstates


def _chunk_gradients(
    do: Tensor, q: Tensor, v: Tensor, chunks: _Chunks, state_HCV: Tensor, dend_HCV: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of unit q and k, v, g and beta; all in chunks. `do`: times q's scale."""
    k, enter, states = chunks.k, chunks.enter, _scan(chunks, state_HCV)[:-1]
    u, qk, entering_q = _add_(chunks.u, chunks.y, states, -1), q @ k.mT, q * enter
    du = (qk * chunks.pairs).mT @ do
    after = _scan_back(chunks, entering_q, do, du, dend_HCV)[1:]
    dright = chunks.inverse.mT @ _add_(du, chunks.leaving, after)
    dpairs_qk = (do @ u.mT).mul_(chunks.pairs)
    dpairs_kk = (dright @ u.mT).mul_(chunks.pairs).neg_().tril_(-1)
    dbeta = (dpairs_kk * chunks.kk).sum(-1, keepdim=True)
    dpairs_kk *= chunks.beta

    dq = do @ states.mT
    denter = (dq * entering_q).sum(-1, keepdim=True)
    dq = _add_(dq.mul_(enter), dpairs_qk, k)
    dk = u @ after.mT
    dleave = (dk * chunks.leaving).sum(-1, keepdim=True)
    dk = _add_(_add_(dk.mul_(chunks.leave), dpairs_qk.mT, q), dpairs_kk + dpairs_kk.mT, k)
    k_states = (k @ states).mul_(enter)
    dv = dright * chunks.beta
    denter -= (dv * k_states).sum(-1, keepdim=True)
    dbeta += (v - k_states).mul_(dright).sum(-1, keepdim=True)
    dk = _add_(dk, torch.mul(dv, enter, out=k_states), states.mT, -1)

    dpairs = dpairs_qk.mul_(qk).addcmul_(dpairs_kk, chunks.kk).tril_(-1)  # a token's pair with itself has no decay
    dsum = dpairs.sum(-1, keepdim=True).sub_(dpairs.sum(-2)[..., None]).add_(denter).sub_(dleave)
    dwhole = torch.linalg.vecdot(after.flatten(2), states.flatten(2))[..., None, None] * chunks.whole
    dsum[:, :, -1:] += dleave.sum(-2, keepdim=True) + dwhole
    return dq, dk, dv, (chunks.same.mT @ dsum)[..., 0], dbeta[..., 0]


def _add_(x: Tensor, a: Tensor, b: Tensor, factor: int = 1) -> Tensor:
    """`x += factor * a @ b`, without a tensor for the product."""
    x.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1), alpha=factor)
    return x


def _inverse(lower: Tensor) -> Tensor:
    """`(I + strictly lower part)^-1`, of blocks twice as large at each step: products alone, for any device.

    Of a block [[a, 0], [c, b]] the inverse is [[1/a, 0], [-1/b c 1/a, 1/b]].
    """
    inverse = torch.eye(CHUNK, dtype=lower.dtype, device=lower.device).expand(lower.shape).contiguous()
    size = 1
    while size < CHUNK:
        grid = (CHUNK // (2 * size), 2 * size)
        blocks, of_lower = (
            x.unflatten(-1, grid).unflatten(-3, grid).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)  # type: ignore[no-untyped-call]
            for x in (inverse, lower)
        )
        first, second = blocks[..., :size, :size], blocks[..., size:, size:]
        blocks[..., size:, :size] = -(second @ of_lower[..., size:, :size] @ first)
        size *= 2
    return inverse


def _blocks(k_TKC: Tensor, v_THV: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of heads of keys, and those of values that use them: as many at a time. Head h uses h // (H / K)."""
    (T, K, C), (H, V) = k_TKC.shape, v_THV.shape[1:]
    size, groups = max(1, BLOCK_VALUES // max(1, T * max(C, V))), H // K
    for i in turns(range(0, K if T else 0, size), k_TKC):
        end = min(K, i + size)
        yield slice(i, end), [slice(i * groups + j, end * groups, groups) for j in turns(range(groups), k_TKC)]


def _prepare(offsets_N: Tensor, *xs_T: Tensor) -> tuple[int, Tensor, list[Tensor]]:
    """Tokens of all segments, the number of each one's segment, and results like `xs_T`, zero behind those tokens."""
    num_tokens, run_T = _runs(offsets_N, xs_T[0])
    outs = [x.new_empty(x.shape) for x in xs_T]
    for out in outs:
        out[num_tokens:] = 0
    return num_tokens, run_T, outs


def _runs(offsets_N: Tensor, x: Tensor) -> tuple[int, Tensor]:
    """Tokens of all segments, and the number of each one's segment on x's device."""
    num_tokens = int(read_offsets(offsets_N, x)[-1])
    return num_tokens, torch.searchsorted(offsets_N, torch.arange(num_tokens), right=True).to(x.device)


def _state(chunks: _Chunks, state_HCV: Tensor | None, heads: slice) -> Tensor:
    """Some heads of a state at the row's edge, in the dtype of the chunks."""
    if state_HCV is not None:
        return state_HCV[heads].to(chunks.k.dtype)
    return chunks.k.new_zeros(chunks.k.shape[1], chunks.k.shape[3], chunks.u.shape[3])


def _to_chunks(x_TH: Tensor) -> Tensor:
    """[T, H, ...] -> [B, H, L, ...], zeros behind the last token."""
    x_TH = F.pad(x_TH, (*[0] * (2 * (x_TH.ndim - 1)), 0, -len(x_TH) % CHUNK))
    return x_TH.view(-1, CHUNK, *x_TH.shape[1:]).transpose(1, 2).contiguous()


def _from_chunks(x_BHL: Tensor, num_tokens: int) -> Tensor:
    return x_BHL.transpose(1, 2).flatten(0, 1)[:num_tokens]


def _unit(x_C: Tensor) -> tuple[Tensor, Tensor]:
    """x of length 1, and 1 / its length."""
    rlength_1 = torch.linalg.vector_norm(x_C, dim=-1, keepdim=True).square_().add_(NORM_EPS).rsqrt_()
    return x_C * rlength_1, rlength_1


def _unit_grad(dy_C: Tensor, y_C: Tensor, rlength_1: Tensor) -> Tensor:
    """Of x, from that of `_unit(x)`, which is overwritten."""
    return dy_C.addcmul_(y_C, (dy_C * y_C).sum(-1, keepdim=True), value=-1).mul_(rlength_1)


def forward_flops(
    q: Tensor, k_TKC: Tensor, v_THV: Tensor, g: Tensor, beta: Tensor, offsets_N: Tensor, *_: Any, **__: Any
) -> int:
    """Of `row_forward`, by the products above: `_chunks`, the scan, u, and the output from states and from u."""
    (H, V), C = v_THV.shape[1:], k_TKC.shape[2]
    return _in_chunks(offsets_N[-1:]) * H * (_chunks_flops(C, V) + 2 * CHUNK * (C + V) + 2 * C * V * 4)


def backward_flops(
    do: Tensor, q: Tensor, k_TKC: Tensor, v_THV: Tensor, g: Tensor, beta: Tensor, offsets_N: Tensor, *_: Any, **__: Any
) -> int:
    """Of `row_backward`."""
    (H, V), C = v_THV.shape[1:], k_TKC.shape[2]
    return _in_chunks(offsets_N[-1:]) * H * (_chunks_flops(C, V) + 2 * CHUNK * (1 + 4 * C + 4 * V) + 2 * C * V * 11)


def entry_flops(
    do_THV: Tensor, q: Tensor, k_TKC: Tensor, g: Tensor, beta: Tensor, offsets_N: Tensor, *_: Any, **__: Any
) -> int:
    """Of `entry_backward`."""
    (H, V), C = do_THV.shape[1:], k_TKC.shape[2]
    return _in_chunks(offsets_N[-1:]) * H * (_chunks_flops(C, 0) + 2 * CHUNK * (C + V) + 2 * C * V * 3)


def states_flops(
    k_TKC: Tensor, v_THV: Tensor, g: Tensor, beta: Tensor, offsets_N: Tensor, state_NHCV: Tensor | None, **_: Any
) -> int:
    """Of `end_states`, which cuts every segment into chunks of its own."""
    (H, V), C = v_THV.shape[1:], k_TKC.shape[2]
    V = V if state_NHCV is None else state_NHCV.shape[3]
    return _in_chunks(offsets_N.diff()) * H * (_chunks_flops(C, V) + 2 * C * V * 2)


def token_flops(num_heads: int, C: int, V: int) -> dict[str, int]:
    """Of a token: `forward`, and of the `backward` what it does not compute again (the chunks, the scan, u, q k^T)."""
    forward = _chunks_flops(C, V) + 2 * CHUNK * (C + V) + 2 * C * V * 4
    backward = 2 * CHUNK * (1 + 3 * C + 4 * V) + 2 * C * V * 8
    return {"forward": num_heads * forward, "backward": num_heads * backward}


def _chunks_flops(C: int, V: int) -> int:
    """Of a token and head in `_chunks`: the sum, products of keys, the inverse (CHUNK / 2s times two of s^3), U, Y."""
    return 2 * CHUNK * (1 + 2 * C + V) + 2 * (CHUNK**2 - 1) // 3


def _in_chunks(lengths_N: Tensor) -> int:
    """Tokens with what fills their chunks."""
    return int((-(-lengths_N // CHUNK) * CHUNK).sum())
