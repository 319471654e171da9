"""RMS normalisation by `npu_rms_norm`. Legend: D width, behind any leading dims."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfn.dtypes import wide
from mmfn.ops import norm
from mmfn.ops.kernel import Operators
from mmfn.ops.npu.limits import LIMITS, Limits


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float, *, limits: Limits = LIMITS) -> Tensor:
    """`mmfn.ops.norm.rms_norm` in one operator, which computes in float32.

    The weight is of x's dtype or wider; a narrower one is widened. Raises ValueError when it is not [D], and for a
    dtype that the operator does not take.
    """
    norm.check(x_D, weight_D)
    limits.check("rms_norm", x_D)
    y_D: Tensor = torch.ops.npu.npu_rms_norm(x_D, _no_narrower(weight_D, x_D), eps)[0]
    return y_D


def rms_norm_gated(x_D: Tensor, gate_D: Tensor, weight_D: Tensor, eps: float, *, limits: Limits = LIMITS) -> Tensor:
    """`mmfn.ops.norm.rms_norm_gated`: `rms_norm`, and the product with the gate by torch's own operators.

    Raises ValueError as `rms_norm` does, and for a gate of another shape.
    """
    norm.check_gated(x_D, gate_D, weight_D)
    normed_D = rms_norm(x_D, weight_D, eps, limits=limits)
    return (normed_D * F.silu(gate_D.to(wide(gate_D.dtype)))).to(x_D.dtype)


def _no_narrower(weight_D: Tensor, x_D: Tensor) -> Tensor:
    return weight_D.to(torch.promote_types(weight_D.dtype, x_D.dtype))


OPERATORS: Operators = dict.fromkeys(("npu::npu_rms_norm", "npu::npu_rms_norm_backward"))
