"""Activations by `npu_swiglu` and `npu_gelu`: elementwise, any shape."""

import torch
from torch import Tensor

from mmfn.ops.kernel import Operators
from mmfn.ops.npu.limits import LIMITS, Limits


def swiglu(gate: Tensor, up: Tensor, *, limits: Limits = LIMITS) -> Tensor:
    """`mmfn.ops.activation.swiglu`. The operator reads both as halves of one last dim, so they are copied into one.

    Raises ValueError for a dtype that the operator does not take.
    """
    return swiglu_halves(torch.cat([gate, up], -1), limits=limits)


def swiglu_halves(gate_up: Tensor, *, limits: Limits = LIMITS) -> Tensor:
    """`swiglu` of the first half of the last dim and the second."""
    limits.check("swiglu", gate_up)
    y: Tensor = torch.ops.npu.npu_swiglu(gate_up, -1)
    return y


def gelu(x: Tensor, *, limits: Limits = LIMITS) -> Tensor:
    """`mmfn.ops.activation.gelu`. Raises ValueError for a dtype that the operator does not take."""
    limits.check("gelu", x)
    y: Tensor = torch.ops.npu.npu_gelu(x, approximate="none")
    return y


def gelu_tanh(x: Tensor, *, limits: Limits = LIMITS) -> Tensor:
    """`mmfn.ops.activation.gelu_tanh`. Raises ValueError for a dtype that the operator does not take."""
    limits.check("gelu_tanh", x)
    y: Tensor = torch.ops.npu.npu_gelu(x, approximate="tanh")
    return y


SWIGLU: Operators = dict.fromkeys(("npu::npu_swiglu", "npu::npu_swiglu_backward"))
GELU: Operators = dict.fromkeys(("npu::npu_gelu", "npu::npu_gelu_backward"))
