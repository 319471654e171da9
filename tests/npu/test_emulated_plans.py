"""Plans of steps with the table for NPUs: what its operators declare is counted, as much as with the portable ones."""

from dataclasses import replace
from typing import Any

import pytest

from mmfn.ops import portable
from mmfn.parallel.mesh.layout import Mesh
from mmfn.parallel.program import Program, Transform, pipe
from mmfn.parallel.transforms.remat import remat
from mmfn.train.planning import step_trace
from tests.npu.table import emulated
from tests.parallel.plan_cases import make

KEEP = remat("selective", save=("attention", "experts"))


def traced(ops: Any, *transforms: Transform) -> Any:
    setup, layout = make(moe=True, side=0)

    def build(cfg: Any, mesh: Mesh) -> Program:
        return pipe(replace(Program.of(setup.family.specs(cfg), mesh=mesh), ops=ops), *transforms)

    return step_trace.trace_step(replace(setup, build=build), layout, 2)


@pytest.mark.parametrize("transforms", [(), (KEEP,)], ids=["plain", "selective remat"])
def test_the_same_work_is_counted(transforms: tuple[Transform, ...]) -> None:
    found, wanted = (traced(ops, *transforms).flops for ops in (emulated(), portable(cross_entropy="logits")))
    del wanted["backward", "rms_norm"]  # the portable one is made of a product
    assert found == wanted
    assert found["forward", "attention"] > 0 < found["forward", "experts"]
