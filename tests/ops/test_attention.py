"""Packed attention against torch's SDPA with a block mask: values, gradients, packing, graphs."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mmfn.batch import Segments
from mmfn.ops import attention as module
from mmfn.ops.attention import (
    attention,
    attention_cached,
    attention_cached_reference,
    attention_reference,
)
from mmfn.ops.attention_block import (
    attention_block,
    attention_block_grad,
    attention_block_grad_reference,
    attention_block_reference,
    merge_blocks,
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
HEADS = [(4, 2, 8), (3, 3, 5), (6, 1, 2), (1, 1, 1)]  # H, K, C
PACKINGS = {  # lengths of segments, tokens of padding behind them
    "mixed with empty": ([5, 3, 0, 7], 2),
    "one run": ([4] * 5, 0),
    "two runs of one length": ([4, 4, 4, 9, 9, 4, 4], 3),
    "padded together": ([20, 25, 30, 22, 17], 1),
    "longer than a kernel block": ([70, 1, 300], 5),
    "no segment": ([], 3),
    "one token": ([1], 0),
    "all empty": ([0, 0], 4),
    "no token": ([0], 0),
}
QUIET_INDUCTOR = "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"  # torch's own, on import


class Operators(TorchDispatchMode):
    """Counts all operators of eager execution."""

    is_eager, number = True, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


def pack(lengths):
    return Segments.of(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32))


def plan(lengths, is_causal, width):
    return module._plan(pack(lengths).host_N.numpy().tobytes(), is_causal, width)


def draw(T, H, K, C, dtype=torch.float64, seed=0):
    """q, k, v as leaves and the gradient of o."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, do = (torch.randn(T, n, C, dtype=torch.float64, generator=generator).to(dtype) for n in (H, K, K, H))
    return (q.requires_grad_(), k.requires_grad_(), v.requires_grad_()), do


def block_masked_sdpa(q, k, v, lengths, is_causal):
    """torch's own attention under an explicit mask; rows of padding see nothing and give zero."""
    T, G = q.shape[0], q.shape[1] // k.shape[1]
    blocks = [torch.ones(n, n, dtype=torch.bool) for n in lengths if n]
    mask = torch.zeros(T, T, dtype=torch.bool)
    used = sum(lengths)
    mask[:used, :used] = torch.block_diag(*blocks).bool() if blocks else False
    mask = mask.tril() if is_causal else mask
    k, v = (x.repeat_interleave(G, 1) for x in (k, v))
    o = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=mask)[0]
    return torch.where(mask.any(1)[:, None, None], o.transpose(0, 1), 0.0)


