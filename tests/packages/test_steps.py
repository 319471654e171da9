"""Whole steps with kernels of packages, fakes in their place, against the step of one device with the portable table.

Every value in float64, to 1e-11 of the largest of its leaf: see `tests.parallel.conformance`. `make test` runs a cell
of every mechanism, `make test-full` all.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from mmfn.ops.packages import overlay
from mmfn.parallel.mesh.layout import Layout
from mmfn.parallel.program import Program, Transform
from mmfn.parallel.transforms.compiled import compiled
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.expert_parallel import expert_parallel
from mmfn.parallel.transforms.remat import remat
from tests import tiny
from tests.npu.table import emulated
from tests.packages.fakes import calls, installed
from tests.packages.table import machine, on_packages
from tests.parallel.conformance import Cell, check_cell, spread

KEEP = remat("selective", save=("attention", "gated_delta_rule"))
RECURRENT = [name for name in tiny.TINY if name.startswith("delta")]
FAST = {"dense, plain", "delta_moe, ep", "delta, gather", "windows, ring", "delta, ulysses, kept", "delta, fsdp, remat"}


def cell(family: str, layout: Layout, *transforms: Transform, **fields: Any) -> Cell:
    return Cell(layout=layout, transforms=(on_packages, *transforms), family=family, name="packages", **fields)


def _cells() -> Iterator[tuple[str, Cell]]:
    for family in tiny.TINY:
        yield f"{family}, plain", cell(family, Layout())
        yield f"{family}, kept", cell(family, Layout(), KEEP)
        yield f"{family}, fsdp, remat", cell(family, Layout(dp=2), data_parallel(), remat("full"))
        yield f"{family}, gather", cell(family, Layout(cp=2), spread("gather", family), data_parallel())
        ulysses = spread("ulysses", family), data_parallel(), KEEP
        yield f"{family}, ulysses, kept", cell(family, Layout(cp=2, ulysses=2), *ulysses)
        if tiny.has_experts(family):
            yield f"{family}, ep", cell(family, Layout(dp=2, ep=2), expert_parallel(), data_parallel(), KEEP)
        if family not in RECURRENT:
            ring = spread("ring", family), data_parallel()
            yield f"{family}, ring", cell(family, Layout(cp=2), *ring, pack={"segment_multiple": 4})


CELLS = dict(_cells())


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in CELLS])
def test_a_whole_step_is_that_of_the_portable_table(name: str) -> None:
    with installed():
        check_cell(CELLS[name])
        assert calls["attention"] > 0 < calls["attention_grad"]
        if CELLS[name].family in RECURRENT:
            assert calls["rule"] > 0 < calls["rule_grad"]
            assert calls["conv"] > 0 < calls["conv_grad"]


def test_a_kept_rule_is_not_computed_again() -> None:
    counts = []
    for transform in (KEEP, remat("full")):
        with installed():
            check_cell(cell("delta", Layout(), transform))
            counts.append(calls["rule"])
    assert counts[1] == 2 * counts[0] > 0


def test_the_same_packages_lie_over_the_table_for_npus() -> None:
    def on_npu(program: Program) -> Program:
        return replace(program, ops=overlay(emulated(), ["fla"], machine("npu", triton="3.6.0")))

    with installed():
        check_cell(Cell(layout=Layout(), name="npu", transforms=(on_npu, KEEP), family="delta"))
        assert calls["rule"] > 0 < calls["conv_grad"]
        assert calls["attention"] == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of torch's compiler itself
@pytest.mark.parametrize("family", ["delta", "windows"])
def test_compiled_step(family: str) -> None:
    with installed():
        check_cell(cell(family, Layout(), compiled("layer", backend="aot_eager")))
        assert calls["attention"] > 0 < calls["attention_grad"]
