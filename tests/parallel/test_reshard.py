"""`reshard_after_forward`: the bits of a step that keeps whole weights, of which none is alive between the passes."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfn import tree
from mmfn.parallel.mesh.layout import Layout, Mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.parallel.planning.alike import recording_mesh
from mmfn.parallel.program import Program, Transform, lower, pipe
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.offload import offload
from mmfn.parallel.weights.hosted import handles
from mmfn.parallel.weights.sharding import local, shard_params
from mmfn.spec import ZEROS, spec
from tests.parallel.campaign import take_steps
from tests.parallel.campaign_draws import Draw, deal_of, draw, transforms_of
from tests.parallel.delays import delayed
from tests.parallel.whole_weights import watched

KEEPING = ("none", "none", "every 2", "block")  # kinds of remat that leave blocks which keep what they compute
DRAWN = [
    replace(case, remat=KEEPING[i % 4], gathered="late" if i % 5 == 4 else "", is_released=False)
    for i, case in enumerate(map(draw, range(3000, 3100)))
    if case.layout.world > 1 or "parameters" in case.offload
][:24]
FAST = (3010, 3022)  # recurrent, all on the host; experts, adapters, activations on the host


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case.seed in FAST else pytest.mark.slow) for case in DRAWN],
    ids=lambda case: f"{case.family}, {case.layout}, {case.remat}, seed {case.seed}",
)
def test_a_step_has_the_same_bits_however_late_gathers_are(case: Draw) -> None:
    def steps(case: Draw, mesh: Mesh) -> Any:
        return take_steps(case, mesh, transforms_of(case), deal_of(case)[mesh["batch"].index])

    logs: list[list[str]] = [[] for _ in range(case.layout.world)]
    released = replace(case, is_released=True)
    want = virtual(case.layout, partial(steps, case))
    found = virtual(case.layout, lambda mesh: steps(released, delayed(mesh, case.seed, logs[mesh["world"].index])))
    for rank in range(case.layout.world):
        assert (found[rank].losses, found[rank].norms) == (want[rank].losses, want[rank].norms)
        for path, value in want[rank].params.items():
            assert torch.equal(found[rank].params[path], value), path
        assert logs[rank] == logs[0]
        sends = sorted(line.removeprefix("send ") for line in logs[rank] if line.startswith("send "))
        assert sends == sorted(line.removeprefix("wait ") for line in logs[rank] if line.startswith("wait "))


# ---- which whole weights are alive, and when

NUM_BLOCKS, WIDTH = 5, 40  # more than `offload` leaves where it is
SPECS = [{"w": spec((WIDTH, 32), "mlp embed", ZEROS), "b": spec((WIDTH,), "mlp", ZEROS)} for _ in range(NUM_BLOCKS)]


def draw_params() -> Any:
    g = torch.Generator().manual_seed(0)
    return tree.map(lambda s: torch.randn(s.shape, generator=g, dtype=torch.float64) / 9, SPECS)


def run_chain(trained: str, *transforms: Transform) -> tuple[int, list[int], dict[str, Tensor]]:
    """A forward and a backward of a chain of blocks on one rank of two. Whole weights that are alive between the two,
    and at each gather; and the gradients. `trained`: the end of the paths of the leaves that are."""
    mesh = recording_mesh(Layout(dp=2), 0)
    program = lower(pipe(Program.of(SPECS, mesh=mesh), *transforms))
    values = tree.map(lambda x: x.detach(), shard_params(draw_params(), SPECS, mesh))
    params = handles(values, torch.device("cpu")) if program.weights.is_hosted else values
    leaves = {path: leaf.requires_grad_() for path, leaf in tree.items(params) if path.endswith(trained)}

    def block(own: Any, x: Tensor) -> tuple[Tensor, None]:
        weights = program.ops.gather(own)
        w = weights["w"]
        return torch.tanh(x @ w @ w.t() + weights["b"]) * w[:, 1], None  # whole, turned, and a part that starts late

    with watched() as (alive, counts):
        x = torch.full((2, WIDTH), 0.3, dtype=torch.float64)
        given = program.enter(params, values)
        x, _, _ = program.ops.stack(lambda block, *args: block(*args), block, given, x)
        between = alive()
        grads = torch.autograd.grad(x.square().sum(), list(leaves.values()))
        assert alive() == 0, "no whole weight outlives the pass"
    return between, counts, {path: local(grad) for path, grad in zip(leaves, grads, strict=True)}


CHAINS: dict[str, tuple[Transform, ...]] = {
    "plain": (),
    "hosted": (offload("parameters"),),
    "offload": (offload("activations"),),
}


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("trained", ["w", "b", ""])
@pytest.mark.parametrize("name", CHAINS)
def test_whole_weights_of_one_block_are_alive_at_once(name: str, trained: str, prefetch: bool) -> None:
    others = CHAINS[name]
    kept, counts, want = run_chain(trained, data_parallel(prefetch=prefetch), *others)
    assert kept == (1 if name == "offload" else NUM_BLOCKS)
    assert len(counts) == NUM_BUCKETS[trained] * NUM_BLOCKS
    released = data_parallel(prefetch=prefetch, reshard_after_forward=True)
    between, again, found = run_chain(trained, released, *others)
    assert between == 0
    assert len(again) == 2 * len(counts)
    assert max(again) == len(SPECS[0])
    assert found.keys() == want.keys()
    assert all(torch.equal(found[path], grad) for path, grad in want.items())


NUM_BUCKETS = {"": 1, "w": 2, "b": 2}  # of a block: leaves that need no gradient go in one of their own


@pytest.mark.parametrize("others", [(), (offload("activations"),)], ids=["plain", "offload"])
def test_a_weight_saved_in_two_dtypes(others: tuple[Transform, ...]) -> None:
    """That of the other dtype stays where autograd has it."""

    def run(reshard: bool, *others: Transform) -> list[Tensor]:
        mesh = recording_mesh(Layout(dp=2), 0)
        program = lower(pipe(Program.of(SPECS, mesh=mesh), data_parallel(reshard_after_forward=reshard), *others))
        given = tree.map(lambda x: x.detach().requires_grad_(), shard_params(draw_params(), SPECS, mesh))

        def block(own: Any, x: Tensor) -> tuple[Tensor, None]:
            w = program.ops.gather(own)["w"]
            c = torch.view_as_complex(w.view(WIDTH, -1, 2))
            return torch.tanh(x @ w @ w.t() + torch.view_as_real(c * c).sum((1, 2))), None

        x = torch.full((2, WIDTH), 0.3, dtype=torch.float64)
        x, _, _ = program.ops.stack(lambda block, *args: block(*args), block, given, x)
        return [local(grad) for grad in torch.autograd.grad(x.square().sum(), [params["w"] for params in given])]

    assert all(torch.equal(x, y) for x, y in zip(run(True, *others), run(False), strict=True))


def test_blocks_that_save_no_weight_gather_none_again() -> None:
    """As those of a frozen tower: no gradient reaches them."""

    def run(reshard: bool) -> int:
        mesh = recording_mesh(Layout(dp=2), 0)
        program = lower(pipe(Program.of(SPECS, mesh=mesh), data_parallel(reshard_after_forward=reshard)))
        given = shard_params(draw_params(), SPECS, mesh)
        last = given[-1]["b"].requires_grad_()

        def block(own: Any, x: Tensor) -> tuple[Tensor, None]:
            weights = program.ops.gather(own)
            return torch.tanh(x @ weights["w"] @ weights["w"].t() + weights["b"]), None

        with watched() as (_, counts):
            x = torch.full((2, WIDTH), 0.3, dtype=torch.float64)
            x, _, _ = program.ops.stack(lambda block, *args: block(*args), block, given, x)
            torch.autograd.grad(x.sum(), last)
        return len(counts)

    assert run(True) == run(False)
