"""The gated delta rule over packed rows: a recurrence whose state holds values by keys, chunked (`gated_delta_chunks`).

For one head, from a state S = 0 before the first token of a segment, with q and k of unit length and q times C**-0.5:

    S_t = e^g_t (I - beta_t k_t k_t^T) S_(t-1) + beta_t k_t v_t^T        o_t = S_t^T q_t

Legend: T tokens, K heads of queries and keys, H of values, C key channels, V value channels, N segments, B rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfn.batch import Segments
from mmfn.dtypes import wide
from mmfn.ops import flops
from mmfn.ops import gated_delta_chunks as chunks
from mmfn.ops.attention import check_offsets
from mmfn.ops.custom import Context, operator
from mmfn.ops.kernel import Kernel, Whole


def gated_delta_rule(
    q_TKC: Tensor, k_TKC: Tensor, v_THV: Tensor, g_TH: Tensor, beta_TH: Tensor, segments: Segments
) -> Tensor:
    """The recurrence above within every segment; o_THV in v's dtype.

    `q_TKC`, `k_TKC`: floating[T, K, C], of any length: they are brought to unit length here (eps 1e-6 under the root),
    as what is saved for the backward are the arguments alone. `v_THV`: [T, H, V] of the same dtype, K dividing H (head
    h uses h // (H / K) of queries and keys). `g_TH`: [T, H], at most 0; e^g is what a token leaves of the state.
    `beta_TH`: [T, H] in [0, 1]. Computed in float32, or float64 for float64. What is in one segment changes no bit of
    another. Behind the last offset nothing is read; output and all gradients are zero there. Boundaries are read from
    the host's copy.

    Raises ValueError for shapes, dtypes or offsets that do not fit. Source: Yang et al. 2024 (arXiv:2412.06464);
    `torch_chunk_gated_delta_rule` with `use_qk_l2norm_in_kernel` in transformers 5.23, which knows no segments.
    Oracle: `gated_delta_rule_reference`.
    """
    check_inputs(q_TKC, k_TKC, v_THV, g_TH, beta_TH, segments)
    o_THV: Tensor = _rule(q_TKC, k_TKC, v_THV, g_TH, beta_TH, segments.host_N, None)
    return o_THV


def gated_delta_rule_reference(
    q_TKC: Tensor, k_TKC: Tensor, v_THV: Tensor, g_TH: Tensor, beta_TH: Tensor, segments: Segments
) -> Tensor:
    """`gated_delta_rule` token by token."""
    check_inputs(q_TKC, k_TKC, v_THV, g_TH, beta_TH, segments)
    return recurrent(q_TKC, k_TKC, v_THV, g_TH, beta_TH, segments=segments, state_HCV=None)[0]


def gated_delta_state(
    k_TKC: Tensor,
    v_THV: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
    segments: Segments,
    state_NHCV: Tensor | None = None,
) -> Tensor:
    """The state behind the last token of every segment, float32[N, H, C, V] (float64 for float64).

    Arguments as in `gated_delta_rule`. `state_NHCV`: before the first token of every segment, of the result's dtype
    (None: zero); an empty segment keeps it. It may have more columns than v, as if v were zero there: what becomes of
    the identity is the transition of a segment. Boundaries are read from the host's copy. Not differentiable. Raises
    ValueError as there, and for a state that does not fit. Oracle: `gated_delta_state_reference`.
    """
    check_inputs(k_TKC, k_TKC, v_THV, g_TH, beta_TH, segments)
    check_state(k_TKC, v_THV, segments, state_NHCV)
    rows = (x.detach() for x in (k_TKC, v_THV, g_TH, beta_TH))
    end_NHCV: Tensor = STATE(*rows, segments.host_N, state_NHCV)
    return end_NHCV


def gated_delta_state_reference(
    k_TKC: Tensor,
    v_THV: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
    segments: Segments,
    state_NHCV: Tensor | None = None,
) -> Tensor:
    """`gated_delta_state` token by token, one segment after the other."""
    check_inputs(k_TKC, k_TKC, v_THV, g_TH, beta_TH, segments)
    check_state(k_TKC, v_THV, segments, state_NHCV)
    dtype, shape = wide(v_THV.dtype), (segments.num, v_THV.shape[1], k_TKC.shape[2], v_THV.shape[2])
    states_NHCV = v_THV.new_zeros(shape, dtype=dtype) if state_NHCV is None else state_NHCV.clone()
    v_THV = F.pad(v_THV, (0, states_NHCV.shape[3] - v_THV.shape[2]))
    for n, (first, last) in enumerate(zip(segments.host_N[:-1].tolist(), segments.host_N[1:].tolist(), strict=True)):
        rows = [x[first:last].detach() for x in (k_TKC, k_TKC, v_THV, g_TH, beta_TH)]
        states_NHCV[n] = recurrent(*rows, segments=whole(last - first), state_HCV=states_NHCV[n])[1]
    return states_NHCV


def gated_delta_step(
    q_BKC: Tensor, k_BKC: Tensor, v_BHV: Tensor, g_BH: Tensor, beta_BH: Tensor, state_BHCV: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of every row: its output o_BHV in v's dtype, and the state behind it.

    Shapes as in `gated_delta_rule` with rows for tokens; `state_BHCV`: the state before, float32 or float64. Raises
    ValueError for shapes that do not fit. Oracle: `gated_delta_step_reference`.
    """
    _check_step(q_BKC, k_BKC, v_BHV, g_BH, beta_BH, state_BHCV)
    dtype, groups = state_BHCV.dtype, v_BHV.shape[1] // k_BKC.shape[1]
    q_BHC, k_BHC = (_unit(x.to(dtype)).repeat_interleave(groups, 1) for x in (q_BKC, k_BKC))
    state_BHCV = state_BHCV * g_BH.to(dtype).exp()[..., None, None]
    change_BH1V = v_BHV.to(dtype)[:, :, None] - k_BHC[:, :, None] @ state_BHCV
    change_BH1V = change_BH1V * beta_BH.to(dtype)[..., None, None]
    state_BHCV = torch.addcmul(state_BHCV, k_BHC[..., None], change_BH1V)
    o_BHV = ((q_BHC * q_BKC.shape[2] ** -0.5)[:, :, None] @ state_BHCV)[:, :, 0]
    return o_BHV.to(v_BHV.dtype), state_BHCV


def gated_delta_step_reference(
    q_BKC: Tensor, k_BKC: Tensor, v_BHV: Tensor, g_BH: Tensor, beta_BH: Tensor, state_BHCV: Tensor
) -> tuple[Tensor, Tensor]:
    """`gated_delta_step` row by row, each a row of one token."""
    _check_step(q_BKC, k_BKC, v_BHV, g_BH, beta_BH, state_BHCV)
    rows = zip(*(x[:, None] for x in (q_BKC, k_BKC, v_BHV, g_BH, beta_BH)), state_BHCV, strict=True)
    parts = [recurrent(*row[:5], segments=whole(1), state_HCV=row[5]) for row in rows]
    o_BHV, state = (torch.stack(x) for x in zip(*parts, strict=True))
    return o_BHV[:, 0], state


def recurrent(
    q_TKC: Tensor,
    k_TKC: Tensor,
    v_THV: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
    *,
    segments: Segments,
    state_HCV: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output, and the state behind the last segment, by the recurrence; `state_HCV`: before the first (None: zero)."""
    (T, H, V), C, dtype = v_THV.shape, k_TKC.shape[2], wide(v_THV.dtype)
    q_THC, k_THC = (_unit(x.to(dtype)).repeat_interleave(H // x.shape[1], 1) for x in (q_TKC, k_TKC))
    starts = set(segments.host_N.tolist())
    state_HCV = v_THV.new_zeros(H, C, V, dtype=dtype) if state_HCV is None else state_HCV.to(dtype)
    outs = [v_THV[:0].to(dtype)]
    for t in range(int(segments.host_N[-1])):
        if t and t in starts:
            state_HCV = torch.zeros_like(state_HCV)
        state_HCV = state_HCV * g_TH[t].to(dtype).exp()[:, None, None]
        change_HV = (v_THV[t].to(dtype) - torch.einsum("hcv,hc->hv", state_HCV, k_THC[t])) * beta_TH[t, :, None]
        state_HCV = state_HCV + torch.einsum("hc,hv->hcv", k_THC[t], change_HV)
        outs.append(torch.einsum("hcv,hc->hv", state_HCV, q_THC[t] * C**-0.5)[None])
    return F.pad(torch.cat(outs), (0, 0, 0, 0, 0, T + 1 - len(outs))).to(v_THV.dtype), state_HCV


def whole(num_tokens: int) -> Segments:
    """One segment of all tokens."""
    return Segments.of(torch.tensor([0, num_tokens], dtype=torch.int32))


def _unit(x_C: Tensor) -> Tensor:
    return x_C * torch.rsqrt(x_C.square().sum(-1, keepdim=True) + chunks.NORM_EPS)


def check_inputs(
    q_TKC: Tensor, k_TKC: Tensor, v_THV: Tensor, g_TH: Tensor, beta_TH: Tensor, segments: Segments
) -> None:
    """Raise ValueError unless tokens, heads, channels, dtypes and offsets fit."""
    named = {"q_TKC": q_TKC, "k_TKC": k_TKC, "v_THV": v_THV, "g_TH": g_TH, "beta_TH": beta_TH}
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items())
    if q_TKC.ndim != 3 or v_THV.ndim != 3 or q_TKC.shape != k_TKC.shape or q_TKC.shape[0] != v_THV.shape[0]:
        raise ValueError(f"{shapes} must be [T, K, C] twice, [T, H, V] and [T, H] twice; make T agree")
    if g_TH.shape != v_THV.shape[:2] or beta_TH.shape != v_THV.shape[:2]:
        raise ValueError(f"{shapes}: g and beta must be [T, H] of v; one number for every head of values")
    if q_TKC.shape[1] == 0 or v_THV.shape[1] % q_TKC.shape[1]:
        raise ValueError(f"{shapes}: the number of heads of keys must divide that of values; correct the heads")
    if not q_TKC.dtype == k_TKC.dtype == v_THV.dtype or not q_TKC.is_floating_point():
        raise ValueError(f"q, k, v are {q_TKC.dtype}, {k_TKC.dtype}, {v_THV.dtype}; cast them to one floating dtype")
    check_offsets(segments)


def _check_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state_BHCV: Tensor) -> None:
    check_inputs(q, k, v, g, beta, whole(len(v)))
    if state_BHCV.shape != (*v.shape[:2], k.shape[2], v.shape[2]):
        raise ValueError(f"state_BHCV {tuple(state_BHCV.shape)} must be {(*v.shape[:2], k.shape[2], v.shape[2])}")


def check_state(k_TKC: Tensor, v_THV: Tensor, segments: Segments, state_NHCV: Tensor | None) -> None:
    """Raise ValueError unless states before segments fit, of which there may be none."""
    if state_NHCV is None:
        return
    (N, H, C, V), dtype = (segments.num, v_THV.shape[1], k_TKC.shape[2], v_THV.shape[2]), wide(v_THV.dtype)
    if state_NHCV.shape[:3] != (N, H, C) or state_NHCV.shape[3] < V or state_NHCV.dtype != dtype:
        raise ValueError(
            f"state_NHCV is {state_NHCV.dtype} {tuple(state_NHCV.shape)} but must be {dtype} {(N, H, C, V)} or of more "
            "columns; cast or reshape it"
        )


def _forward_fake(q: Tensor, k: Tensor, v_THV: Tensor, *rest: object) -> Tensor:
    return v_THV.new_empty(v_THV.shape)


def backward_fake(do: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Gradients without values, of q, k, v, g and beta."""
    return tuple(x.new_empty(x.shape) for x in rest[:5])


def entry_fake(do_THV: Tensor, q: Tensor, k_TKC: Tensor, *rest: object) -> Tensor:
    """The gradient of a state without values."""
    return do_THV.new_empty(do_THV.shape[1], k_TKC.shape[2], do_THV.shape[2], dtype=wide(do_THV.dtype))


def state_fake(
    k_TKC: Tensor, v_THV: Tensor, g: Tensor, beta: Tensor, offsets_N: Tensor, state_NHCV: Tensor | None
) -> Tensor:
    """States without values."""
    shape = (len(offsets_N) - 1, v_THV.shape[1], k_TKC.shape[2], v_THV.shape[2])
    return v_THV.new_empty(shape if state_NHCV is None else state_NHCV.shape, dtype=wide(v_THV.dtype))


def _save(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])


def _gradient(ctx: Context, do_THV: Tensor) -> tuple[Tensor | None, ...]:
    return *RULE_GRAD(do_THV, *ctx.saved_tensors, None, None), None, None


RULE = operator("mmfn::gated_delta_rule", chunks.row_forward, _forward_fake, is_whole=True)
RULE_GRAD = operator("mmfn::gated_delta_rule_grad", chunks.row_backward, backward_fake, is_whole=True)
ENTRY_GRAD = operator("mmfn::gated_delta_entry_grad", chunks.entry_backward, entry_fake, is_whole=True)
STATE = operator("mmfn::gated_delta_state", chunks.end_states, state_fake, is_whole=True)
_rule = RULE.with_gradient(_save, _gradient)

OPERATORS = flops.register(
    {
        RULE.name: Whole(RULE.direct, chunks.forward_flops),
        RULE_GRAD.name: Whole(RULE_GRAD.direct, chunks.backward_flops),
        ENTRY_GRAD.name: Whole(ENTRY_GRAD.direct, chunks.entry_flops),
        STATE.name: Whole(STATE.direct, chunks.states_flops),
    }
)
KERNEL = Kernel(gated_delta_rule, operators=OPERATORS, results=(RULE.name,))
STATE_KERNEL = Kernel(gated_delta_state, operators=OPERATORS)
