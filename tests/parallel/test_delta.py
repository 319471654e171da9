"""Context parallelism of recurrent layers: states and halos that pass between the pieces of a row."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from mmfn import ops as tables
from mmfn.batch import Segments
from mmfn.ops.kernel import Kernel
from mmfn.parallel.mesh.layout import Layout
from mmfn.parallel.mesh.virtual import run_virtual, virtual
from mmfn.parallel.program import Program, pipe
from mmfn.parallel.transforms.context_parallel import context_parallel
from tests.parallel.delta_cases import MODES, REAL_CASES, DeltaCase, layout_of, on_real_rank, random_case
from tests.parallel.ranks import run_ranks

KINDS = ("ulysses", "gather")


@pytest.mark.parametrize("cp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_recurrence_on_one_device(kind: str, cp: int) -> None:
    for seed in range(8):
        case = random_case(kind, cp, seed)
        world = run_virtual(case.layout, case.on_rank)
        case.check(world.results)
        assert len({tuple(calls) for calls in world.calls}) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("lengths", "num_tokens"),
    [
        ((160,), 160),  # over all ranks and several chunks
        ((3, 150, 7), 160),
        ((40, 40, 40, 40), 160),  # one for each rank
        ((20, 0, 60, 0, 0), 160),  # the last two ranks hold padding alone
        ((1,) * 16, 16),
        ((8,), 8),  # a piece is shorter than the convolution reaches
        ((1, 5, 1), 8),
        ((0, 0), 8),
        ((), 8),
    ],
)
def test_segments_over_all_ranks_of_one_token_and_none(kind: str, lengths: tuple[int, ...], num_tokens: int) -> None:
    case = DeltaCase(kind=kind, layout=layout_of(kind, 4), lengths=lengths, num_tokens=num_tokens)
    case.check(virtual(case.layout, case.on_rank))


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_reference_table(kind: str) -> None:
    for seed in range(3):
        case = replace(random_case(kind, 3, seed), ops=tables.reference())
        case.check(virtual(case.layout, case.on_rank))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_twice_and_when_computed_again(kind: str) -> None:
    case = random_case(kind, 4, 1)
    modes = (MODES["eager"], MODES["eager"], MODES["remat"])
    first, *others = (virtual(case.layout, lambda mesh, wrap=wrap: case.on_rank(mesh, wrap)) for wrap in modes)
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_traffic_does_not_grow_with_the_tokens(kind: str) -> None:
    pieces, (_, H, C, V), D = 2 if kind == "gather" else 1, (2, 4, 5, 3), 32
    for num_tokens in (160, 640):
        case = DeltaCase(kind=kind, layout=layout_of(kind, 4), lengths=(num_tokens,), num_tokens=num_tokens)
        calls = run_virtual(case.layout, case.on_rank).calls[0]
        assert Counter((c.name, c.axis, c.site, c.shape) for c in calls) == {
            ("all_gather", "cp", "states", (pieces, H, C, V + C)): 1,
            ("all_gather", "cp", "states", (pieces, H, C, V)): 1,
            ("all_gather", "cp", "halo", (pieces, 3, D)): 1,
            ("reduce_scatter", "cp", "halo", (4 * pieces, 3, D)): 1,
        }


@pytest.mark.parametrize("kind", KINDS)
def test_a_segment_changes_no_bit_of_another(kind: str) -> None:
    """Not where it lies on several ranks either."""
    case = DeltaCase(kind=kind, layout=layout_of(kind, 4), lengths=(50, 60, 40), num_tokens=160)
    (x, weight, g, beta), _ = case.draw()
    is_other_T = (torch.arange(160) < 50) | (torch.arange(160) >= 110)
    outs = []
    for row in (x, x.where(is_other_T[:, None], 3 * x)):

        def run(mesh: Any, row: torch.Tensor = row) -> tuple[torch.Tensor, torch.Tensor]:
            program, segments = case.program(mesh), case.segments("cp")
            order = torch.cat([place.chunk(8)[i] for place, i in [(torch.arange(160), j) for j in _chunks(kind, mesh)]])
            return order, case.layer(program.ops, segments, row[order], weight, g[order], beta[order])

        order, out = (torch.cat(parts) for parts in zip(*virtual(case.layout, run), strict=True))
        outs.append(torch.empty_like(out).index_copy(0, order, out))
    assert torch.equal(outs[0][is_other_T], outs[1][is_other_T])
    assert not torch.equal(outs[0], outs[1])


def _chunks(kind: str, mesh: Any) -> tuple[int, int]:
    r = mesh["cp"].index
    return (r, 7 - r) if kind == "gather" else (2 * r, 2 * r + 1)


def test_what_is_whole_on_a_rank_goes_to_the_tables_own() -> None:
    case = DeltaCase(kind="ring", layout=Layout(cp=2), lengths=(20,), num_tokens=24)
    rows, _ = case.draw()

    def run(mesh: Any) -> torch.Tensor:
        ops = pipe(Program.of(None, mesh=mesh), context_parallel("ring", num_heads=4, num_kv_heads=4, towers={})).ops
        return case.layer(ops, case.segments(), *rows)

    want = case.layer(tables.portable(), case.segments(), *rows)
    assert all(torch.equal(found, want) for found in virtual(case.layout, run))


@pytest.mark.parametrize("kind", ["ring", "usp"])
@pytest.mark.parametrize("is_told", [True, False])
def test_kinds_that_cut_segments_are_refused(kind: str, is_told: bool) -> None:
    layout = Layout(cp=4, ulysses=2) if kind == "usp" else Layout(cp=2)
    x, message = torch.zeros(4, 2), f"'{kind}'.* cuts every segment .* recurrent layers; use kind 'ulysses' or 'gather'"
    segments = Segments.of(torch.tensor([0, 8], dtype=torch.int32), "cp")
    rows = [torch.zeros(4, 1, 2)] * 3 + [torch.zeros(4, 1)] * 2

    def run(mesh: Any, op: str) -> None:
        transform = context_parallel(kind, num_heads=4, num_kv_heads=4, towers={}, is_recurrent=is_told)
        ops = pipe(Program.of(None, mesh=mesh), transform).ops
        ops.causal_conv1d(x, x.T, segments) if op == "conv" else ops.gated_delta_rule(*rows, segments)

    for op in ("conv", "rule"):
        with pytest.raises(ValueError, match=message):
            virtual(layout, lambda mesh, op=op: run(mesh, op))


def test_declares_what_the_tables_ops_do() -> None:
    case = DeltaCase(kind="gather", layout=Layout(cp=2), lengths=(8,), num_tokens=8)
    ops = virtual(case.layout, lambda mesh: case.program(mesh).ops)[0]
    for name in ("gated_delta_rule", "causal_conv1d"):
        op, whole = getattr(ops, name), getattr(tables.portable(), name)
        assert isinstance(op, Kernel)
        assert set(whole.operators) <= set(op.operators)
        assert op.results == whole.results


@pytest.mark.dist
def test_on_real_ranks() -> None:
    modes = list(MODES)
    cases = [case for case in REAL_CASES for _ in modes]
    for case, *found in zip(cases, *run_ranks(2, on_real_rank, modes), strict=True):
        case.check(found)
