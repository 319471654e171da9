"""The table for NPUs on emulated operators, which also take float64."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from mmfn.ops import Ops
from mmfn.ops.npu import npu
from mmfn.ops.npu.limits import LIMITS
from mmfn.parallel.program import Program
from tests.npu.operators import register


def emulated(*, segments: int = LIMITS.segments, **choices: Any) -> Ops:
    """`npu` with these choices; `segments`: the most in one call of attention."""
    register()
    limits = replace(LIMITS, dtypes=(*LIMITS.dtypes, torch.float64), segments=segments)
    with patch("mmfn.ops.npu.load"):  # what it would import is emulated
        return npu(limits=limits, **choices)


def on_emulated(program: Program) -> Program:
    """As a transform, which comes first."""
    return replace(program, ops=emulated())
