"""Normalisation layers over the last dim."""

from torch import Tensor

from mmfn.ops import Ops
from mmfn.spec import ONES, ZEROS, spec
from mmfn.tree import Tree


def rms_specs(width: int, axis: str) -> Tree:
    """A weight of ones."""
    return {"weight": spec((width,), axis, ONES)}


def rms(params: Tree, x: Tensor, eps: float, ops: Ops) -> Tensor:
    """Root-mean-square normalisation; result in x's dtype."""
    return ops.rms_norm(x, params["weight"], eps)


def layer_specs(width: int, axis: str) -> Tree:
    """A weight of ones and a bias of zeros."""
    return {"weight": spec((width,), axis, ONES), "bias": spec((width,), axis, ZEROS)}


def layer(params: Tree, x: Tensor, eps: float, ops: Ops) -> Tensor:
    """Layer normalisation; result in x's dtype."""
    return ops.layer_norm(x, params["weight"], params["bias"], eps)
