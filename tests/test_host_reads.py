"""What a step with the table of a device reads of it: nothing."""

from typing import Any

import pytest
import torch

from mmfn.parallel.mesh.layout import Layout, Mesh, single_mesh
from mmfn.parallel.mesh.virtual import run_virtual
from mmfn.parallel.program import Transform
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.expert_parallel import expert_parallel
from mmfn.train.objective import weigh
from tests import tiny
from tests.cuda.emulated import emulated
from tests.cuda.test_table import on_gpu
from tests.host_reads import reads_of
from tests.npu.table import on_emulated
from tests.parallel.conformance import Cell, prepared

CHECKED = {("ops/logit_chunks.py:_first", "__int__"), ("ops/logit_chunks.py:supervised", "__int__")}
"""Labels that are checked at once on a CPU; on a device it checks them itself (`assert_on_device`)."""
WEIGHED = {("train/objective.py:weigh_by", "cpu"), ("train/objective.py:weighed", "cpu")}
"""Of batches that are not weighed on the host before, as a run weighs them."""
COUNTS = ("parallel/transforms/expert_parallel.py:_read", "tolist")
"""How many rows go to which rank."""


@pytest.mark.parametrize("family", tiny.TINY)
@pytest.mark.parametrize("table", [on_gpu, on_emulated], ids=["cuda", "npu"])
def test_a_step_reads_nothing(table: Transform, family: str) -> None:
    cell = Cell(layout=Layout(), name="reads", transforms=(table,), family=family)
    step, state, batch = prepared(cell, single_mesh())
    with emulated(), reads_of(state, weigh([batch], "per_token_loss")) as (found, batches):
        step(state, batches)
    assert set(found) <= CHECKED


@pytest.mark.parametrize("kind", ["dropless", "capacity"])
@pytest.mark.parametrize("table", [on_gpu, on_emulated], ids=["cuda", "npu"])
def test_experts_on_several_ranks_read_once_a_layer_or_not_at_all(table: Transform, kind: str) -> None:
    """How many rows travel is known to the device alone, unless room for a fixed number is kept."""
    transforms = (table, expert_parallel(kind), data_parallel())
    pack = {"tokens": 192} if kind == "capacity" else {}
    cell = Cell(layout=Layout(dp=2, ep=2), name="reads", transforms=transforms, family="moe", pack=pack)

    def run(mesh: Mesh) -> dict[tuple[str, str], int]:
        step, state, batch = prepared(cell, mesh)
        with reads_of(state, [batch]) as (found, batches):
            step(state, batches)
        return dict(found)

    with emulated():
        world = run_virtual(cell.layout, run)
    for found in world.results:
        reads = {key: n for key, n in found.items() if key not in CHECKED | WEIGHED}
        assert reads == ({COUNTS: 2} if kind == "dropless" else {}), "two blocks have experts"


class _Reading(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor) -> torch.Tensor:
        return dx * len(ctx.saved_tensors[0].tolist())


def test_reads_are_found() -> None:
    """Those of values, and of shapes that depend on values."""
    x = torch.arange(4.0)
    reads = (
        lambda: x.sum().item(), lambda: int(x[0]), lambda: bool(x.any()), lambda: x.tolist(), lambda: x.numpy(),
        lambda: x.nonzero(), lambda: x[x > 1], lambda: x.cpu(), lambda: torch.repeat_interleave(x, x.long()),
        lambda: x.masked_select(x > 1), lambda: x.unique(), lambda: torch.equal(x, x),
    )  # fmt: skip
    for read in reads:
        with reads_of({"x": x}, []) as (found, _):
            read()
        assert sum(found.values()) == 1, found
    leaf = x.clone().requires_grad_()
    with reads_of({"x": leaf}, []) as (found, _):
        torch.autograd.grad(_Reading.apply(leaf).sum(), leaf)
    assert sum(found.values()) == 1, "what a backward reads"
    with reads_of({"x": x}, []) as (found, _):
        (x + 1).sum().reshape(1).expand(3)[1:].clamp(min=0).to(torch.float64)
        torch.arange(3).tolist()
    assert not found
