"""Sums of gradients behind the backward: the bits are those of sums at once, however late transports are."""

from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfn import tree
from mmfn.parallel.mesh.layout import Layout, Mesh
from mmfn.parallel.mesh.virtual import run_virtual, virtual
from mmfn.parallel.program import Program, Transform, lower, pipe
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.remat import remat
from mmfn.parallel.weights.gradient_sums import GradientSums
from mmfn.parallel.weights.sharding import like, local, shard_params, whole
from mmfn.spec import ZEROS, spec
from tests.parallel.campaign import take_steps
from tests.parallel.campaign_draws import Draw, deal_of, draw, transforms_of
from tests.parallel.delays import delayed

SHARDED = [case for case in map(draw, range(1000, 1100)) if case.layout.world > 1][:20]
FAST = 4


def steps(case: Draw, most: int, mesh: Mesh) -> Any:
    """Two steps of a combination with so many sums under way."""

    def sums(program: Program) -> Program:
        return replace(program, weights=replace(program.weights, sums_under_way=most))

    found = take_steps(case, mesh, [*transforms_of(case), sums], deal_of(case)[mesh["batch"].index])
    return found.losses, found.norms, found.params


def assert_same_bits(found: Any, want: Any) -> None:
    assert found[:2] == want[:2]
    for path, value in want[2].items():
        assert torch.equal(found[2][path], value), path


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if i < FAST else pytest.mark.slow) for i, case in enumerate(SHARDED)],
    ids=lambda case: f"{case.family}, {case.layout}, seed {case.seed}",
)
def test_delays_of_every_collective_change_no_bit(case: Draw) -> None:
    logs: list[list[str]] = [[] for _ in range(case.layout.world)]
    want = virtual(case.layout, partial(steps, case, 2))
    late = virtual(case.layout, lambda mesh: steps(case, 2, delayed(mesh, case.seed, logs[mesh["world"].index])))
    at_once = virtual(case.layout, partial(steps, case, 0))
    for rank in range(case.layout.world):
        assert_same_bits(late[rank], want[rank])
        assert_same_bits(at_once[rank], want[rank])
        assert logs[rank] == logs[0]
    waits = [line for line in logs[0] if line.startswith("wait")]
    assert len(waits) * 2 == len(logs[0]) > 0


SPECS = {
    "layers": [{"w": spec((5, 4), "mlp embed", ZEROS), "b": spec((3,), "embed", ZEROS)} for _ in range(5)],
    "tied": spec((6, 4), "mlp embed", ZEROS),
    "unused": spec((2, 2), "mlp embed", ZEROS),
}


def draw_params() -> Any:
    g = torch.Generator().manual_seed(0)
    return tree.map(lambda s: torch.randn(s.shape, generator=g, dtype=torch.float64), SPECS)


def backward(mesh: Mesh, sums: GradientSums | None, num_batches: int = 1, *transforms: Transform) -> dict[str, Tensor]:
    """Whole gradients of a chain of blocks between two uses of one leaf; autograd's where there are no sums."""
    program = lower(pipe(Program.of(SPECS, mesh=mesh), data_parallel(), *transforms))
    params = tree.map(lambda x: x.detach().requires_grad_(), shard_params(draw_params(), SPECS, mesh))
    leaves, total = dict(tree.items(params)), {}

    def block(own: Any, x: Tensor) -> tuple[Tensor, None]:
        weights = program.ops.gather(own)
        return torch.tanh(x @ weights["w"].t() @ weights["w"] + weights["b"].sum()), None

    for batch in range(num_batches):
        if sums is not None:
            sums.is_last = batch + 1 == num_batches
        given = program.enter(params, params, sums)
        x = torch.full((2, 6), 1.0 + batch + mesh["world"].index, dtype=torch.float64) / 10
        x = x @ program.ops.gather({"tied": given["tied"]})["tied"]
        x, _, _ = program.ops.stack(lambda block, *args: block(*args), block, given["layers"], x)
        x = x @ program.ops.gather({"tied": given["tied"]})["tied"].t()
        found = torch.autograd.grad(x.square().sum(), list(leaves.values()), allow_unused=True)
        for path, grad in zip(leaves, found, strict=True):
            if grad is not None:
                total[path] = total[path] + local(grad) if path in total else local(grad)
    if sums is not None:
        assert not total, "autograd was given a part"
        total = sums.take(is_wide=num_batches > 1)
    return {path: whole(like(grad, leaves[path]), mesh) for path, grad in total.items()}


@pytest.mark.parametrize("most", [0, 1, 2, 5])
@pytest.mark.parametrize("num_batches", [1, 3])
@pytest.mark.parametrize("layout", [Layout(dp=3), Layout(replicate=2, dp=2), Layout(replicate=2)], ids=str)
def test_sums_are_what_autograd_gives(layout: Layout, num_batches: int, most: int) -> None:
    want = virtual(layout, lambda mesh: backward(mesh, None, num_batches))
    found = virtual(layout, lambda mesh: backward(mesh, GradientSums(most=most), num_batches, remat("full")))
    assert found[0].keys() == want[0].keys() == set(tree.paths(SPECS)) - {"unused"}
    for rank in range(layout.world):
        for path, grad in want[rank].items():
            torch.testing.assert_close(found[rank][path], grad, rtol=1e-12, atol=1e-14)


def test_replicas_meet_once_a_step_and_two_sums_are_under_way() -> None:
    layout, num_batches = Layout(replicate=2, dp=2), 3
    logs: list[list[str]] = [[] for _ in range(layout.world)]
    world = run_virtual(
        layout,
        lambda mesh: backward(delayed(mesh, 0, logs[mesh["world"].index]), GradientSums(), num_batches),
    )
    num_blocks = 5
    for calls, log in zip(world.calls, logs, strict=True):
        of_gradients = Counter((call.name, call.axis) for call in calls if call.site == "gradients")
        assert of_gradients["reduce_scatter", "shard"] == num_batches * (num_blocks + 2)
        assert of_gradients["all_reduce", "replicate"] == num_blocks + 2  # as often as one micro-batch sends
        under_way = 0
        most = 0
        for line in log:
            verb, method = line.split()
            if method == "reduce_scatter":
                under_way += 1 if verb == "send" else -1
                most = max(most, under_way)
        assert (most, under_way) == (2, 0)