def gradients(o, leaves, do):
    return torch.autograd.grad(o, leaves, do, materialize_grads=True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_equals_torch_with_a_block_mask(heads, packing, is_causal, dtype):
    lengths, tail = PACKINGS[packing]
    leaves, do = draw(sum(lengths) + tail, *heads, dtype)
    segments, tol = pack(lengths), TOLERANCE[dtype]
    expected = block_masked_sdpa(*leaves, lengths, is_causal) if do.numel() else torch.zeros_like(do)
    expected_grads = gradients(expected, leaves, do) if do.numel() else [torch.zeros_like(x) for x in leaves]
    per_segment = module._per_segment(*leaves, segments, is_causal)
    operator = torch.ops.mmfn.attention(*leaves, segments.offsets_N, is_causal)[0]
    reference = attention_reference(*leaves, segments, is_causal=is_causal)
    for o in (attention(*leaves, segments, is_causal=is_causal), operator, reference, per_segment):
        torch.testing.assert_close(o, expected, atol=tol, rtol=tol)
        for actual, wanted in zip(gradients(o, leaves, do), expected_grads, strict=True):
            torch.testing.assert_close(actual, wanted, atol=tol, rtol=tol)


def test_the_matrix_covers_every_kind_of_call():
    plans = {name: plan(lengths, True, 32) for name, (lengths, _) in PACKINGS.items()}
    assert [len(plans[name]) for name in ("one run", "padded together", "no segment", "all empty")] == [1, 1, 0, 0]
    assert plans["one run"][0].padding is None
    assert plans["padded together"][0].padding is not None
    assert len(plans["two runs of one length"]) == 1
    assert len(plans["longer than a kernel block"]) == 2


def test_plans_cover_every_token_once():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = torch.randint(
            0, 60, (int(torch.randint(1, 12, (), generator=generator)),), generator=generator
        ).tolist()
        for is_causal, width in itertools.product((True, False), (4, 4096)):
            seen = torch.zeros(sum(lengths), 1)
            for call in plan(lengths, is_causal, width):
                rows = call.rows(torch.ones(sum(lengths), 1), zero_pads=True)
                assert is_causal or rows.all()  # without causality a padded key would be seen
                part = torch.zeros_like(seen)
                call.put_(part, rows)
                seen += part
            assert (seen == 1).all(), (lengths, is_causal)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("run", ["_per_segment", "attention"])
def test_unused_static_segments_cost_nothing(run, is_causal, monkeypatch):
    """Of 4,096 segments three are used: as many kernel calls, and as many operators of any kind, as for three."""
    leaves, _ = draw(60, 4, 2, 8)
    lengths, calls, ran = [20, 0, 8, 30], [], {}
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(module.F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or sdpa(*a, **k))
    for name, unused in (("few", 0), ("static", 4092)):
        segments = pack([*lengths, *[0] * unused])
        module._plan.cache_clear()
        with Operators() as seen:
            if run == "attention":
                attention(*leaves, segments, is_causal=is_causal)
            else:
                module._per_segment(*leaves, segments, is_causal)
        ran[name] = seen.number
    assert ran["few"] == ran["static"]
    assert len(calls) == (2 * 3 if run == "_per_segment" else 0)


def test_unused_static_segments_need_no_plan_of_their_own():
    """However many there are, the plan is looked up by the boundaries that are used."""
    leaves, _ = draw(60, 4, 2, 8)
    module._plan.cache_clear()
    for unused in (0, 5, 4092):
        attention(*leaves, pack([20, 0, 8, 30, *[0] * unused]), is_causal=True)
    assert module._plan.cache_info().misses == 1


def test_boundaries_are_read_on_the_host_alone():
    """The device's copy is never looked at: it may be under way."""
    leaves, _ = draw(12, 2, 2, 4)
    right = pack([5, 4])
    wrong = replace(right, offsets_N=torch.zeros_like(right.offsets_N))
    for run in (partial(attention, is_causal=True), partial(module._per_segment, is_causal=True)):
        assert torch.equal(run(*leaves, right), run(*leaves, wrong))
    other = Segments(offsets_N=right.offsets_N, host_N=right.host_N[:2])
    with pytest.raises(ValueError, match=r"host_N, \(2,\) on cpu, must be a copy of offsets_N, \(3,\), on the CPU"):
        attention(*leaves, other, is_causal=True)


@pytest.mark.parametrize("is_causal", [True, False])
def test_gradcheck(is_causal):
    leaves, _ = draw(9, 4, 2, 3)
    segments = pack([3, 4])
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, segments, is_causal=is_causal), leaves)


def test_segments_are_isolated_and_causal_by_gradient():
    leaves, _ = draw(12, 2, 2, 4)
    o = attention(*leaves, pack([5, 4]), is_causal=True)
    for t, first in {2: 0, 4: 0, 5: 5, 8: 5}.items():
        dq, dk, dv = torch.autograd.grad(o[t].sum(), leaves, retain_graph=True)
        seen = list(range(first, t + 1))
        assert dv.abs().sum((1, 2)).nonzero()[:, 0].tolist() == seen
        assert set(dk.abs().sum((1, 2)).nonzero()[:, 0].tolist()) <= set(seen)
        assert set(dq.abs().sum((1, 2)).nonzero()[:, 0].tolist()) <= {t}


