"""The table for NPUs on emulated operators, which also take float64."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from mmfn.ops import Ops
from mmfn.ops.npu import npu
from mmfn.ops.npu.limits import LIMITS
from mmfn.parallel.mesh.layout import Mesh
from mmfn.parallel.program import Program
from tests.npu.emulation import GROUPS
from tests.npu.operators import register


def emulated(*, segments: int = LIMITS.segments, **choices: Any) -> Ops:
    """`npu` with these choices; `segments`: the most in one call of attention."""
    register()
    limits = replace(
        LIMITS,
        dtypes=(*LIMITS.dtypes, torch.float64),
        segments=segments,
        exchange_dtypes=(*LIMITS.exchange_dtypes, torch.float64),
        exchange_ranks=(("", (2, 4)),),
    )
    with patch("mmfn.ops.npu.load"):  # what it would import is emulated
        return npu(**{"limits": limits, "name_of": str, **choices})


def on_emulated(program: Program) -> Program:
    """As a transform, which comes first."""
    join(program.mesh)
    return replace(program, ops=emulated())


def join(mesh: Mesh) -> None:
    """Let emulated operators exchange rows over this rank's ep, by its transport."""
    ep = mesh["ep"]
    if ep.transport is not None:
        GROUPS[ep.transport.name] = lambda x, to, of: ep.all_to_all(x, "experts", of, to)
