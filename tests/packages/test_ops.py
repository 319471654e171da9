"""Entries that packages make, with fakes of them, against the reference: outputs, gradients, states and pieces."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfn.ops import Ops, reference
from mmfn.ops.packages.fla_conv import CONV, CONV_GRAD
from mmfn.ops.packages.fla_rule import ENTRY_GRAD, RULE, RULE_GRAD, STATE
from tests.ops.delta_cases import HEADS, PACKINGS, check_close, draw, outcome, pack
from tests.packages.fakes import FUNCTIONS, calls, installed
from tests.packages.table import laid_over

REFERENCE = reference()
LONG = "mixed with empty and of one"


def spoil(leaves: list[Tensor], num_tokens: int) -> None:
    """What lies behind the last segment, which nobody may read, is NaN from now on."""
    with torch.no_grad():
        for x in leaves:
            x[num_tokens:] = torch.nan


@pytest.mark.parametrize("heads", [HEADS[0], *(pytest.param(x, marks=pytest.mark.slow) for x in HEADS[1:])], ids=str)
@pytest.mark.parametrize("packing", PACKINGS)
def test_gated_delta_rule(packing: str, heads: tuple[int, int, int, int]) -> None:
    lengths, tail = PACKINGS[packing]
    leaves, do = draw(sum(lengths) + tail, heads)
    wanted = outcome(REFERENCE.gated_delta_rule, leaves, do, pack(lengths))
    spoil(leaves, sum(lengths))
    with installed():
        found = outcome(laid_over().gated_delta_rule, leaves, do, pack(lengths))
        assert calls["rule"] == calls["rule_grad"] == (1 if sum(lengths) else 0), "nothing is computed twice"
    check_close(found, wanted, 1e-11)


def test_rows_in_bfloat16() -> None:
    """Decays in float32, as models have them: every gradient in the dtype of what it is of, near the exact one."""
    lengths, _ = PACKINGS[LONG]
    leaves, do = draw(sum(lengths), (2, 4, 8, 6))
    wanted = outcome(REFERENCE.gated_delta_rule, leaves, do, pack(lengths))
    rows = [x.detach().to(torch.float32 if i == 3 else torch.bfloat16).requires_grad_() for i, x in enumerate(leaves)]
    with installed():
        found = outcome(laid_over().gated_delta_rule, rows, do.bfloat16(), pack(lengths))
        state = laid_over().gated_delta_state(*(x.detach() for x in rows[1:]), pack(lengths))
    assert [x.dtype for x in found] == [torch.bfloat16, *(x.dtype for x in rows)]
    assert state.dtype == torch.float32
    for a, b in zip(found, wanted, strict=True):
        assert (a.double() - b).abs().max() <= 4e-2 * b.abs().max()


@pytest.mark.parametrize("packing", [*PACKINGS, "nothing between"])
def test_pieces(packing: str) -> None:
    lengths, tail = PACKINGS.get(packing, ([3, 0, 0, 5], 2))
    heads = (2, 4, 6, 4)
    leaves, do = draw(sum(lengths) + tail, heads)
    rows, segments = [x.detach() for x in leaves], pack(lengths)
    state, dend = torch.randn(2, 4, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)

    def run(ops: Ops) -> list[Tensor]:
        out = ops.gated_delta_piece(*rows, segments, state)
        grads = ops.gated_delta_piece_grad(do, *rows, segments, state, dend)
        return [out, *grads, ops.gated_delta_entry_grad(do, *rows[:2], *rows[3:], segments)]

    with installed():
        found = run(laid_over())
    check_close(found, run(REFERENCE), 1e-11)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("more", [None, 3])
def test_states(packing: str, more: int | None) -> None:
    lengths, tail = PACKINGS[packing]
    rows = [x.detach() for x in draw(sum(lengths) + tail, (2, 4, 6, 4))[0]][1:]
    shape = (len(lengths), 4, 6, 4 + (more or 0))
    states = None if more is None else torch.randn(shape, dtype=torch.float64)
    with installed():
        found = laid_over().gated_delta_state(*rows, pack(lengths), states)
    check_close([found], [REFERENCE.gated_delta_state(*rows, pack(lengths), states)], 1e-11)


@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("packing", PACKINGS)
def test_causal_conv1d(packing: str, taps: int) -> None:
    lengths, tail = PACKINGS[packing]
    T, draws = sum(lengths) + tail, torch.Generator().manual_seed(taps)
    x, dy = torch.randn(2, T, 6, dtype=torch.float64, generator=draws).unbind(0)
    weight = torch.randn(6, taps, dtype=torch.float64, generator=draws).requires_grad_()
    leaves = [x.requires_grad_(), weight]
    wanted = outcome(REFERENCE.causal_conv1d, leaves, dy, pack(lengths))
    spoil(leaves[:1], sum(lengths))
    with installed():
        found = outcome(laid_over().causal_conv1d, leaves, dy, pack(lengths))
    check_close(found, wanted, 1e-11)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("packing", [LONG, "all empty", "one token"])
def test_attention(packing: str, is_causal: bool) -> None:
    lengths, tail = PACKINGS[packing]
    T, draws = sum(lengths) + tail, torch.Generator().manual_seed(7)
    q, do = torch.randn(2, T, 4, 8, dtype=torch.float64, generator=draws).unbind(0)
    k, v = torch.randn(2, T, 2, 8, dtype=torch.float64, generator=draws).unbind(0)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run(ops: Ops) -> list[Tensor]:
        return outcome(lambda *xs: ops.attention(*xs[:3], xs[3], is_causal=is_causal), leaves, do, pack(lengths))

    with installed():
        found = run(laid_over())
        assert calls["attention"] == calls["attention_grad"] == (1 if sum(lengths) else 0)
    check_close(found, run(REFERENCE), 1e-11)


def test_blocks_of_attention() -> None:
    segments, keys, draws = pack([5, 0, 4]), pack([0, 5, 2]), torch.Generator().manual_seed(3)
    q, do = torch.randn(2, 11, 4, 8, dtype=torch.float64, generator=draws).unbind(0)
    k, v = torch.randn(2, 8, 2, 8, dtype=torch.float64, generator=draws).unbind(0)
    o, lse = REFERENCE.attention_block(q, k, v, segments, keys, is_causal=False)
    saved = do, q, k, v, o, (lse + 0.7).clamp(min=-1e9), segments, keys
    with installed():
        found_o, found_lse = laid_over().attention_block(q, k, v, segments, keys, is_causal=False)
        grads = laid_over().attention_block_grad(*saved, is_causal=False)
    has_keys = lse > -torch.inf
    assert torch.equal(found_lse > -torch.inf, has_keys)
    check_close([found_o, found_lse[has_keys]], [o, lse[has_keys]], 1e-11)
    check_close(grads, REFERENCE.attention_block_grad(*saved, is_causal=False), 1e-11)


def test_nothing_of_the_device_is_read() -> None:
    """On a device without values a read would raise; that the chunks of segments are right the fakes say."""
    lengths, (K, H, C, V) = [70, 0, 3], (1, 2, 4, 4)
    rows = [x.detach().to("meta") for x in draw(75, (K, H, C, V))[0]]
    do, state, segments = rows[2], torch.empty(H, C, V, device="meta", dtype=torch.float64), pack(lengths)
    segments = replace(segments, offsets_N=segments.offsets_N.to("meta"))
    bounds = segments.offsets_N, segments.host_N
    with installed() as modules:
        for name, function in SHAPES.items():
            (module,) = (modules[m] for m, functions in FUNCTIONS.items() if name in functions)
            setattr(module, name, function)
        out = RULE.direct(*rows, *bounds, state)
        grads = RULE_GRAD.direct(do, *rows, None, None, *bounds, state, state)
        entry = ENTRY_GRAD.direct(do, *rows[:2], *rows[3:], *bounds)
        ends = STATE.direct(*rows[1:], *bounds, None)
        x, weight = rows[2][:, 0], torch.empty(V, 4, device="meta")
        conv = [CONV.direct(x, weight, *bounds), *CONV_GRAD.direct(x, x, weight, *bounds)]
    assert [x.shape for x in out] == [(75, H, V), (75, H), (75, H, 64)]
    assert [x.shape for x in grads] == [x.shape for x in rows]
    assert (entry.shape, ends.shape) == ((H, C, V), (3, H, C, V))
    assert [x.shape for x in conv] == [x.shape, x.shape, weight.shape]


def _states(k: Tensor, v: Tensor, num: int) -> Tensor:
    return v.new_empty(num, v.shape[2], k.shape[3], v.shape[3])


SHAPES: dict[str, Callable[..., Any]] = {  # what the functions return, without values
    "l2norm_fwd": lambda x, eps: (torch.empty_like(x), x.new_empty(x.shape[:-1]).flatten()),
    "l2norm_bwd": lambda y, rstd, dy, eps: torch.empty_like(y),
    "chunk_gated_delta_rule_fwd": lambda q, k, v, g, beta, cu_seqlens, **_: (
        *(torch.empty_like(g), torch.empty_like(v), g.new_empty(*g.shape, 64)),
        *(_states(k, v, len(cu_seqlens) - 1), None, None),
    ),
    "chunk_gated_delta_rule_bwd": lambda q, k, v, g, beta, cu_seqlens, **_: (
        *map(torch.empty_like, (q, k, v, beta, g)),
        *(_states(k, v, len(cu_seqlens) - 1), None, None),
    ),
    "causal_conv1d_fwd": lambda x, weight, **_: (torch.empty_like(x), None),
    "causal_conv1d_bwd": lambda x, weight, **_: (torch.empty_like(x), torch.empty_like(weight), None, None, None),
}
