"""Context parallelism: attention over tokens that lie on several ranks, and training steps made of it."""

from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from mmfn import ops as tables
from mmfn.batch import Segments
from mmfn.ops.attention import attention_reference
from mmfn.parallel.context.token_order import segment_multiple
from mmfn.parallel.context.ulysses import kv_repeats
from mmfn.parallel.mesh.layout import Layout
from mmfn.parallel.mesh.virtual import run_virtual, virtual
from mmfn.parallel.program import Program, lower, pipe
from mmfn.parallel.transforms.context_parallel import context_parallel
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.remat import remat
from tests.parallel.conformance import Cell, check_cell, spread
from tests.parallel.cp_cases import REAL_CASES, Case, on_real_rank, random_case, ulysses
from tests.parallel.ranks import run_ranks

LAYOUTS = [
    *(("ulysses", ulysses(cp)) for cp in (2, 3, 4, 8)),
    *(("ring", Layout(cp=cp)) for cp in (2, 3, 4, 8)),
    *(("gather", Layout(cp=cp)) for cp in (2, 3, 4, 8)),
    *(("usp", Layout(cp=cp, ulysses=u)) for cp, u in ((4, 2), (6, 2), (6, 3), (8, 2), (8, 4))),
]
NUM_CASES = 8  # of each kind and layout


@pytest.mark.parametrize(("kind", "layout"), LAYOUTS, ids=str)
def test_equals_packed_attention_on_one_device(kind: str, layout: Layout) -> None:
    for seed in range(NUM_CASES):
        case = random_case(kind, layout, seed)
        world = run_virtual(layout, case.on_rank)
        case.check(world.results)
        assert len({tuple(calls) for calls in world.calls}) == 1


@pytest.mark.parametrize("kind", ["ring", "gather", "usp"])
def test_with_the_reference_table(kind: str) -> None:
    layout = Layout(cp=4, ulysses=2 if kind == "usp" else 1)
    for seed in range(3):
        case = replace(random_case(kind, layout, seed), ops=tables.reference())
        case.check(virtual(layout, case.on_rank))


@pytest.mark.parametrize(
    ("kind", "lengths"),
    [
        ("gather", (64,)),
        ("gather", (1,) * 64),
        ("gather", (1, 62, 1)),
        ("gather", (7, 1, 1, 40, 3)),
        ("gather", ()),
        ("ulysses", (64,)),
        ("ulysses", (1,) * 64),
        ("ring", (64,)),
        ("ring", (8,) * 8),  # one token of each segment in every chunk
        ("ring", (8, 0, 40, 0)),
        ("ring", ()),
    ],
)
def test_segments_that_span_all_ranks_and_of_one_token(kind: str, lengths: tuple[int, ...]) -> None:
    layout = ulysses(4) if kind == "ulysses" else Layout(cp=4)
    case = Case(kind=kind, layout=layout, lengths=lengths, num_tokens=64, num_heads=4, num_kv_heads=2)
    case.check(virtual(layout, case.on_rank))


def test_the_same_bits_twice() -> None:
    for kind, layout in (("ring", Layout(cp=4)), ("gather", Layout(cp=4)), ("ulysses", ulysses(4))):
        case = random_case(kind, layout, 3)
        first, second = virtual(layout, case.on_rank), virtual(layout, case.on_rank)
        assert all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


def test_ulysses_takes_attention_that_is_not_causal_and_others_refuse_it() -> None:
    case = random_case("ulysses", ulysses(2), 1)
    (q, k, v), _ = case.draw()
    segments = Segments.of(case.offsets(), spread="cp")

    def attend(kind: str, mesh: Any) -> torch.Tensor:
        transform = context_parallel(kind, num_heads=case.num_heads, num_kv_heads=case.num_kv_heads, towers={})
        own = [x.detach().chunk(2)[mesh["cp"].index] for x in (q, k, v)]
        return pipe(Program.of(None, mesh=mesh), transform).ops.attention(*own, segments, is_causal=False)

    parts = virtual(case.layout, partial(attend, "ulysses"))
    torch.testing.assert_close(torch.cat(parts), attention_reference(q, k, v, segments, is_causal=False))
    for kind in ("ring", "gather"):
        with pytest.raises(ValueError, match="causal but got is_causal False"):
            virtual(Layout(cp=2), partial(attend, kind))


def test_collectives_of_one_attention() -> None:
    """Forward and backward together, as the modules say."""
    expected = {
        "ulysses": {("all_to_all", "ulysses", "heads"): 4},
        "ring": {("shift", "ring", "ring"): 3 + 3 + 4},
        "gather": {("all_gather", "cp", "keys"): 1, ("reduce_scatter", "cp", "keys"): 1},
        "usp": {("all_to_all", "ulysses", "heads"): 4, ("shift", "ring", "ring"): 1 + 1 + 2},
    }
    for kind, counts in expected.items():
        layout = {"ulysses": ulysses(4), "usp": Layout(cp=4, ulysses=2)}.get(kind, Layout(cp=4))
        case = random_case(kind, layout, 0)
        calls = run_virtual(layout, case.on_rank).calls[0]
        assert Counter((c.name, c.axis, c.site) for c in calls) == counts


def cell(kind: str, layout: Layout, *others: Any, **fields: Any) -> Cell:
    """Any order of transforms will do: here context_parallel comes last."""
    given = {"name": kind, "pack": {"segment_multiple": segment_multiple(kind, layout)}}
    return Cell(
        layout=layout,
        transforms=(data_parallel(), *others, spread(kind, fields.get("family", "dense"))),
        **(given | fields),
    )


