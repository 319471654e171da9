"""The gated delta rule by flash-linear-attention: the two halves of its function, each one operator.

Nothing is computed twice: what a forward leaves for its backward (decays summed within chunks, inverses of chunks) is
kept with the output; pieces of rows, whose gradients come without these, compute them again. States are float32 and
products of chunks in the rows' dtype, so between pieces they are as exact as within one.

Legend: T tokens, K heads of queries and keys, H of values, C key channels, V value channels, N segments, L tokens of a
chunk.
"""

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfn.dtypes import wide
from mmfn.ops import flops
from mmfn.ops import gated_delta_chunks as portable
from mmfn.ops.custom import Context, operator
from mmfn.ops.gated_delta_rule import backward_fake, entry_fake, state_fake
from mmfn.ops.kernel import Whole
from mmfn.ops.packages.fla_segments import CHUNK, Run, join, num_chunks, runs

RULE_MODULE, NORM_MODULE = "fla.ops.gated_delta_rule.chunk", "fla.modules.norm.l2norm"
Saved = tuple[Tensor, Tensor]  # decay_1LH, inverse_1LHL


def _arguments(run: Run, k_1LKC: Tensor, state_HCV: Tensor | None) -> dict[str, Any]:
    state_1HCV = state_HCV[None] if state_HCV is not None and run.is_entered else None
    own = {"scale": k_1LKC.shape[3] ** -0.5, "initial_state": state_1HCV}
    return {**own, "cu_seqlens": run.offsets_N, "chunk_indices": run.chunks()}


