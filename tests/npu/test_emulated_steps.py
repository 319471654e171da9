"""Whole steps with the table for NPUs, on emulated operators, against the step of one device with the portable table.

Every value (metrics, clipped gradients, updated parameters) in float64, to 1e-11 of the largest of its leaf: see
`tests.parallel.conformance`. `make test` runs every family once and every mechanism once, `make test-full` all cells.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from mmfn import tree
from mmfn.parallel.mesh.layout import single_mesh
from mmfn.parallel.program import Program
from mmfn.parallel.transforms.compiled import compiled
from mmfn.parallel.transforms.remat import remat
from tests.npu.cells import FAMILIES, LINES, ONE
from tests.npu.operators import CALLS, MEETING
from tests.npu.table import emulated, on_emulated
from tests.parallel.conformance import Cell, check_cell, prepared
from tests.tiny import has_experts


def _matrix() -> Iterator[Any]:
    """All cells; the first line and one cell of the others, another family each, are fast."""
    for i, cells in enumerate(LINES):
        for j, cell in enumerate(cells):
            yield pytest.param(cell, id=str(cell), marks=() if i == 0 or j == i % len(cells) else pytest.mark.slow)


@pytest.mark.parametrize("cell", list(_matrix()))
def test_step(cell: Cell) -> None:
    CALLS.clear()
    check_cell(replace(cell, transforms=(on_emulated, *cell.transforms)))
    used = {"npu_fusion_attention", "npu_fusion_attention_grad", "npu_rotary_mul"}
    used |= {"npu_grouped_matmul", "npu_moe_token_permute_grad_v2"} if has_experts(cell.family) else set()
    used |= set(MEETING) if "fused" in cell.name else set()
    assert used <= CALLS.keys()


@pytest.mark.parametrize("choice", [{"lengths": "tensor"}, {"layout": "BSND"}, {"layout": "BNSD"}], ids=str)
def test_step_with_another_attention(choice: dict[str, Any]) -> None:
    def chosen(program: Program) -> Program:
        return replace(program, ops=emulated(**choice))

    check_cell(Cell(layout=ONE, name="chosen", transforms=(chosen, remat("full")), family="windows"))


QUIET_DYNAMO = pytest.mark.filterwarnings(  # of torch's compiler itself
    "ignore:The .grad attribute of a Tensor:UserWarning", "ignore:.* should not be instantiated:DeprecationWarning"
)


@QUIET_DYNAMO
@pytest.mark.parametrize("family", ["toy", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dense", "glm"))])
def test_compiled_step(family: str) -> None:
    """Blocks as graphs, with tensors of lengths."""

    def chosen(program: Program) -> Program:
        return replace(program, ops=emulated(lengths="tensor"))

    check_cell(
        Cell(layout=ONE, name="graph", transforms=(chosen, compiled("layer", backend="aot_eager")), family=family)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulated_step(family: str) -> None:
    """Two micro-batches, with and without the table."""
    found = []
    for transforms in ((on_emulated,), ()):
        cell = Cell(layout=ONE, name="accumulated", transforms=(remat("full"), *transforms), family=family)
        step, state, batch = prepared(cell, single_mesh())
        state, metrics = step(state, [batch, batch])
        found.append({"metrics": metrics, "params": state["params"], "m": state["opt"][1]["m"]})
    for (path, got), want in zip(tree.items(found[0]), tree.leaves(found[1]), strict=True):
        assert (got - want).abs().max() <= 1e-10 * want.abs().max().clamp(min=1e-4), path
