"""Plans of steps with kernels of packages, which are not installed: what they declare is counted as the table's is."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from mmfn.errors import UserError
from mmfn.ops import Ops, portable
from mmfn.ops.packages import overlay
from mmfn.ops.packages.fla_conv import CONV, CONV_GRAD
from mmfn.ops.packages.fla_rule import ENTRY_GRAD, RULE, RULE_GRAD, STATE
from mmfn.ops.packages.fla_segments import num_chunks
from mmfn.parallel.mesh.layout import Mesh
from mmfn.parallel.program import Program, Transform, pipe
from mmfn.parallel.transforms.precision import precision
from mmfn.parallel.transforms.remat import remat
from mmfn.train.planning import step_trace
from tests.ops.delta_cases import pack
from tests.parallel.plan_cases import make
from tests.tiny import TINY

PORTABLE = portable(cross_entropy="logits")
PLANNED = overlay(PORTABLE, ("fla", "flash-attn"), None)
KEEP = remat("selective", save=("attention", "gated_delta_rule"))
RULES = "gated_delta_rule", "causal_conv1d"


def traced(ops: Ops, *transforms: Transform, dtype: torch.dtype | None = torch.bfloat16) -> Any:
    hf = TINY["delta"](2)
    hf["text_config"]["linear_value_head_dim"] = 4
    setup, layout = make(hf=hf)
    transforms = (*transforms, *([] if dtype is None else [precision(compute=dtype)]))

    def build(cfg: Any, mesh: Mesh) -> Program:
        return pipe(replace(Program.of(setup.family.specs(cfg), mesh=mesh), ops=ops), *transforms)

    return step_trace.trace_step(replace(setup, build=build), layout, 2)


@pytest.mark.parametrize("transforms", [(), (KEEP,)], ids=["plain", "selective remat"])
def test_work_is_counted(transforms: tuple[Transform, ...]) -> None:
    """All but the rule as of the portable table; of the rule, whose segments have chunks of their own, not less."""
    found, wanted = (traced(ops, *transforms) for ops in (PLANNED, PORTABLE))
    of_rule = {key for key in wanted.flops if key[1] in RULES}
    assert {key: work for key, work in found.flops.items() if key not in of_rule} == {
        key: work for key, work in wanted.flops.items() if key not in of_rule
    }
    assert of_rule
    assert all(wanted.flops[key] <= found.flops[key] <= 2 * wanted.flops[key] for key in of_rule)
    assert found.flops["forward", "attention"] > 0


def test_what_is_kept_for_the_backward_is_counted() -> None:
    """64 numbers of an inverse in bfloat16 and a sum of decays in float32, for each of 64 tokens and 8 heads."""
    held = []
    for ops in (PLANNED, PORTABLE):
        peaks = traced(ops).peaks
        held.append(peaks[max(key for key in peaks if key[0] == "forward")].parts["activations"])
    assert held[0] - held[1] == 64 * 8 * (64 * 2 + 4)


def test_a_plan_refuses_what_the_kernels_do() -> None:
    with pytest.raises(UserError, match=r"attention of flash-attn is made for bfloat16 and float16 but got torch"):
        traced(PLANNED, dtype=None)


def test_every_operator_is_declared() -> None:
    declared = {name for entry in RULES for name in getattr(PLANNED, entry).operators}
    assert declared == {op.name for op in (RULE, RULE_GRAD, ENTRY_GRAD, STATE, CONV, CONV_GRAD)}
    assert PLANNED.attention.results == ("mmfn::flash_attn",)
    assert num_chunks(pack([1, 64, 65, 0]).host_N) == 4
