"""Virtual ranks and the collectives among them, against written formulas."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmfn.parallel.mesh.axis import Axis, all_gather, exchange, psum, shift
from mmfn.parallel.mesh.layout import Layout, Mesh
from mmfn.parallel.mesh.virtual import DesertedError, run_virtual, virtual

FOUR = Layout(dp=4)


def rows(rank: int, num: int = 4) -> Tensor:
    g = torch.Generator().manual_seed(rank)
    return torch.randn(num, 3, generator=g, dtype=torch.float64)


def on_dp(fn: Callable[[Axis], Any], layout: Layout = FOUR) -> list[Any]:
    return virtual(layout, lambda mesh: fn(mesh["dp"]))


def test_collectives() -> None:
    xs = [rows(r) for r in range(4)]
    for rank, out in enumerate(on_dp(lambda a: a.all_gather(rows(a.index), "t"))):
        assert torch.equal(out, torch.cat(xs)), rank
    for rank, out in enumerate(on_dp(lambda a: a.reduce_scatter(rows(a.index), "t"))):
        assert torch.equal(out, xs[0][rank : rank + 1] + xs[1][rank] + xs[2][rank] + xs[3][rank])
    for out in on_dp(lambda a: a.all_reduce(rows(a.index), "t")):
        assert torch.equal(out, xs[0] + xs[1] + xs[2] + xs[3])
    for rank, out in enumerate(on_dp(lambda a: a.all_to_all(rows(a.index), "t"))):
        assert torch.equal(out, torch.stack([x[rank] for x in xs]))
    for rank, out in enumerate(on_dp(lambda a: a.shift(rows(a.index), 3, "t"))):
        assert torch.equal(out, xs[(rank - 3) % 4])


def test_uneven_exchange_there_and_back() -> None:
    """Rank i sends i * j rows to rank j, so that some send and some receive nothing."""

    def run(axis: Axis) -> tuple[Tensor, Tensor]:
        sizes = [axis.index * j for j in range(4)]
        x = rows(axis.index, sum(sizes))
        there = axis.all_to_all(x, "t", sizes, sizes)
        return x, axis.all_to_all(there, "t", sizes, sizes)

    for x, back in on_dp(run):
        assert torch.equal(x, back)


DIFFERENTIABLE: dict[str, tuple[Callable[[Tensor, Axis], Tensor], Callable[[list[Tensor], int], Tensor]]] = {
    "psum": (lambda x, a: psum(x, a, "t"), lambda xs, rank: torch.stack(xs).sum(0)),
    "all_gather": (lambda x, a: all_gather(x, a, "t"), lambda xs, rank: torch.cat(xs)),
    "exchange": (lambda x, a: exchange(x, a, "t"), lambda xs, rank: torch.cat([x[rank : rank + 1] for x in xs])),
    "shift": (lambda x, a: shift(x, a, "t", 1), lambda xs, rank: xs[(rank - 1) % 4]),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_are_those_of_the_sum_of_all_losses(name: str) -> None:
    """Every rank's loss weighs its output by other numbers; the oracle adds up the losses of all ranks."""
    collective, formula = DIFFERENTIABLE[name]

    def loss(out: Tensor, rank: int) -> Tensor:
        return (out.sin() * torch.arange(out.numel(), dtype=torch.float64).view_as(out).add(rank)).sum()

    def run(axis: Axis) -> Tensor:
        x = rows(axis.index).requires_grad_()
        return torch.autograd.grad(loss(collective(x, axis), axis.index), x)[0]

    xs = [rows(r).requires_grad_() for r in range(4)]
    total = torch.stack([loss(formula(xs, r), r) for r in range(4)]).sum()
    for got, want in zip(on_dp(run), torch.autograd.grad(total, xs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    assert collective(xs[0], Axis(name="alone")) is xs[0]


def test_what_is_sent_may_be_overwritten() -> None:
    def run(axis: Axis) -> Tensor:
        x = torch.full((4,), float(axis.index))
        outs = [axis.all_gather(x, "t"), axis.all_to_all(x, "t"), axis.all_reduce(x, "t")]
        x.fill_(-1.0)
        axis.all_reduce(x, "t")
        return torch.cat(outs)

    want = torch.tensor([0.0, 1, 2, 3]).repeat_interleave(4), torch.tensor([0.0, 1, 2, 3]), torch.full((4,), 6.0)
    for out in on_dp(run):
        assert torch.equal(out, torch.cat(want))


def test_log() -> None:
    def run(mesh: Mesh) -> None:
        mesh["dp"].all_reduce(torch.zeros(2, 3), "first")
        mesh["cp"].all_gather(torch.zeros(5, dtype=torch.int64), "second")

    world = run_virtual(Layout(dp=2, cp=2), run)
    assert len(world.calls) == 4
    for calls in world.calls:
        assert [(c.axis, c.name, c.site) for c in calls] == [
            ("dp", "all_reduce", "first"),
            ("cp", "all_gather", "second"),
        ]
        assert [(c.shape, c.dtype) for c in calls] == [((2, 3), torch.float32), ((5,), torch.int64)]


def test_ranks_that_disagree_are_stopped() -> None:
    def other_site(axis: Axis) -> None:
        axis.all_reduce(torch.zeros(1), "a" if axis.index else "b")

    with pytest.raises(ValueError, match=r"on axis dp, rank \d calls \('all_reduce', '[ab]'.* but rank \d .*'[ab]'"):
        on_dp(other_site)
    with pytest.raises(
        ValueError, match=r"on axis dp, rank \d calls \('all_gather', 't', \([12],\).* but rank \d .*\([12],\)"
    ):
        on_dp(lambda a: a.all_gather(torch.zeros(1 + (a.index == 2)), "t"))
    with pytest.raises(ValueError, match=r"in_sizes \[1, 1, 1, 2\]; they must add up"):
        on_dp(lambda a: a.all_to_all(torch.zeros(4), "t", [1] * 4, [1, 1, 1, 2]))
    with pytest.raises(ValueError, match=r"expects \[2, 1, 1, 0\] rows but gets \[1, 1, 1, 1\]"):
        on_dp(lambda a: a.all_to_all(torch.zeros(4), "t", [2, 1, 1, 0], [1] * 4))


def test_what_real_transports_do_not_take_is_refused() -> None:
    with pytest.raises(ValueError, match="reduce_scatter of 6 rows over 4 ranks; pad them to a multiple"):
        on_dp(lambda a: a.reduce_scatter(torch.zeros(6), "t"))
    with pytest.raises(ValueError, match=r"all_gather \(t\) got a tensor of strides \(1, 2\); make it contiguous"):
        on_dp(lambda a: a.issue_all_gather(torch.zeros(3, 2).t(), "t"))


def test_an_error_of_one_rank_ends_all() -> None:
    def fails(axis: Axis) -> None:
        if axis.index == 2:
            raise KeyError("rank 2")
        axis.all_reduce(torch.zeros(1), "t")

    with pytest.raises(KeyError, match="rank 2"):
        on_dp(fails)


def test_a_rank_that_leaves_early_is_named() -> None:
    def leaves(axis: Axis) -> None:
        if axis.index != 1:
            axis.all_reduce(torch.zeros(1), "t")

    with pytest.raises(
        DesertedError, match=r"rank 0 of axis dp waits in .'all_reduce', 't'.*, which another never called"
    ):
        on_dp(leaves)


class Names(TorchDispatchMode):
    """Notes the operators it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def test_an_exchange_is_one_operator_to_what_watches() -> None:
    def run(axis: Axis) -> tuple[Tensor, Tensor, list[str]]:
        x = rows(axis.index, 8).requires_grad_()
        with Names() as names:
            y = exchange(x, axis, "t")
            (dx,) = torch.autograd.grad(y, x, 2 * y.detach())
        return y.detach(), dx, names.seen

    plain = on_dp(lambda a: a.all_to_all(rows(a.index, 8), "t"))
    for rank, (y, dx, seen) in enumerate(on_dp(run)):
        assert torch.equal(y, plain[rank])
        assert torch.equal(dx, 2 * rows(rank, 8))
        assert seen.count("mmfn::all_to_all") == 2
        assert "aten::cat" not in seen

    def fails(axis: Axis) -> None:
        with Names():
            axis.all_to_all(torch.zeros(4), "t", [2, 1, 1, 0], [1] * 4)

    with pytest.raises(ValueError, match=r"expects \[2, 1, 1, 0\] rows but gets \[1, 1, 1, 1\]"):
        on_dp(fails)


def test_gradient_mode_is_the_callers() -> None:
    assert on_dp(lambda a: torch.is_grad_enabled()) == [True] * 4
    with torch.no_grad():
        assert on_dp(lambda a: torch.is_grad_enabled()) == [False] * 4
