"""Experts whose rows travel by operators that multiply them, on emulated operators: any counts, and what they cost."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfn import tree
from mmfn.lora import Adapter
from mmfn.parallel.mesh.layout import Layout, Mesh, single_mesh
from mmfn.parallel.mesh.virtual import run_virtual, virtual
from mmfn.parallel.program import Program, Transform, pipe
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.expert_parallel import expert_parallel
from mmfn.parallel.transforms.remat import remat
from mmfn.spec import ZEROS, spec
from tests import tiny
from tests.host_reads import reads_of
from tests.npu.cells import MOE
from tests.npu.operators import CALLS, MEETING
from tests.npu.table import on_emulated
from tests.parallel import expert_cases
from tests.parallel import test_expert_parallel as unfused
from tests.parallel.conformance import Cell, prepared, values

EP2, EP4, EDP = Layout(dp=2, ep=2), Layout(dp=4, ep=4), Layout(dp=4, ep=2)
KEPT = remat("selective", save=("exchange",))


def fused(program: Program) -> Program:
    return expert_parallel(fused=True)(on_emulated(program))


def draw_counts(layout: Layout, name: str) -> list[Tensor]:
    """Rows of every rank for every expert, none of them for the third."""
    g = torch.Generator().manual_seed(2)
    counts = [torch.randint(1, 7, (unfused.E,), generator=g) for _ in range(layout.world)]
    for count in counts:
        count[2] = 0
        if name == "the first rank gets none":
            count[: unfused.E // layout.ep] = 0
    if name == "the first rank has none":
        counts[0][:] = 0
    return counts


@pytest.mark.parametrize("name", ["uneven", "the first rank has none", "the first rank gets none"])
@pytest.mark.parametrize("layout", [EP2, EP4, EDP], ids=str)
def test_any_counts(layout: Layout, name: str) -> None:
    """Also with rows behind the last expert's, which hold no number."""
    counts_E = draw_counts(layout, name)
    x_RD, dy_RD = unfused.rows_of(counts_E, [rank % 3 for rank in range(layout.world)])
    CALLS.clear()
    world = unfused.run_op(layout, fused, counts_E, x_RD, dy_RD)
    unfused.check_op(world, layout.ep, counts_E, counts_E, x_RD, dy_RD)
    assert CALLS["npu_alltoallv_gmm"] == CALLS["npu_gmm_alltoallv"] == 2 * layout.world, "forward, and backward"


ADAPTED = {"gate_up": (10, 6), "down": (6, 5)}  # name -> rows and columns of its weights


def adapted(names: tuple[str, ...], num_experts: int) -> dict[str, Any]:
    """Weights of all experts, those of some names with an adapter."""
    g = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(num_experts, *shape, generator=g, dtype=torch.float64)

    weights: dict[str, Any] = {name: draw(*shape) for name, shape in ADAPTED.items()}
    low = {name: (draw(2, shape[1]), draw(shape[0], 2)) for name, shape in ADAPTED.items()}
    own = {name: Adapter(a=low[name][0], b=low[name][1], alpha=3.0, is_rs=False) for name in names}
    return weights | ({"lora": own} if own else {})