@pytest.mark.parametrize("is_causal", [True, False])
def test_packed_equals_separate(is_causal):
    lengths = [6, 6, 11]
    leaves, _ = draw(23, 4, 2, 8)
    packed = attention(*leaves, pack(lengths), is_causal=is_causal)
    parts = [
        attention(*(x[end - n : end] for x in leaves), pack([n]), is_causal=is_causal)
        for n, end in zip(lengths, itertools.accumulate(lengths), strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(parts), atol=1e-13, rtol=1e-13)


def test_inputs_are_unchanged_and_two_calls_are_bitwise_equal():
    leaves, do = draw(43, 4, 2, 8, torch.float32)
    before = [x.detach().clone() for x in (*leaves, do)]
    segments = pack([20, 3, 18])
    runs = [attention(*leaves, segments, is_causal=True) for _ in range(2)]
    grads = [gradients(o, leaves, do) for o in runs]
    assert torch.equal(*runs)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert all(torch.equal(x, y) for x, y in zip((*leaves, do), before, strict=True))


def test_strided_inputs_and_gradients():
    H, K, C = 4, 2, 6
    fused = torch.randn(
        14, H + 2 * K, C, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    ).requires_grad_()
    q, k, v = fused.split([H, K, K], dim=1)
    v = v.transpose(1, 2).contiguous().transpose(1, 2)  # channels far apart
    lengths = [5, 5, 3]
    actual = attention(q, k, v, pack(lengths), is_causal=True)
    expected = block_masked_sdpa(q, k, v, lengths, True)
    torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(o.sum(), fused)[0] for o in (actual, expected)]  # an expanded gradient
    torch.testing.assert_close(*grads)


def test_bfloat16_keeps_its_dtype_and_stays_close():
    leaves, do = draw(19, 4, 2, 8, torch.bfloat16)
    lengths = [7, 9]
    actual = attention(*leaves, pack(lengths), is_causal=True)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected = block_masked_sdpa(*wide, lengths, True)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.double(), expected, atol=0.02, rtol=0.02)
    for a, b in zip(gradients(actual, leaves, do), gradients(expected, wide, do.double()), strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, atol=0.06, rtol=0.05)


@pytest.mark.filterwarnings(QUIET_INDUCTOR)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager_and_other_lengths_do_not_recompile(backend):
    torch._dynamo.reset()
    run = torch.compile(attention, fullgraph=True, dynamic=False, backend=backend)
    leaves, do = draw(30, 4, 2, 8, torch.float32)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([10, 10, 10], [3, 0, 25], [30, 0, 0], [0, 0, 0], [9, 11, 9]):
            segments = pack(lengths)
            actual, expected = (fn(*leaves, segments, is_causal=True) for fn in (run, attention))
            torch.testing.assert_close(actual, expected)
            torch.testing.assert_close(gradients(actual, leaves, do), gradients(expected, leaves, do))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_under_checkpoint(compiled):
    leaves, do = draw(17, 4, 2, 8)
    segments = pack([6, 9])

    def block(q, k, v):
        return attention(q * 2, k, v, segments, is_causal=True)

    def run(*leaves):
        return checkpoint(block, *leaves, use_reentrant=False)

    fn = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    actual, expected = fn(*leaves), block(*leaves)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(actual, leaves, do), gradients(expected, leaves, do))


def test_operators_pass_torchs_own_checks():
    leaves, do = draw(9, 4, 2, 3)
    offsets = pack([3, 4]).offsets_N
    o, lse = attention_block(*leaves, Segments.of(offsets), is_causal=True)
    plain = [x.detach() for x in leaves]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.mmfn.attention.default, (*plain, offsets, True), test_utils=tests)
    args = (do, *plain, o, lse, offsets, True)
    torch.library.opcheck(torch.ops.mmfn.attention_grad.default, args, test_utils=tests)
    assert lse.shape == (9, 4)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("packing", PACKINGS)
