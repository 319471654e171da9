"""Activations of feed-forward layers: elementwise, any shape and floating dtype.

Plain formulas, which torch.compile fuses. In eager execution swiglu enters a hand-written Function, which computes
`silu(gate)` again in the backward instead of keeping it: one of the four widest tensors a block keeps.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfn.ops.custom import Context, function
from mmfn.ops.eager import is_eager


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, elementwise over equal shapes; result in their common dtype.

    Source: Shazeer 2020, "GLU variants improve transformer", SwiGLU without its matmuls.
    """
    if is_eager(gate):
        y: Tensor = _eager_swiglu(gate, up)
        return y
    return F.silu(gate) * up


def _swiglu(ctx: Context, gate: Tensor, up: Tensor) -> Tensor:
    ctx.save_for_backward(gate, up)
    return F.silu(gate).mul_(up) if gate.dtype == up.dtype else F.silu(gate) * up


def _swiglu_grad(ctx: Context, dy: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = ctx.saved_tensors
    dgate = torch.ops.aten.silu_backward((dy * up).to(gate.dtype), gate)
    return dgate, F.silu(gate).to(dy.dtype).mul_(dy).to(up.dtype)


_eager_swiglu = function(_swiglu, _swiglu_grad)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` from the definition of the sigmoid."""
    return gate / (1 + torch.exp(-gate)) * up


def gelu(x: Tensor) -> Tensor:
    """Exact Gaussian error linear unit, `x * Phi(x)`, elementwise.

    Source: Hendrycks and Gimpel 2016, "Gaussian error linear units"; `gelu` in transformers.
    """
    return F.gelu(x)


def gelu_reference(x: Tensor) -> Tensor:
    """`gelu` from the definition of the normal distribution."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of `gelu`, elementwise.

    Source: Hendrycks and Gimpel 2016, section 2; `gelu_pytorch_tanh` in transformers.
    """
    return F.gelu(x, approximate="tanh")


def gelu_tanh_reference(x: Tensor) -> Tensor:
    """`gelu_tanh` from its formula."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
