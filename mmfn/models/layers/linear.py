"""Linear layer with Hugging Face's weight layout, `[out, in]`."""

from torch import Tensor

from mmfn.dropout import keep_mask, masked_linear
from mmfn.ops import Ops
from mmfn.spec import ZEROS, normal, spec
from mmfn.tree import Tree


def specs(d_out: int, d_in: int, axes: str, *, std: float, bias: bool = False, parts: int = 1) -> Tree:
    """`specs(F, D, "mlp embed", std=0.02)`: weight [F, D], and with `bias` a zero bias [F]."""
    tree = {"weight": spec((d_out, d_in), axes, normal(std), parts)}
    if bias:
        tree["bias"] = spec((d_out,), axes.split()[0], ZEROS)
    return tree


def apply(params: Tree, x: Tensor, ops: Ops) -> Tensor:
    """`x @ weight.T (+ bias)` over the last dim, computed in the weight's dtype; `x`: float[..., in].

    The result has the dtype of x. With an adapter (`mmfn.lora`), `scale * x @ a.T @ b.T` is added, computed in its own;
    where it drops, x is [T, in], zeroed by the adapter's mask and divided by the share that is kept.
    """
    weight, bias = params["weight"], params.get("bias")
    y = ops.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).to(x.dtype)
    if "lora" not in params:
        return y
    adapter = params["lora"]["weight"]
    x_low = x.to(adapter.a.dtype)
    if adapter.drops is None:
        low = adapter.scale * ops.linear(x_low, adapter.a, None)
    else:
        keep_TC = keep_mask(adapter.drops.ids_T, adapter.drops.salt, x.shape[-1], adapter.dropout)
        low = adapter.scale / (1 - adapter.dropout) * masked_linear(x_low, adapter.a, keep_TC)
    return y + ops.linear(low.to(adapter.b.dtype), adapter.b, None).to(x.dtype)
