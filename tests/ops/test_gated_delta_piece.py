"""Pieces of a gated delta rule against the recurrence from a state, and against the whole row."""

import pytest
import torch

from mmfn.ops.gated_delta_piece import (
    gated_delta_entry_grad,
    gated_delta_entry_grad_reference,
    gated_delta_piece,
    gated_delta_piece_grad,
    gated_delta_piece_grad_reference,
    gated_delta_piece_reference,
)
from mmfn.ops.gated_delta_rule import gated_delta_rule, gated_delta_state
from tests.ops.delta_cases import HEADS, PACKINGS, check_close, draw, outcome, pack


def draw_states(K, H, C, V):
    draws = torch.Generator().manual_seed(H)
    return torch.randn(2, H, C, V, dtype=torch.float64, generator=draws).unbind(0)


@pytest.mark.parametrize("packing", PACKINGS)
def test_equals_the_recurrence_from_a_state(packing):
    lengths, tail = PACKINGS[packing]
    for heads in HEADS:
        leaves, do = draw(sum(lengths) + tail, heads)
        rows, segments = [x.detach() for x in leaves], pack(lengths)
        state, dend = draw_states(*heads)
        found, want = (fn(*rows, segments, state) for fn in (gated_delta_piece, gated_delta_piece_reference))
        check_close([found], [want], 1e-12)
        grads = (gated_delta_piece_grad, gated_delta_piece_grad_reference)
        found, want = (fn(do, *rows, segments, state, dend) for fn in grads)
        check_close(found, want, 1e-12)
        grads = (gated_delta_entry_grad, gated_delta_entry_grad_reference)
        found, want = (fn(do, *rows[:2], *rows[3:], segments) for fn in grads)
        check_close([found], [want], 1e-12)


@pytest.mark.parametrize("cut", [1, 50, 64, 129])
def test_two_pieces_of_a_segment_are_the_segment(cut):
    leaves, do = draw(130, (2, 4, 8, 6))
    want = outcome(gated_delta_rule, leaves, do, pack([130]))
    rows = [x.detach() for x in (*leaves, do)]
    first, last = [x[:cut] for x in rows], [x[cut:] for x in rows]
    zero = torch.zeros(4, 8, 6, dtype=torch.float64)
    entry = gated_delta_state(*first[1:5], pack([cut]))[0]
    out = torch.cat(
        [
            gated_delta_piece(*first[:5], pack([cut]), zero),
            gated_delta_piece(*last[:5], pack([130 - cut]), entry),
        ]
    )
    dentry = gated_delta_entry_grad(last[5], *last[:2], *last[3:5], pack([130 - cut]))
    grads = [
        gated_delta_piece_grad(first[5], *first[:5], pack([cut]), zero, dentry),
        gated_delta_piece_grad(last[5], *last[:5], pack([130 - cut]), entry, zero),
    ]
    check_close([out, *(torch.cat(parts) for parts in zip(*grads, strict=True))], want, 1e-12)


def test_states_that_do_not_fit_are_refused():
    rows = [x.detach() for x in draw(9, (2, 4, 4, 3), dtype=torch.float32)[0]]
    with pytest.raises(ValueError, match=r"a state is torch.float32 \(4, 3, 4\) but must be torch.float32 \(4, 4, 3\)"):
        gated_delta_piece(*rows, pack([9]), torch.zeros(4, 3, 4))
    with pytest.raises(ValueError, match=r"a state is torch\.float64"):
        gated_delta_piece(*rows, pack([9]), torch.zeros(4, 4, 3, dtype=torch.float64))
