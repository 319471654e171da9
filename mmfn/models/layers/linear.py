"""Linear layer with Hugging Face's weight layout, `[out, in]`."""

import torch.nn.functional as F
from torch import Tensor

from mmfn.spec import ZEROS, normal, spec
from mmfn.tree import Tree


def specs(d_out: int, d_in: int, axes: str, *, std: float, bias: bool = False) -> Tree:
    """`specs(F, D, "mlp embed", std=0.02)`: weight [F, D], and with `bias` a zero bias [F]."""
    tree = {"weight": spec((d_out, d_in), axes, normal(std))}
    if bias:
        tree["bias"] = spec((d_out,), axes.split()[0], ZEROS)
    return tree


def apply(params: Tree, x: Tensor) -> Tensor:
    """`x @ weight.T (+ bias)` over the last dim; `x`: float[..., in] of the weight's dtype."""
    return F.linear(x, params["weight"], params.get("bias"))
