"""The causal convolution against torch's, one row at a time: values, gradients, states, graphs."""

import pytest
import torch

from mmfn.ops import causal_conv1d as module
from mmfn.ops.causal_conv1d import (
    causal_conv1d,
    causal_conv1d_reference,
    causal_conv1d_state,
    causal_conv1d_step,
    causal_conv1d_step_reference,
)
from tests.ops.delta_cases import PACKINGS, check_close, outcome, pack

SIZES = [(6, 4), (1, 1), (5, 2), (3, 7)]  # channels, taps


def draw(num_tokens, D, K, dtype=torch.float64):
    draws = torch.Generator().manual_seed(num_tokens + D)
    shapes = (num_tokens, D), (D, K), (num_tokens, D)
    x, weight, dy = (torch.randn(s, dtype=torch.float64, generator=draws).to(dtype) for s in shapes)
    return [x.requires_grad_(), weight.requires_grad_()], dy


@pytest.mark.parametrize("values", [1, 40, 2**17])
@pytest.mark.parametrize("packing", PACKINGS)
def test_equals_torch(packing, values, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_VALUES", values)
    lengths, tail = PACKINGS[packing]
    for D, K in SIZES:
        leaves, dy = draw(sum(lengths) + tail, D, K)
        found = outcome(causal_conv1d, leaves, dy, pack(lengths))
        check_close(found, outcome(causal_conv1d_reference, leaves, dy, pack(lengths)), 1e-13)
        assert not any(x[sum(lengths) :].any() for x in (found[0], found[1])), "padding"


def test_by_hand():
    x, weight = torch.tensor([[1.0], [2.0], [3.0], [5.0]]), torch.tensor([[10.0, 100.0]])
    want = torch.nn.functional.silu(torch.tensor([[100.0], [210.0], [300.0], [530.0]]))
    assert torch.equal(causal_conv1d(x, weight, pack([2, 2])), want)


def test_a_segment_changes_no_bit_of_another():
    lengths = [5, 1, 9]
    leaves, dy = draw(15, 4, 4, torch.float32)
    inside = (torch.arange(15) >= 5) & (torch.arange(15) < 6)
    other = leaves[0].detach().where(~inside[:, None], torch.inf).requires_grad_()
    (y, dx, _), (other_y, other_dx, _) = (
        outcome(causal_conv1d, [x, leaves[1]], dy, pack(lengths)) for x in (leaves[0], other)
    )
    assert torch.equal(y[~inside], other_y[~inside])
    assert torch.equal(dx[~inside], other_dx[~inside])


def test_bfloat16_is_rounded_once():
    leaves, dy = draw(40, 8, 4, torch.bfloat16)
    wide = [x.detach().float().requires_grad_() for x in leaves]
    found, want = outcome(causal_conv1d, leaves, dy, pack([40])), outcome(causal_conv1d, wide, dy.float(), pack([40]))
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("lengths", [[9, 0, 2, 12], [1], [3, 3]])
def test_steps_go_on_where_a_prefill_ends(lengths):
    (x, weight), _ = draw(sum(lengths) + 2 * len(lengths), 5, 4)
    x, weight = x.detach(), weight.detach()
    rows = x.split([n + 2 for n in lengths])
    want = causal_conv1d(x, weight, pack([n + 2 for n in lengths])).split([n + 2 for n in lengths])
    for step in (causal_conv1d_step, causal_conv1d_step_reference):
        state = causal_conv1d_state(torch.cat([row[:-2] for row in rows]), pack(lengths), 3)
        for i in (-2, -1):
            y, state = step(torch.stack([row[i] for row in rows]), weight, state)
            check_close([y], [torch.stack([row[i] for row in want])], 1e-14)
    assert torch.equal(state, causal_conv1d_state(x, pack([n + 2 for n in lengths]), 3))


@pytest.mark.parametrize("frozen", [0, 1])
def test_with_one_frozen_input(frozen):
    leaves, dy = draw(30, 4, 4)
    want = outcome(causal_conv1d, leaves, dy, pack([20, 8]))
    leaves[frozen].requires_grad_(False)
    found = torch.autograd.grad(causal_conv1d(*leaves, pack([20, 8])), leaves[1 - frozen], dy)[0]
    assert torch.equal(found, want[2 - frozen])


def test_saves_its_arguments_alone():
    (x, weight), _ = draw(20, 3, 4)
    saved, segments = [], pack([20])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        causal_conv1d(x, weight, segments)
    assert saved == [t.data_ptr() for t in (x, weight, segments.host_N)]


def test_compiled_equals_eager_and_other_lengths_do_not_recompile():
    torch._dynamo.reset()
    run = torch.compile(causal_conv1d, fullgraph=True, dynamic=False, backend="aot_eager")
    leaves, dy = draw(30, 4, 4, torch.float32)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([30, 0], [3, 20], [0, 0]):
            found, want = (outcome(fn, leaves, dy, pack(lengths)) for fn in (run, causal_conv1d))
            assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_operators_pass_torchs_own_checks():
    leaves, dy = draw(9, 4, 3, torch.float32)
    offsets = pack([3, 4]).host_N
    torch.library.opcheck(torch.ops.mmfn.causal_conv1d.default, (*leaves, offsets))
    rows = [x.detach() for x in leaves]
    torch.library.opcheck(torch.ops.mmfn.causal_conv1d_grad.default, (dy, *rows, offsets, True))


def test_shapes_and_offsets_that_do_not_fit_are_refused():
    x, weight = torch.zeros(9, 4), torch.zeros(4, 3)
    for fn in (causal_conv1d, causal_conv1d_reference):
        with pytest.raises(ValueError, match=r"x_TD \(9, 4\) and weight_DK \(3, 4\)"):
            fn(x, weight.T, pack([9]))
    with pytest.raises(ValueError, match="must rise from 0 to at most the 9 tokens"):
        causal_conv1d(x, weight, pack([10]))
    with pytest.raises(ValueError, match=r"must be \[B, D\] and \[B, K - 1, D\] for weight_DK \(4, 3\)"):
        causal_conv1d_step(x, weight, torch.zeros(9, 3, 4))