def test_blocks_equal_their_reference(packing, is_causal):
    lengths, tail = PACKINGS[packing]
    leaves, do = draw(sum(lengths) + tail, 4, 2, 8)
    segments = pack(lengths)
    actual = attention_block(*leaves, segments, is_causal=is_causal)
    expected = attention_block_reference(*leaves, segments, is_causal=is_causal)
    torch.testing.assert_close(actual, expected)
    wanted = gradients(expected[0], leaves, do)
    for grad in (attention_block_grad, attention_block_grad_reference):
        torch.testing.assert_close(grad(do, *leaves, *actual, segments, is_causal=is_causal), wanted)
    seen = torch.isfinite(actual[1]).all(1)
    assert seen.tolist() == [True] * sum(lengths) + [False] * tail


@pytest.mark.parametrize(
    ("queries", "keys"),
    [([0, 5], [7, 4]), ([3, 4, 0, 2], [1, 0, 4, 9]), ([9], [14]), ([0, 0], [3, 0]), ([1], [1]), ([2, 2], [4, 4])],
)
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "compiled"])
def test_blocks_over_keys_of_their_own(queries, keys, traced):
    """Segment by segment by torch's own attention; a query without keys gives 0 and takes no part in a merge."""
    torch._dynamo.reset()
    T, S, H, K = 9, 15, 4, 2
    (q, _, _), do = draw(T, H, K, 8)
    (_, k, v), _ = draw(S, H, K, 8, seed=1)
    o = q * 0
    for i, (n, m) in enumerate(zip(queries, keys, strict=True)):
        a, b = sum(queries[:i]), sum(keys[:i])
        if n and m:
            own = (x.transpose(0, 1)[None] for x in (q[a : a + n], k[b : b + m], v[b : b + m]))
            part = F.scaled_dot_product_attention(*own, enable_gqa=True)[0].transpose(0, 1)
            o = torch.cat([o[:a], part, o[a + n :]])
    wanted = gradients(o, (q, k, v), do)
    rows = (q, k, v, pack(queries), pack(keys))
    block = torch.compile(attention_block, fullgraph=True, backend="aot_eager") if traced else attention_block
    plain = [x.detach() for x in rows[:3]]
    actual = block(*plain, *rows[3:], is_causal=False)
    torch.testing.assert_close(actual, attention_block_reference(*plain, *rows[3:], is_causal=False))
    torch.testing.assert_close(actual[0], o)
    for grad in (attention_block_grad, attention_block_grad_reference):
        torch.testing.assert_close(grad(do, *plain, *actual, *rows[3:], is_causal=False), wanted)
    empty = torch.zeros_like(actual[0]), torch.full_like(actual[1], -torch.inf)
    torch.testing.assert_close(merge_blocks(*actual, *empty), actual)


def test_blocks_without_values():
    """On the meta device: shapes and dtypes, with offsets or without."""
    q, k = (torch.empty(n, heads, 8, device="meta", dtype=torch.bfloat16) for n, heads in ((9, 4), (6, 2)))
    for device in ("cpu", "meta"):
        own = [replace(s, offsets_N=s.offsets_N.to(device)) for s in (pack([4, 5]), pack([4, 1]))]
        o, lse = attention_block(q, k, k, *own, is_causal=False)
        assert (o.shape, o.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (9, 4), torch.float32)
        grads = attention_block_grad(o, q, k, k, o, lse, *own, is_causal=False)
        assert [x.shape for x in grads] == [q.shape, k.shape, k.shape]


