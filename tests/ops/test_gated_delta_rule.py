"""The gated delta rule in chunks against the recurrence: outputs, every gradient, states, isolation, graphs."""

from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mmfn.batch import Segments
from mmfn.ops import gated_delta_chunks as chunks
from mmfn.ops import gated_delta_rule as module
from mmfn.ops.gated_delta_piece import gated_delta_entry_grad, gated_delta_entry_grad_reference
from mmfn.ops.gated_delta_rule import (
    gated_delta_rule,
    gated_delta_rule_reference,
    gated_delta_state,
    gated_delta_state_reference,
    gated_delta_step,
    gated_delta_step_reference,
)
from tests.ops.delta_cases import HEADS, PACKINGS, check_close, draw, outcome, pack

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6}


@pytest.mark.parametrize("decay", [0.0, 0.01, 0.3, 30.0, 200.0])
@pytest.mark.parametrize("packing", PACKINGS)
def test_equals_the_recurrence(packing, decay):
    lengths, tail = PACKINGS[packing]
    for heads in HEADS:
        leaves, do = draw(sum(lengths) + tail, heads, decay=decay)
        before = [x.detach().clone() for x in leaves]
        found = outcome(gated_delta_rule, leaves, do, pack(lengths))
        check_close(found, outcome(gated_delta_rule_reference, leaves, do, pack(lengths)), 1e-12)
        assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))
        assert not any(x[sum(lengths) :].any() for x in found), "padding"


@pytest.mark.parametrize("values", [1, 2**9, 2**30])
def test_any_block_of_heads(values, monkeypatch):
    monkeypatch.setattr(chunks, "BLOCK_VALUES", values)
    leaves, do = draw(90, (5, 10, 4, 3))
    want = outcome(gated_delta_rule_reference, leaves, do, pack([50, 40]))
    check_close(outcome(gated_delta_rule, leaves, do, pack([50, 40])), want, 1e-12)
    found, want = (state(*leaves[1:], pack([50, 40])) for state in (gated_delta_state, gated_delta_state_reference))
    check_close([found], [want], 1e-12)
    entry = (do, *(leaves[i].detach() for i in (0, 1, 3, 4)))
    found, want = (grad(*entry, pack([80])) for grad in (gated_delta_entry_grad, gated_delta_entry_grad_reference))
    check_close([found], [want], 1e-12)


@pytest.mark.parametrize("decay", [0.01, 5.0])
def test_float32_at_published_channels(decay):
    """128 channels over 8 chunks, and the same in float64."""
    leaves, do = draw(512, (1, 2, 128, 128), decay=decay)
    want = outcome(gated_delta_rule, leaves, do, pack([300, 200]))
    narrow = [x.detach().float().requires_grad_() for x in leaves]
    found = outcome(gated_delta_rule, narrow, do.float(), pack([300, 200]))
    for a, b in zip(found, want, strict=True):
        check_close([a], [b], TOLERANCE[torch.float32])


def test_bfloat16_is_computed_in_float32():
    leaves, do = draw(100, (2, 4, 16, 16), dtype=torch.bfloat16)
    leaves[3] = leaves[3].detach().float().requires_grad_()  # as models compute it
    found = outcome(gated_delta_rule, leaves, do, pack([70, 20]))
    wide = [x.detach().float().requires_grad_() for x in leaves]
    want = outcome(gated_delta_rule, wide, do.float(), pack([70, 20]))
    assert [x.dtype for x in found] == [torch.bfloat16] * 4 + [torch.float32, torch.bfloat16]
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(found, want, strict=True))


def test_equals_transformers():
    """One row, keys repeated there as here."""
    qwen = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    leaves, do = draw(150, (2, 6, 16, 8), dtype=torch.float32)

    def theirs(*xs):
        return qwen.torch_chunk_gated_delta_rule(*(x[None] for x in xs), use_qk_l2norm_in_kernel=True)[0][0]

    check_close(outcome(gated_delta_rule, leaves, do, pack([150])), outcome(theirs, leaves, do), 1e-5)


@pytest.mark.parametrize("n", [0, 2, 4])
def test_a_segment_changes_no_bit_of_another(n):
    lengths = [37, 1, 90, 64, 20]
    leaves, do = draw(sum(lengths), (2, 4, 16, 16), dtype=torch.float32)
    start, index = sum(lengths[:n]), torch.arange(sum(lengths))
    inside = (index >= start) & (index < start + lengths[n])
    factors = (-3.0, 2.0, 5.0, 7.0, 0.5, -2.0)
    changed = [
        (x * (1 + (factor - 1) * inside.view(-1, *[1] * (x.ndim - 1)))).detach()
        for x, factor in zip((*leaves, do), factors, strict=True)
    ]
    a = outcome(gated_delta_rule, leaves, do, pack(lengths))
    b = outcome(gated_delta_rule, [x.requires_grad_() for x in changed[:5]], changed[5], pack(lengths))
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x[~inside], y[~inside])
        assert not torch.equal(x[inside], y[inside])


