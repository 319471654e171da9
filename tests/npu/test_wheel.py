"""The calls of `ops.table("npu")` against the released torch_npu, which `make test-npu` installs. No NPU is needed.

Level 0: schemas are those of the wheel. Level 2: whole steps on NPUs whose memory is the host's, through the dispatch
and the autograd of torch_npu, with the values of emulated kernels. Level 3: every call of these steps passes the
wheel's host checks and gets to the kernel of CANN that `facts.py` names; wrong calls are refused.
"""

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.npu import stub
from tests.npu.cells import LINES
from tests.npu.facts import KERNELS_OF_CANN, READS, SINGLE
from tests.npu.operators import COMPOSITE, emulation

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.npu,
    pytest.mark.skipif(find_spec("torch_npu") is None, reason="torch_npu is not installed; make test-npu"),
]
CHECKED = (
    "plain",
    "bfloat16",
    "remat but attention, experts",
    "fsdp, remat, asymmetric",
    "dropless, kept",
    "fused, remat, adapters",
    "capacity",
    "ulysses",
    "ring",
    "usp",
    "gather",
    "gather, experts",
)
CELLS = {str(cell): cell.name for cells in LINES for cell in cells if cell.name in CHECKED}


def run(module: str, *arguments: str) -> str:
    """What a module prints as the main program of a new process, where torch_npu may be imported."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | stub.ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@cache
def steps() -> dict[str, dict[str, Any]]:
    """What was seen of every cell."""
    lines = [json.loads(line) for line in run("tests.npu.on_npu", *CHECKED).splitlines() if line.startswith("{")]
    return {line["cell"]: line for line in lines}


@pytest.mark.parametrize("name", emulation.SCHEMAS)
def test_level_0_the_schema_is_that_of_the_wheel(name: str) -> None:
    assert stub.schemas()[name] == emulation.SCHEMAS[name]


def test_level_0_every_call_is_emulated() -> None:
    """So a call that the emulated operator takes is one that the wheel's schema takes."""
    folder = ROOT / "mmfn" / "ops" / "npu"
    called = {name for path in folder.glob("*.py") for name in stub.calls_of(path.read_text(encoding="utf-8"))}
    assert called
    assert called <= emulation.SCHEMAS.keys()


@pytest.mark.parametrize("cell", CELLS)
def test_level_2_the_step_is_that_of_one_device(cell: str) -> None:
    """Metrics, gradient and new value of every leaf."""
    found = steps()[cell]
    assert "error" not in found, found["error"]


def test_level_2_what_costs_time_is_known() -> None:
    """No operator that torch_npu has no kernel for, and where the host waits for the device."""
    assert not {name for found in steps().values() for name in found["missing"]}
    assert {name for found in steps().values() for name in found["reads"]} == READS.keys()


@pytest.mark.parametrize("name", sorted(set(KERNELS_OF_CANN)))
def test_level_3_every_call_gets_to_its_kernel(name: str) -> None:
    reached = {kernel for found in steps().values() for kernel in found["kernels"].get(name, ())}
    assert reached == {KERNELS_OF_CANN[name]}


def test_level_3_no_call_is_left_out() -> None:
    called = {name for found in steps().values() for name in found["kernels"]}
    assert called == set(KERNELS_OF_CANN)
    assert called <= emulation.SCHEMAS.keys() - COMPOSITE.keys()


@cache
def refusals() -> dict[str, Any]:
    return dict(json.loads(run("tests.npu.host_checks").splitlines()[-1]))


def test_level_3_other_calls_get_to_their_kernels() -> None:
    assert refusals()["reached"] == {
        "BNSD": ["aclnnFlashAttentionScore"],
        "BSND": ["aclnnFlashAttentionScore"],
        "tensor": [SINGLE["npu_fusion_attention_v3"]],
        "wide weight of a norm": [KERNELS_OF_CANN["npu_rms_norm"]],
    }


@pytest.mark.parametrize(
    "name",
    [
        "unknown layout",
        "no lengths",
        "sparse mode 99",
        "sparse mode 5 of packed rows",
        "keep probability 2",
        "split item 7",
        "group type 9",
        "weights of two dims",
        "fewer rows than none",
    ],
)
def test_level_3_a_wrong_call_is_refused(name: str) -> None:
    assert refusals()["refused"][name]


def test_level_3_a_group_is_asked_for_its_name_by_what_there_is() -> None:
    assert "get_hccl_comm_name" in refusals()["of groups"]