def test_blocks_are_checked():
    (q, k, v), _ = draw(6, 4, 2, 8)
    segments = pack([3, 3])
    with pytest.raises(ValueError, match="there are 6 queries and 5 keys; pass `keys`"):
        attention_block(q, k[:5], v[:5], segments, is_causal=False)
    with pytest.raises(ValueError, match="number of segments of the queries, 2, and is_causal False; got 2 and True"):
        attention_block(q, k, v, segments, segments, is_causal=True)
    with pytest.raises(ValueError, match="got 1 and False"):
        attention_block(q, k, v, segments, pack([6]), is_causal=False)
    with pytest.raises(ValueError, match="at most the 5 tokens"):
        attention_block(q, k[:5], v[:5], segments, segments, is_causal=False)


def test_blocks_over_two_halves_of_the_keys_merge_to_the_whole():
    """What ring attention does: the same queries against two sets of keys, merged by log-sum-exp."""
    n = 6
    (q, k0, v0), do = draw(n, 4, 2, 8)
    (_, k1, v1), _ = draw(n, 4, 2, 8, seed=1)
    segments = pack([n])
    blocks = [attention_block(q, k, v, segments, is_causal=False) for k, v in ((k0, v0), (k1, v1))]
    o, lse = merge_blocks(*blocks[0], *blocks[1])
    G = 2
    heads = [torch.cat(pair).repeat_interleave(G, 1).transpose(0, 1) for pair in ((k0, k1), (v0, v1))]
    expected = F.scaled_dot_product_attention(q.transpose(0, 1), *heads).transpose(0, 1)
    torch.testing.assert_close(o, expected)
    first, second = (
        attention_block_grad(do, q, k, v, o, lse, segments, is_causal=False) for k, v in ((k0, v0), (k1, v1))
    )
    wanted = torch.autograd.grad(expected, (q, k0, v0, k1, v1), do)
    torch.testing.assert_close((first[0] + second[0], *first[1:], *second[1:]), wanted)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_cached_equals_the_last_row_of_causal_attention(heads, dtype):
    lengths, S, (H, K, C) = [1, 5, 8, 3], 8, heads
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(4, H, C, dtype=dtype, generator=generator)
    k, v = (torch.randn(4, S, K, C, dtype=dtype, generator=generator) for _ in range(2))
    actual = attention_cached(q, k, v, torch.tensor(lengths))
    reference = attention_cached_reference(q, k, v, torch.tensor(lengths))
    tol = TOLERANCE[dtype]
    for b, n in enumerate(lengths):
        queries = q[b].expand(n, H, C)
        expected = block_masked_sdpa(queries, k[b, :n], v[b, :n], [n], True)[-1]
        torch.testing.assert_close(actual[b], expected, atol=tol, rtol=tol)
        torch.testing.assert_close(reference[b], expected, atol=tol, rtol=tol)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, s: (q, k[:-1], v[:-1], s), "of the same tokens; make T agree"),
        (lambda q, k, v, s: (q, k, v[..., :-1], s), "make S, K and C agree"),
        (lambda q, k, v, s: (q[:, :3], k, v, s), "must divide the number of query heads"),
        (lambda q, k, v, s: (q, k.float(), v, s), "one floating dtype"),
        (lambda q, k, v, s: (q, k, v, Segments.of(torch.tensor([0, 12]))), "at most the 9 tokens"),
        (lambda q, k, v, s: (q, k, v, Segments.of(torch.tensor([0, 5, 4]))), "must rise from 0"),
        (lambda q, k, v, s: (q, k, v, Segments.of(torch.tensor([1, 4]))), "must rise from 0"),
        (lambda q, k, v, s: (q, k, v, Segments.of(torch.tensor(3))), r"must be \[N \+ 1\]"),
    ],
)
def test_bad_input_is_refused(change, message):
    leaves, _ = draw(9, 4, 2, 8)
    with pytest.raises(ValueError, match=message):
        attention(*change(*leaves, pack([4, 4])), is_causal=True)


def test_cached_shapes_and_devices_are_checked():
    q, k = torch.zeros(2, 4, 8), torch.zeros(2, 5, 3, 8)
    with pytest.raises(ValueError, match="K dividing H"):
        attention_cached(q, k, k, torch.ones(2, dtype=torch.int64))
