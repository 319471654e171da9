"""The gated delta rule of a piece of a row: from a state that enters it, with what is needed to join pieces exactly.

A row in pieces is the row: the state behind one piece enters the next, and its gradient travels back. That is how the
rule is computed when the tokens of a row lie on several ranks.

Legend: T tokens, K heads of queries and keys, H of values, C key channels, V value channels, N segments.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfn.batch import Segments
from mmfn.dtypes import wide
from mmfn.ops.gated_delta_rule import ENTRY_GRAD, OPERATORS, RULE, RULE_GRAD, check_inputs, recurrent
from mmfn.ops.kernel import Kernel


def gated_delta_piece(
    q_TKC: Tensor,
    k_TKC: Tensor,
    v_THV: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
    segments: Segments,
    state_HCV: Tensor,
) -> Tensor:
    """`gated_delta_rule` from the state `state_HCV` before the first token; o_THV.

    `state_HCV`: float32 (float64 for float64), read by the first segment that is not empty; zero where that begins with
    the piece. Not differentiable by autograd. Raises ValueError for shapes, dtypes or offsets that do not fit.
    """
    check_piece(q_TKC, k_TKC, v_THV, g_TH, beta_TH, segments, state_HCV)
    rows = (x.detach() for x in (q_TKC, k_TKC, v_THV, g_TH, beta_TH))
    o_THV: Tensor = RULE(*rows, segments.host_N, state_HCV)
    return o_THV


def gated_delta_piece_grad(
    do_THV: Tensor,
    q_TKC: Tensor,
    k_TKC: Tensor,
    v_THV: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
    segments: Segments,
    state_HCV: Tensor,
    dend_HCV: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients `(dq_TKC, dk_TKC, dv_THV, dg_TH, dbeta_TH)` of a piece, in its inputs' dtypes.

    `do_THV`: of the output; `dend_HCV`: of the state behind the last segment that is not empty. Raises ValueError as
    `gated_delta_piece` does.
    """
    check_piece(q_TKC, k_TKC, v_THV, g_TH, beta_TH, segments, state_HCV, dend_HCV)
    dq, dk, dv, dg, dbeta = RULE_GRAD(do_THV, q_TKC, k_TKC, v_THV, g_TH, beta_TH, segments.host_N, state_HCV, dend_HCV)
    return dq, dk, dv, dg, dbeta


def gated_delta_entry_grad(
    do_THV: Tensor, q_TKC: Tensor, k_TKC: Tensor, g_TH: Tensor, beta_TH: Tensor, segments: Segments
) -> Tensor:
    """The gradient of the state that enters a piece from that of its output alone, float32 or wider; dstate_HCV.

    It depends on neither the state nor the values: every rank has it before any state has travelled back. Raises
    ValueError as `gated_delta_piece` does.
    """
    check_inputs(q_TKC, k_TKC, do_THV, g_TH, beta_TH, segments)
    dstate_HCV: Tensor = ENTRY_GRAD(do_THV, q_TKC, k_TKC, g_TH, beta_TH, segments.host_N)
    return dstate_HCV


def gated_delta_piece_reference(
    q_TKC: Tensor,
    k_TKC: Tensor,
    v_THV: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
    segments: Segments,
    state_HCV: Tensor,
) -> Tensor:
    """`gated_delta_piece` token by token."""
    check_piece(q_TKC, k_TKC, v_THV, g_TH, beta_TH, segments, state_HCV)
    return recurrent(q_TKC, k_TKC, v_THV, g_TH, beta_TH, segments=segments, state_HCV=state_HCV)[0].detach()


def gated_delta_piece_grad_reference(
    do_THV: Tensor,
    q_TKC: Tensor,
    k_TKC: Tensor,
    v_THV: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
    segments: Segments,
    state_HCV: Tensor,
    dend_HCV: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`gated_delta_piece_grad` by autograd of the recurrence."""
    check_piece(q_TKC, k_TKC, v_THV, g_TH, beta_TH, segments, state_HCV, dend_HCV)
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q_TKC, k_TKC, v_THV, g_TH, beta_TH)]
        outs = recurrent(*leaves, segments=segments, state_HCV=state_HCV)
    dq, dk, dv, dg, dbeta = _gradients(outs, leaves, (do_THV, dend_HCV))
    return dq, dk, dv, dg, dbeta


def gated_delta_entry_grad_reference(
    do_THV: Tensor, q_TKC: Tensor, k_TKC: Tensor, g_TH: Tensor, beta_TH: Tensor, segments: Segments
) -> Tensor:
    """`gated_delta_entry_grad` by autograd of the recurrence, with values of zero."""
    check_inputs(q_TKC, k_TKC, do_THV, g_TH, beta_TH, segments)
    with torch.enable_grad():
        shape = (do_THV.shape[1], k_TKC.shape[2], do_THV.shape[2])
        state_HCV = do_THV.new_zeros(shape, dtype=wide(do_THV.dtype), requires_grad=True)
        rows = (x.detach() for x in (q_TKC, k_TKC, torch.zeros_like(do_THV), g_TH, beta_TH))
        o_THV, _ = recurrent(*rows, segments=segments, state_HCV=state_HCV)
    return _gradients([o_THV], [state_HCV], [do_THV])[0]


def _gradients(outs: Sequence[Tensor], leaves: Sequence[Tensor], douts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Zeros where an output depends on no leaf, as where there are no tokens."""
    pairs = [(out, dout) for out, dout in zip(outs, douts, strict=True) if out.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(x) for x in leaves)
    grads = torch.autograd.grad(
        [out for out, _ in pairs], leaves, [dout for _, dout in pairs], allow_unused=True, materialize_grads=True
    )
    return tuple(grads)


def check_piece(
    q_TKC: Tensor, k_TKC: Tensor, v_THV: Tensor, g_TH: Tensor, beta_TH: Tensor, segments: Segments, *states: Tensor
) -> None:
    """Raise ValueError unless a piece and states of it fit."""
    check_inputs(q_TKC, k_TKC, v_THV, g_TH, beta_TH, segments)
    shape, dtype = (v_THV.shape[1], k_TKC.shape[2], v_THV.shape[2]), wide(v_THV.dtype)
    for x in states:
        if x.shape != shape or x.dtype != dtype:
            raise ValueError(f"a state is {x.dtype} {tuple(x.shape)} but must be {dtype} {shape}; cast or reshape it")


KERNEL = Kernel(gated_delta_piece, operators=OPERATORS, results=(RULE.name,))
GRAD_KERNEL = Kernel(gated_delta_piece_grad, operators=OPERATORS)
ENTRY_GRAD_KERNEL = Kernel(gated_delta_entry_grad, operators=OPERATORS)