SELECTIVE = remat("selective", save=("attention",))
STEPS = [
    cell("ulysses", ulysses(2)),
    cell("ulysses", Layout(dp=2, cp=2, ulysses=2), batch="first half without images"),
    cell("ulysses", ulysses(8), batch="video"),
    cell("ring", Layout(cp=2), batch="text"),
    cell("ring", Layout(cp=3)),
    cell("ring", Layout(dp=2, cp=2), batch="first half unsupervised"),
    cell("ring", Layout(replicate=2, cp=2), batch="first half without images"),
    cell("ring", Layout(cp=2), remat("full"), name="ring, remat"),
    cell("ring", Layout(cp=2), SELECTIVE, name="ring, remat but attention"),
    cell("usp", Layout(cp=4, ulysses=2), batch="video"),
    cell("usp", Layout(cp=4, ulysses=2), remat("full"), name="usp, remat"),
    cell("usp", Layout(dp=2, cp=4, ulysses=2)),
    cell("gather", Layout(cp=3)),
    cell("gather", Layout(dp=2, cp=2), batch="first half without images"),
    cell("gather", Layout(cp=2), remat("full"), name="gather, remat"),
    cell("gather", Layout(cp=2), family="moe"),
    cell("ring", Layout(dp=2, cp=2), family="moe", batch="first half unsupervised"),
]


@pytest.mark.parametrize("cell", STEPS, ids=str)
def test_a_step_of_a_model(cell: Cell) -> None:
    """Loss, norm, gradients (the tower's too) and updated parameters, by the same collectives on every rank."""
    check_cell(cell)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("kinds", "modes"),
    [
        (["ulysses", "ring", "gather"], ["eager", "remat", "compiled"]),
        (["usp"], ["eager"]),
        pytest.param(["ulysses", "ring", "gather"], ["compiled, remat"], marks=pytest.mark.slow),
        pytest.param(["usp"], ["compiled, remat"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_on_real_ranks(kinds: list[str], modes: list[str]) -> None:
    cases = [REAL_CASES[kind] for kind in kinds for _ in modes]
    ranks = run_ranks(cases[0].layout.world, on_real_rank, kinds, modes)
    for case, *found in zip(cases, *ranks, strict=True):
        case.check(found)


def test_what_it_says() -> None:
    def notes(kind: str, layout: Layout) -> str:
        transform = context_parallel(kind, num_heads=8, num_kv_heads=2, towers={})
        return virtual(layout, lambda mesh: pipe(Program.of(None, mesh=mesh), transform).notes)[0][0]

    assert notes("gather", Layout(cp=2)) == "context_parallel('gather'): tokens over 2 ranks, in multiples of 4"
    assert notes("ring", Layout(cp=2)) == (
        "context_parallel('ring'): tokens over 2 ranks, in multiples of 4, segments of 4"
    )
    assert notes("ulysses", ulysses(4)).endswith("in multiples of 4; every kv head 2 times")


def test_kv_heads_are_repeated_no_more_than_needed() -> None:
    assert [kv_repeats(k, 4) for k in (1, 2, 4, 8, 6, 3)] == [4, 2, 1, 1, 2, 4]


def test_one_cp_rank_is_the_identity() -> None:
    program = Program.of(None)
    assert pipe(program, context_parallel("ring", num_heads=4, num_kv_heads=2, towers={})) is program


@pytest.mark.parametrize(
    ("kind", "layout", "heads", "message"),
    [
        ("ulises", Layout(cp=2), (8, 2), "'ulises' is unknown; use one of ulysses, ring, usp, gather"),
        ("ulysses", Layout(cp=4), (8, 2), r"cp 4 \(ulysses 1\) needs ulysses = cp; set layout.ulysses to 4"),
        ("ring", ulysses(4), (8, 2), "needs ulysses = 1; set layout.ulysses to 1, or use kind 'ulysses' or 'usp'"),
        ("gather", Layout(cp=4, ulysses=2), (8, 2), "needs ulysses = 1"),
        ("usp", ulysses(4), (8, 2), "needs 1 < ulysses < cp"),
        ("usp", Layout(cp=4), (8, 2), "needs 1 < ulysses < cp"),
        ("ulysses", ulysses(3), (8, 2), "8 query heads, which ulysses 3 does not divide; use an ulysses that"),
        ("ring", Layout(cp=2), (8, 3), "3 kv heads do not divide 8 query heads"),
    ],
)
def test_refused_before_any_work(kind: str, layout: Layout, heads: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        virtual(
            layout,
            lambda mesh: pipe(
                Program.of(None, mesh=mesh),
                context_parallel(kind, num_heads=heads[0], num_kv_heads=heads[1], towers={}),
            ),
        )


def test_gradients_of_a_spread_batch_need_data_parallel() -> None:
    def build(mesh: Any, *more: Any) -> Program:
        spread = context_parallel("gather", num_heads=4, num_kv_heads=2, towers={})
        return lower(pipe(Program.of(None, mesh=mesh), spread, *more))

    done = virtual(Layout(cp=2), lambda mesh: build(mesh, data_parallel()))[0]
    assert {"cp", "ulysses"} <= done.uses
    with pytest.raises(ValueError, match=r"layout cp 2: no transform takes care of dp; add data_parallel\(\)"):
        virtual(Layout(cp=2), build)
