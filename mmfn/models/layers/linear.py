"""Linear layer with Hugging Face's weight layout, `[out, in]`."""

import torch.nn.functional as F
from torch import Tensor

from mmfn.spec import ZEROS, normal, spec
from mmfn.tree import Tree


def specs(d_out: int, d_in: int, axes: str, *, std: float, bias: bool = False, parts: int = 1) -> Tree:
    """`specs(F, D, "mlp embed", std=0.02)`: weight [F, D], and with `bias` a zero bias [F]."""
    tree = {"weight": spec((d_out, d_in), axes, normal(std), parts)}
    if bias:
        tree["bias"] = spec((d_out,), axes.split()[0], ZEROS)
    return tree


def apply(params: Tree, x: Tensor) -> Tensor:
    """`x @ weight.T (+ bias)` over the last dim, computed in the weight's dtype; `x`: float[..., in].

    The result has the dtype of x. With an adapter (`mmfn.lora`), `scale * x @ a.T @ b.T` is added, computed in its own.
    """
    weight, bias = params["weight"], params.get("bias")
    y = F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).to(x.dtype)
    if "lora" not in params:
        return y
    adapter = params["lora"]["weight"]
    low = adapter.scale * F.linear(x.to(adapter.a.dtype), adapter.a)
    return y + F.linear(low.to(adapter.b.dtype), adapter.b).to(x.dtype)
