"""Plans of steps with the table for NPUs: what its operators declare is counted, as much as with the portable ones."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from mmfn.ops import portable
from mmfn.parallel.mesh.layout import Mesh
from mmfn.parallel.mesh.virtual import virtual
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


def test_an_exchange_fused_with_products_is_planned_as_one_apart() -> None:
    """By the table that a plan takes for the one of NPUs: the same collectives, their bytes, and the same work."""
    found = []
    for is_fused in (False, True):
        setup, layout = make(moe=True, side=0, dp=2, ep=2, fused_exchange=is_fused)
        (notes, _) = virtual(layout, lambda mesh, setup=setup: setup.build(setup.cfg, mesh).notes)
        assert any("exchange fused with products" in note for note in notes) == is_fused, "the setting gets there"
        found.append(step_trace.trace_step(setup, layout, 2))
    apart, fused = found
    assert apart.count == fused.count
    assert apart.sent_bytes == fused.sent_bytes
    assert apart.flops == fused.flops
    assert any(key.site == "experts" and key.axis == "ep" for key in fused.count)


def test_the_work_of_its_operators_is_declared() -> None:
    """Two FLOPs for each row that meets each element of its expert's weights; what is exchanged is none."""
    declared, counts = emulated().experts_over_ranks.operators, [1, 0, 2, 4]
    x, weight = torch.zeros(7, 5), torch.zeros(2, 3, 5)
    assert declared["npu::npu_alltoallv_gmm"](x, weight, "", 2, [7, 0, 0, 0], counts) == 2 * 7 * 3 * 5
    assert declared["npu::npu_gmm_alltoallv"](x[:6], weight, "", 2, counts, [7, 0, 0, 0]) == 2 * 6 * 3 * 5