@pytest.mark.parametrize("trained", ["all", "lora"])
@pytest.mark.parametrize("names", [("gate_up",), ("down",), ("gate_up", "down"), ()], ids=str)
def test_adapters(names: tuple[str, ...], trained: str) -> None:
    """Of one weight, both or none; the base trained too, or frozen: results and gradients are the base form's."""
    specs = {name: spec((4, *shape), "experts mlp embed", ZEROS) for name, shape in ADAPTED.items()}
    counts_E = [torch.tensor([2, 0, 3, 1]), torch.tensor([0, 0, 4, 1])]

    def run(mesh: Mesh, *transforms: Transform) -> list[Tensor]:
        rank = mesh["ep"].index
        whole, g = adapted(names, 4), torch.Generator().manual_seed(rank)
        own = tree.map_with_path(
            lambda path, leaf: leaf.chunk(2)[rank].clone().requires_grad_(trained in (*path.split("/"), "all")), whole
        )
        x_RD = torch.randn(8, 6, generator=g, dtype=torch.float64).requires_grad_()
        program = pipe(Program.of(specs, mesh=mesh), *transforms)
        y_RD = program.ops.experts(x_RD, counts_E[rank], own)
        dy_RD = torch.randn(8, 6, generator=g, dtype=torch.float64)
        leaves = [x_RD, *(leaf for leaf in tree.leaves(own) if leaf.requires_grad)]
        return [y_RD.detach(), *torch.autograd.grad(y_RD, leaves, dy_RD)]

    both = (virtual(EP2, lambda mesh: run(mesh, spread)) for spread in (fused, expert_parallel()))  # noqa: B023
    for found, wanted in zip(*both, strict=True):
        assert len(found) == 2 + 2 * (trained == "all") + 2 * len(names)
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12 * float(want.abs().max()))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("uneven", EP2),
        ("a rank of padding alone", EDP),
        ("all rows to the last rank", EP4),
        pytest.param("one rank's rows to one rank", EP4, marks=pytest.mark.slow),
        pytest.param("an expert without rows", EDP, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("policy", [remat("none"), remat("full"), KEPT], ids=["plain", "again", "kept"])
def test_routings(name: str, layout: Layout, policy: Transform) -> None:
    case = expert_cases.Case.of(layout.world, name)
    transforms = (on_emulated, data_parallel(), expert_parallel(fused=True), policy)
    world = run_virtual(layout, lambda mesh: expert_cases.on_mesh(expert_cases.build(mesh, *transforms), case))
    expert_cases.check(case, world.results)


@pytest.mark.parametrize(
    ("policy", "forwards"),
    [
        pytest.param(remat("none"), 1, id="plain", marks=pytest.mark.slow),
        pytest.param(remat("full"), 2, id="again", marks=pytest.mark.slow),
        pytest.param(KEPT, 1, id="kept"),
    ],
)
def test_what_a_layer_costs(policy: Transform, forwards: int) -> None:
    """One host read and one exchange of counts, as many exchanges of rows as without: what is kept is not repeated."""
    cell = Cell(layout=EP2, name="costs", transforms=(), family="moe")
    seen = {}
    for is_fused in (False, True):
        transforms = (on_emulated, policy, expert_parallel(fused=is_fused), data_parallel())

        def run(mesh: Mesh, transforms: tuple[Transform, ...] = transforms) -> dict[tuple[str, str], int]:
            step, state, batch = prepared(replace(cell, transforms=transforms), mesh)
            with reads_of(state, [batch]) as (found, batches):
                step(state, batches)
            return {key: number for key, number in found.items() if "expert_parallel" in key[0]}

        CALLS.clear()
        world = run_virtual(EP2, run)
        exchanges = [call.site for call in world.calls[0] if call.axis == "ep"]
        seen[is_fused] = world.results, sorted(exchanges)
        assert sum(CALLS[name] for name in MEETING) == (2 * 2 * (2 * forwards + 2) if is_fused else 0)
    assert seen[True][1].count("experts") == 2 * (2 * forwards + 2)
    if policy is not KEPT:  # where the counts' exchange is an operator that is kept, as is the copy to the host
        assert seen[True] == seen[False]


def test_a_table_without_such_operators_exchanges_as_ever() -> None:
    """The same bits by the same collectives."""
    counts_E = draw_counts(EDP, "the first rank has none")
    x_RD, dy_RD = unfused.rows_of(counts_E, [rank % 3 for rank in range(EDP.world)])
    fused, apart = (
        unfused.run_op(EDP, expert_parallel(fused=is_fused), counts_E, x_RD, dy_RD) for is_fused in (True, False)
    )
    assert fused.calls == apart.calls
    for one, other in zip(fused.results, apart.results, strict=True):
        assert all(map(torch.equal, tree.leaves(one), tree.leaves(other)))


@pytest.mark.parametrize("family", [pytest.param(x, marks=() if x == "moe" else pytest.mark.slow) for x in MOE])
def test_accumulated_step(family: str) -> None:
    """Two micro-batches on two ranks, against one device with the portable table, which takes both ranks' twice."""
    cell = Cell(layout=EP2, name="accumulated", transforms=(), family=family)

    def run(mesh: Mesh, *transforms: Transform) -> dict[str, Tensor]:
        step, state, batch = prepared(replace(cell, transforms=transforms), mesh)
        return values(*step(state, [batch, batch]), mesh)

    wanted = run(single_mesh())
    for found in virtual(EP2, lambda mesh: run(mesh, fused, data_parallel(), remat("full"))):
        for name, want in wanted.items():
            assert (found[name] - want).abs().max() <= 1e-11 * tiny.scale_of(want, torch.float64), name