def _unit(x_1LKC: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of unit length, and what they were divided by, inverted."""
    x_1LKC, scale = import_module(NORM_MODULE).l2norm_fwd(x_1LKC, eps=portable.NORM_EPS)
    return x_1LKC, scale


def _unit_grad(dx_1LKC: Tensor, x_1LKC: Tensor, scale: Tensor) -> Tensor:
    dx: Tensor = import_module(NORM_MODULE).l2norm_bwd(x_1LKC, scale, dx_1LKC.contiguous(), eps=portable.NORM_EPS)
    return dx


def _half(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, arguments: dict[str, Any], *, wants_end: bool = False
) -> tuple[Tensor, Saved, Tensor]:
    """Output of one run, what its backward reads, and its end states; q and k are of unit length."""
    decay, o, inverse, end, *_ = import_module(RULE_MODULE).chunk_gated_delta_rule_fwd(
        q=q, k=k, v=v, g=g, beta=beta, output_final_state=wants_end, **arguments
    )
    return o, (decay, inverse), end


def rule_forward(
    q_TKC: Tensor,
    k_TKC: Tensor,
    v_THV: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
    offsets_N: Tensor,
    host_N: Tensor,
    state_HCV: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """o_THV, decay_TH and inverse_THL. `state_HCV`: before the first token (None: zero)."""
    parts = []
    for run in runs(offsets_N, host_N, is_entered=state_HCV is not None):
        q, k, v, g, beta = run.of(q_TKC, k_TKC, v_THV, g_TH, beta_TH)
        o, saved, _ = _half(_unit(q)[0], _unit(k)[0], v, g, beta, _arguments(run, k, state_HCV))
        parts.append((o, *saved))
    if not parts:
        empty = _forward_fake(q_TKC, k_TKC, v_THV, g_TH)
        return empty[0].zero_(), empty[1].zero_(), empty[2].zero_()
    o_THV, decay_TH, inverse_THL = (join(list(xs), len(v_THV)) for xs in zip(*parts, strict=True))
    return o_THV, decay_TH, inverse_THL


def rule_backward(
    do_THV: Tensor,
    q_TKC: Tensor,
    k_TKC: Tensor,
    v_THV: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
    decay_TH: Tensor | None,
    inverse_THL: Tensor | None,
    offsets_N: Tensor,
    host_N: Tensor,
    state_HCV: Tensor | None,
    dend_HCV: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g and beta from those of the output and of the last segment's end state (None: zero)."""
    rows, parts = (q_TKC, k_TKC, v_THV, g_TH, beta_TH), []
    for run in runs(offsets_N, host_N, is_entered=state_HCV is not None, is_left=dend_HCV is not None):
        do, q, k, v, g, beta = run.of(do_THV, *rows)
        (q, q_scale), (k, k_scale), arguments = _unit(q), _unit(k), _arguments(run, k, state_HCV)
        if decay_TH is None or inverse_THL is None:
            _, (decay, inverse), _ = _half(q, k, v, g, beta, arguments)
        else:
            decay, inverse = run.of(decay_TH, inverse_THL)
        dend = dend_HCV[None] if dend_HCV is not None and run.is_left else None
        dq, dk, dv, dbeta, dg, *_ = import_module(RULE_MODULE).chunk_gated_delta_rule_bwd(
            q=q, k=k, v=v, g=decay, beta=beta, A=inverse, do=do, dht=dend, **arguments
        )
        parts.append((_unit_grad(dq, q, q_scale), _unit_grad(dk, k, k_scale), dv, dg, dbeta))
    if not parts:
        dq, dk, dv, dg, dbeta = map(torch.zeros_like, rows)
    else:
        found = (join(list(xs), len(v_THV)) for xs in zip(*parts, strict=True))
        dq, dk, dv, dg, dbeta = (x.to(row.dtype) for x, row in zip(found, rows, strict=True))
    return dq, dk, dv, dg, dbeta


def entry_backward(
    do_THV: Tensor, q_TKC: Tensor, k_TKC: Tensor, g_TH: Tensor, beta_TH: Tensor, offsets_N: Tensor, host_N: Tensor
) -> Tensor:
    """The gradient of the state before the first token from that of the output; only the first segment reads it."""
    state_HCV = entry_fake(do_THV, q_TKC, k_TKC).zero_()
    for run in runs(offsets_N, host_N, is_entered=True):
        do, q, k, g, beta = run.of(do_THV, q_TKC, k_TKC, g_TH, beta_TH)
        q, k, v, arguments = _unit(q)[0], _unit(k)[0], torch.zeros_like(do), _arguments(run, k, state_HCV)
        _, (decay, inverse), _ = _half(q, k, v, g, beta, arguments)
        grads = import_module(RULE_MODULE).chunk_gated_delta_rule_bwd(
            q=q, k=k, v=v, g=decay, beta=beta, A=inverse, do=do, dht=None, **arguments
        )
        dstate_HCV: Tensor = grads[5][0]
        return dstate_HCV
    return state_HCV


def end_states(
    k_TKC: Tensor,
    v_THV: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
    offsets_N: Tensor,
    host_N: Tensor,
    state_NHCV: Tensor | None,
) -> Tensor:
    """The state behind the last token of every segment; `state_NHCV` may be wider than v."""
    end_NHCV = state_fake(k_TKC, v_THV, g_TH, beta_TH, offsets_N, state_NHCV)
    end_NHCV = end_NHCV.zero_() if state_NHCV is None else end_NHCV.copy_(state_NHCV)
    if int(host_N[-1]) == 0:
        return end_NHCV
    run = Run(start=0, end=int(host_N[-1]), offsets_N=offsets_N, host_N=host_N)
    k, v, g, beta = run.of(k_TKC, v_THV, g_TH, beta_TH)
    k, v = _unit(k)[0], F.pad(v, (0, end_NHCV.shape[3] - v.shape[3]))
    arguments = {**_arguments(run, k, None), "initial_state": end_NHCV}
    return _half(k, k, v, g, beta, arguments, wants_end=True)[2]


def _forward_fake(q: Tensor, k: Tensor, v_THV: Tensor, g_TH: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    decay_TH = g_TH.new_empty(g_TH.shape, dtype=wide(g_TH.dtype))
    return v_THV.new_empty(v_THV.shape), decay_TH, k.new_empty(*v_THV.shape[:2], CHUNK)


def _forward_held(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, offsets: Tensor, host_N: Tensor, state: Tensor | None
) -> tuple[Tensor, ...]:
    """Units of q and k, and of every chunk U, Y, the state before it and what is written."""
    (T, H, V), C = v.shape, k.shape[2]
    held = [torch.empty_like(q), torch.empty_like(k), k.new_empty(T, H, C), torch.empty_like(v), torch.empty_like(v)]
    held.append(k.new_empty(num_chunks(host_N), H, C, V))
    out = _forward_fake(q, k, v, g)
    del held
    return out


def _backward_held(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The same, the gradients of U, Y and states, and those of q and k for every head of values."""
    (T, H, V), C, num = v.shape, k.shape[2], num_chunks(rest[5])
    held = [torch.empty_like(q), torch.empty_like(k), *(k.new_empty(T, H, C) for _ in range(4))]
    held += [*(torch.empty_like(v) for _ in range(3)), *(k.new_empty(num, H, C, V) for _ in range(2))]
    out = backward_fake(do, q, k, v, *rest)
    del held
    return out


def _states_held(
    k: Tensor, v: Tensor, g: Tensor, beta: Tensor, offsets: Tensor, host: Tensor, state: Tensor | None
) -> Tensor:
    v = v if state is None else v.new_empty(*v.shape[:2], state.shape[3])
    held = _forward_held(k, k, v, g, beta, offsets, host, None)
    out = state_fake(k, v, g, beta, offsets, state)
    del held
    return out


def _entry_held(do: Tensor, q: Tensor, k: Tensor, g: Tensor, beta: Tensor, offsets: Tensor, host: Tensor) -> Tensor:
    held = _backward_held(do, q, k, do, g, beta, None, None, offsets, host)
    out = entry_fake(do, q, k)
    del held
    return out


def _save(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], *output[1:], *inputs[5:7])


def _gradient(ctx: Context, do_THV: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if do_THV is None:
        return (None,) * 8
    return *RULE_GRAD(do_THV, *ctx.saved_tensors, None, None), None, None, None


def _filled(host_N: Tensor) -> Tensor:
    """Tokens with what fills the chunks of every segment."""
    return host_N.new_tensor([num_chunks(host_N) * CHUNK])


RULE = operator("mmfn::fla_gated_delta_rule", rule_forward, _forward_fake, is_whole=True)
RULE_GRAD = operator("mmfn::fla_gated_delta_rule_grad", rule_backward, backward_fake, is_whole=True)
ENTRY_GRAD = operator("mmfn::fla_gated_delta_entry_grad", entry_backward, entry_fake, is_whole=True)
STATE = operator(
    "mmfn::fla_gated_delta_state",
    end_states,
    lambda k, v, g, beta, offsets, host, state: state_fake(k, v, g, beta, offsets, state),
    is_whole=True,
)
rule = RULE.with_gradient(_save, _gradient)

OPERATORS = flops.register(
    {
        RULE.name: Whole(
            _forward_held,
            lambda q, k, v, g, beta, offsets, host_N, *_, **__: portable.forward_flops(
                q, k, v, g, beta, _filled(host_N)
            ),
        ),
        RULE_GRAD.name: Whole(
            _backward_held,
            lambda do, q, k, v, g, beta, decay, inverse, offsets, host_N, *_, **__: portable.backward_flops(
                do, q, k, v, g, beta, _filled(host_N)
            ),
        ),
        ENTRY_GRAD.name: Whole(
            _entry_held,
            lambda do, q, k, g, beta, offsets, host_N, **_: portable.backward_flops(
                do, q, k, do, g, beta, _filled(host_N)
            ),
        ),
        STATE.name: Whole(
            _states_held,
            lambda k, v, g, beta, offsets, host_N, state, **_: portable.states_flops(k, v, g, beta, host_N, state),
        ),
    }
)
"""Products of a forward and a backward as the portable form counts them, with every segment in chunks of its own."""
