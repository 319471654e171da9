"""Normalisation layers over the last dim. Which one it is, and of which convention, a layer's parameters say."""

from torch import Tensor

from mmfn.dtypes import wide
from mmfn.ops import Ops
from mmfn.spec import ONES, ZEROS, spec
from mmfn.tree import Tree


def rms_specs(width: int, axis: str, *, is_zero_centered: bool = False) -> Tree:
    """A weight of ones, or, `is_zero_centered`, of zeros to which the layer adds 1."""
    return (
        {"zero_centered": spec((width,), axis, ZEROS)} if is_zero_centered else {"weight": spec((width,), axis, ONES)}
    )


def rms(params: Tree, x: Tensor, eps: float, ops: Ops) -> Tensor:
    """Root-mean-square normalisation; result in x's dtype. A zero-centred weight is added to 1, and multiplied with, in
    float32 or wider (`Qwen3_5RMSNorm` in transformers 5.23)."""
    if "zero_centered" in params:
        offset = params["zero_centered"]
        return ops.rms_norm(x, 1 + offset.to(wide(offset.dtype)), eps)
    return ops.rms_norm(x, params["weight"], eps)


def layer_specs(width: int, axis: str) -> Tree:
    """A weight of ones and a bias of zeros."""
    return {"weight": spec((width,), axis, ONES), "bias": spec((width,), axis, ZEROS)}


def layer(params: Tree, x: Tensor, eps: float, ops: Ops) -> Tensor:
    """Layer normalisation; result in x's dtype."""
    return ops.layer_norm(x, params["weight"], params["bias"], eps)


def either(params: Tree, x: Tensor, eps: float, ops: Ops) -> Tensor:
    """Layer normalisation where the parameters have a bias, else that by the root mean square."""
    return layer(params, x, eps, ops) if "bias" in params else rms(params, x, eps, ops)