def test_packed_equals_separate_rows_and_twice_is_the_same():
    lengths = [5, 70, 64, 1]
    leaves, do = draw(140, (1, 2, 8, 8), dtype=torch.float32)
    packed = gated_delta_rule(*leaves, pack(lengths))
    rows = zip(*(x.split(lengths) for x in leaves), lengths, strict=True)
    separate = torch.cat([gated_delta_rule(*row, pack([length])) for *row, length in rows])
    check_close([packed.detach()], [separate.detach()], TOLERANCE[torch.float32])
    twice = [outcome(gated_delta_rule, leaves, do, pack(lengths)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))


def test_saves_its_arguments_alone():
    leaves, _ = draw(100, (2, 4, 8, 8))
    saved = []

    def keep(x):
        saved.append(x.data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        segments = pack([60, 30])
        gated_delta_rule(*leaves, segments)
    assert saved == [x.data_ptr() for x in (*leaves, segments.host_N)]
    with torch.no_grad():
        assert gated_delta_rule(*leaves, segments).grad_fn is None


@pytest.mark.parametrize("packing", PACKINGS)
def test_states_behind_segments(packing):
    lengths, tail = PACKINGS[packing]
    for K, H, C, V in HEADS:
        leaves, _ = draw(sum(lengths) + tail, (K, H, C, V))
        segments, draws = pack(lengths), torch.Generator().manual_seed(0)
        entry = torch.randn(len(lengths), H, C, V + 3, dtype=torch.float64, generator=draws)
        before = entry.clone()
        for state in (None, entry, entry[..., :V]):
            found = gated_delta_state(*leaves[1:], segments, state)
            check_close([found], [gated_delta_state_reference(*leaves[1:], segments, state)], 1e-12)
        assert torch.equal(entry, before)


def test_states_of_bfloat16_are_float32():
    leaves, _ = draw(30, (1, 2, 4, 4), dtype=torch.bfloat16)
    assert gated_delta_state(*leaves[1:], pack([30])).dtype == torch.float32


def test_steps_go_on_where_a_prefill_ends():
    """Two rows of 70 and 9 tokens; each goes on by 5, one token of both at a time."""
    lengths, more = [75, 14], 5
    leaves, _ = draw(sum(lengths), (2, 4, 8, 6))
    leaves = [x.detach() for x in leaves]
    whole = gated_delta_rule(*leaves, pack(lengths))
    rows = [x.split(lengths) for x in leaves]
    first = [torch.cat([row[:-more] for row in x]) for x in rows]
    for step in (gated_delta_step, gated_delta_step_reference):
        state = gated_delta_state(*first[1:], pack([n - more for n in lengths]))
        for i in range(more):
            o, state = step(*(torch.stack([row[i - more] for row in x]) for x in rows), state)
            want = torch.stack([row[i - more] for row in whole.split(lengths)])
            check_close([o], [want], 1e-12)
    check_close([state], [gated_delta_state(*leaves[1:], pack(lengths))], 1e-12)


def test_a_step_of_bfloat16_keeps_a_float32_state():
    leaves, _ = draw(3, (1, 2, 4, 6), dtype=torch.bfloat16)
    rows, state = [x.detach() for x in leaves], torch.randn(3, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    found, want = (step(*rows, state) for step in (gated_delta_step, gated_delta_step_reference))
    assert [x.dtype for x in found] == [torch.bfloat16, torch.float32]
    check_close(found, want, 2**-7)
    check_close(found[1:], want[1:], 1e-6)


def captured(fn, *args):
    """Names of the operators of the forward graph, and the output."""
    names = []

    def backend(graph, _):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    return names, torch.compile(fn, fullgraph=True, dynamic=False, backend=backend)(*args)


@pytest.mark.parametrize("num_tokens", [64, 1024])
def test_a_graph_has_one_node_whatever_the_number_of_tokens(num_tokens):
    leaves, _ = draw(num_tokens, (1, 2, 4, 4), dtype=torch.float32)
    names, out = captured(gated_delta_rule, *leaves, pack([num_tokens]))
    assert sum("gated_delta_rule" in name for name in names) == 1
    assert len(names) <= 2  # and what takes the first of its results
    assert torch.equal(out, gated_delta_rule(*leaves, pack([num_tokens])))


def test_compiled_equals_eager_and_other_lengths_do_not_recompile():
    torch._dynamo.reset()
    run = torch.compile(gated_delta_rule, fullgraph=True, dynamic=False, backend="aot_eager")
    leaves, do = draw(80, (1, 2, 4, 4), dtype=torch.float32)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([80, 0], [3, 70], [0, 0], [40, 40]):
            found, want = (outcome(fn, leaves, do, pack(lengths)) for fn in (run, gated_delta_rule))
            assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_under_checkpoint(is_compiled):
    leaves, do = draw(70, (1, 2, 4, 4))
    torch._dynamo.reset()

    def run(*leaves):
        return checkpoint(lambda *xs: gated_delta_rule(*xs, pack([60])), *leaves, use_reentrant=False)

    fn = torch.compile(run, fullgraph=True, backend="aot_eager") if is_compiled else run
    found, want = outcome(fn, leaves, do), outcome(gated_delta_rule, leaves, do, pack([60]))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_operators_pass_torchs_own_checks():
    leaves, do = draw(70, (1, 2, 4, 3), dtype=torch.float32)
    rows, offsets = [x.detach() for x in leaves], pack([40, 20]).host_N
    state = torch.zeros(2, 4, 3)
    tests = ("test_schema", "test_faketensor")
    ops = torch.ops.mmfn
    torch.library.opcheck(ops.gated_delta_rule.default, (*leaves, offsets, None))
    torch.library.opcheck(ops.gated_delta_rule.default, (*rows, offsets, state), test_utils=tests)
    torch.library.opcheck(ops.gated_delta_rule_grad.default, (do, *rows, offsets, state, state), test_utils=tests)
    entry = (do, *rows[:2], *rows[3:], offsets)
    torch.library.opcheck(ops.gated_delta_entry_grad.default, entry, test_utils=tests)
    torch.library.opcheck(ops.gated_delta_state.default, (*rows[1:], offsets, state[None].repeat(2, 1, 1, 1)))


def test_flops_are_those_of_the_products_inside():
    leaves, do = draw(150, (2, 4, 8, 6))
    rows, lengths = [x.detach() for x in leaves], [70, 10, 60]
    offsets = pack(lengths).host_N
    state = torch.zeros(4, 8, 6, dtype=torch.float64)
    entry = (do, *rows[:2], *rows[3:], offsets)
    lacking = {torch.ops.aten.baddbmm_: lambda x, a, b, **_: 2 * prod(a) * b[-1]}  # torch counts it out of place alone
    for operator, args in (
        (module.RULE, (*rows, offsets, state)),
        (module.RULE_GRAD, (do, *rows, offsets, state, state)),
        (module.ENTRY_GRAD, entry),
        (module.STATE, (*rows[1:], offsets, None)),
        (module.STATE, (*rows[1:], offsets, torch.zeros(3, 4, 8, 9, dtype=torch.float64))),
    ):
        with FlopCounterMode(display=False, custom_mapping=lacking) as counter:
            operator.direct(*args)
        assert counter.get_total_flops() == module.OPERATORS[operator.name](*args), operator.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: (9, 2, 5)}, r"q_TKC \(9, 2, 5\), k_TKC \(9, 2, 4\)"),
        ({2: (8, 4, 3)}, "make T agree"),
        ({3: (9, 2)}, r"g and beta must be \[T, H\] of v"),
        ({2: (9, 3, 3), 3: (9, 3), 4: (9, 3)}, "number of heads of keys must divide that of values"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    shapes = [(9, 2, 4), (9, 2, 4), (9, 4, 3), (9, 4), (9, 4)]
    rows = [torch.zeros(change.get(i, shape)) for i, shape in enumerate(shapes)]
    for fn in (gated_delta_rule, gated_delta_rule_reference):
        with pytest.raises(ValueError, match=message):
            fn(*rows, pack([9]))


def test_dtypes_offsets_and_states_that_do_not_fit_are_refused():
    rows = [x.detach() for x in draw(9, (2, 4, 4, 3))[0]]
    with pytest.raises(ValueError, match=r"float32.*float64.*cast them to one floating dtype"):
        gated_delta_rule(rows[0].float(), *rows[1:], pack([9]))
    for lengths in ([10], [9, -1]):
        with pytest.raises(ValueError, match="must rise from 0 to at most the 9 tokens"):
            gated_delta_rule(*rows, pack(lengths))
    with pytest.raises(ValueError, match="must be a copy of offsets_N"):
        gated_delta_rule(*rows, Segments(offsets_N=pack([9]).offsets_N, host_N=pack([4, 5]).host_N))
    with pytest.raises(ValueError, match=r"state_BHCV \(9, 4, 3, 4\) must be \(9, 4, 4, 3\)"):
        gated_delta_step(*rows, torch.zeros(9, 4, 3, 4))
    with pytest.raises(ValueError, match=r"\(1, 4, 4, 2\) but must be torch.float64 \(1, 4, 4, 3\) or of more columns"):
        gated_delta_state(*rows[1:], pack([9]), torch.zeros(1, 4, 4, 2, dtype=torch.float64))


def test_queries_and_keys_count_by_direction():
    leaves, _ = draw(20, (1, 1, 8, 8))
    q, k, *rest = (x.detach() for x in leaves)
    a, b = (gated_delta_rule(s * q, s * k, *rest, pack([20])) for s in (1e3, 1e4))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    unit = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    torch.testing.assert_close(gated_delta_rule(*unit, *rest, pack([20])), a, rtol=1e-5, atol=1e-5)
