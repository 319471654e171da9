"""Skipped steps: which ones, counted where, the same on every rank."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfn import ops, tree
from mmfn.ops import Ops
from mmfn.parallel.mesh.layout import Layout, Mesh, distributed_mesh
from mmfn.parallel.mesh.virtual import run_virtual
from mmfn.parallel.program import Program, pipe
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.expert_parallel import expert_parallel
from mmfn.parallel.weights.sharding import local, shard_params
from mmfn.train import optim
from mmfn.train.guard import Guard
from mmfn.train.schedule import schedule
from mmfn.train.step import State, init_state, make_step
from tests.parallel.conformance import Cell, batch_of
from tests.parallel.ranks import run_ranks
from tests.tiny import model_of


def judged(guard: Guard, norms: list[float], loss: float = 1.0) -> tuple[list[bool], Any]:
    state, taken = guard.init(None), []
    for norm in norms:
        is_taken, state = guard.judge(state, torch.tensor(loss), torch.tensor(norm))
        taken.append(bool(is_taken))
    return taken, state


def test_what_is_not_finite_is_skipped_and_counted() -> None:
    taken, state = judged(Guard(), [1.0, torch.inf, torch.nan, 1e30, torch.nan])
    assert taken == [True, False, False, True, False]
    assert {name: int(x) for name, x in state.items()} == {"skipped": 3, "in_a_row": 1}
    taken, state = judged(Guard(), [1.0, 1.0], loss=torch.nan)
    assert taken == [False, False]
    assert {name: int(x) for name, x in state.items()} == {"skipped": 2, "in_a_row": 2}


@pytest.mark.parametrize(("window", "factor"), [(1, 2.0), (4, 3.0), (5, 1.5), (16, 4.0)])
def test_spikes_are_those_of_the_written_rule(window: int, factor: float) -> None:
    g = torch.Generator().manual_seed(window)
    norms = (torch.randn(200, generator=g).exp() * 3).tolist()
    norms[60], norms[61] = 1e4, torch.nan
    accepted: list[float] = []
    expected = []
    for norm in norms:
        last = accepted[-window:]
        median = statistics.median_low(last + [torch.inf] * (window - len(last)))
        expected.append(norm <= factor * median)  # false for a norm that is no number
        if expected[-1]:
            accepted.append(norm)
    taken, state = judged(Guard(window=window, factor=factor), norms)
    assert taken == expected
    assert 1 < expected.count(False) < 199
    assert expected[60:62] == [False, False]
    assert int(state["skipped"]) == expected.count(False)
    assert state["norms"].tolist() == pytest.approx(accepted[-window:])


def test_nothing_is_a_spike_above_a_median_of_zero() -> None:
    taken, state = judged(Guard(window=3), [0.0, 0.0, 0.0, 1.0, torch.inf, 2.0, 100.0])
    assert taken == [True, True, True, True, False, True, False]
    assert int(state["in_a_row"]) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Guard(window=-1), "window of a guard must not be negative, got -1"),
        (lambda: Guard(window=8, factor=1.0), "factor of a guard must be above 1, got 1.0"),
    ],
)
def test_errors(make: Callable[[], Guard], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---- one rank's gradient in a real step


class _Poison(torch.autograd.Function):
    """The identity, with a gradient that is not a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.full_like(grad, torch.nan)


def poisoned(table: Ops, where: str) -> Ops:
    """The table with a norm whose gradient ("gradient") or result ("loss") is not a number."""

    def rms_norm(x: Tensor, *rest: Any) -> Tensor:
        y = table.rms_norm(x, *rest)
        return _Poison.apply(y) if where == "gradient" else y * torch.nan

    return replace(table, rms_norm=rms_norm)


def two_steps(mesh: Mesh, where: str, donate: bool = True) -> tuple[State, State, State, Any]:
    """A clean step, then one in which the last rank is poisoned: the states before and behind it, and a third step."""
    cell = Cell(layout=mesh.layout, name="", transforms=(), family="moe", batch="text", num_layers=1)
    model = model_of(cell.family, cell.num_layers)
    is_bad = mesh["world"].index == mesh["world"].size - 1
    muon = optim.with_others(optim.muon(compute=torch.float64), optim.adamw(), model.family.specs(model.cfg))
    tx = optim.chain(optim.clip_by_global_norm(0.5), muon, optim.ema(0.9))
    rate = schedule("constant", peak=1e-2, num_steps=1)

    def build(table: Ops) -> Any:
        program = Program.of(model.family.specs(model.cfg), table, mesh)
        program = pipe(program, data_parallel(), expert_parallel())
        return program, make_step(model.family, model.cfg, program, "per_token_loss", tx, schedule=rate, donate=donate)

    program, clean = build(ops.portable())
    _, bad = build(poisoned(ops.portable(), where) if is_bad else ops.portable())
    params = tree.map(torch.clone, model.params)
    if mesh.layout.world > 1:
        params = shard_params(params, program.specs, mesh)
    batch = program.split(batch_of(cell, mesh["batch"].index, mesh["batch"].size))
    state, _ = clean(init_state(params, tx), [batch])
    before = tree.map(lambda x: local(x).clone(), state)
    state, metrics = bad(state, [batch])
    after = tree.map(lambda x: local(x).clone(), state)
    state, last = clean(state, [batch])
    return before, after, tree.map(lambda x: local(x).clone(), state), (metrics, last)


def check_skipped(before: State, after: State, last: State, metrics: Any) -> None:
    for name in ("params", "opt"):
        for path, old in tree.items(before[name]):
            assert torch.equal(dict(tree.items(after[name]))[path], old), path
    assert {name: int(x) for name, x in after["guard"].items()} == {"skipped": 1, "in_a_row": 1}
    assert {name: int(x) for name, x in last["guard"].items()} == {"skipped": 1, "in_a_row": 0}
    assert [int(m["skipped"]) for m in metrics] == [1, 0]
    assert int(after["step"]) == 2
    assert not torch.equal(tree.leaves(last["params"])[0], tree.leaves(after["params"])[0])


@pytest.mark.parametrize(
    ("layout", "where", "donate"),
    [
        (Layout(), "gradient", True),
        (Layout(), "loss", False),
        (Layout(dp=2), "loss", True),
        (Layout(dp=3), "gradient", False),
        (Layout(replicate=2, dp=2), "gradient", True),
        (Layout(dp=4, ep=2), "gradient", True),
        (Layout(dp=4, ep=2), "loss", False),
    ],
    ids=str,
)
def test_one_rank_that_is_not_finite_changes_nothing_on_any(layout: Layout, where: str, donate: bool) -> None:
    for found in run_virtual(layout, lambda mesh: two_steps(mesh, where, donate)).results:
        check_skipped(*found)


@pytest.mark.dist
def test_one_rank_that_is_not_finite_over_gloo() -> None:
    for found in run_ranks(2, on_gloo):
        check_skipped(*found)


def on_gloo() -> Any:
    """Runs on every rank."""
    return two_steps(distributed_mesh(Layout(dp=2)), "gradient")
