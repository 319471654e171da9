"""`value_and_grad`: derivatives of pure functions over pytrees, by `torch.autograd.grad`.

mmfn owns this instead of using `torch.func.grad` because that one accepts neither DTensor nor custom ops nor
activation checkpointing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmfn import tree
from mmfn.tree import Tree


def value_and_grad(
    fn: Callable[..., Any], *, has_aux: bool = False, materialize: bool = True
) -> Callable[..., tuple[Any, Tree]]:
    """`g(params, *args, **kwargs) -> (value, grads)` where `fn(params, *args, **kwargs)` returns a scalar.

    With `has_aux`, `fn` returns `(scalar, aux)` and so does `value`; aux and the value come back detached. `grads` has
    the structure of `params`; a leaf that does not influence the value gets zeros, or None without `materialize`.
    Leaves of `params` must be floating-point tensors and are not modified. Raises ValueError when the value is not a
    scalar tensor.
    """

    def wrapped(params: Tree, *args: Any, **kwargs: Any) -> tuple[Any, Tree]:
        flat, structure = tree.flatten(params)
        with torch.enable_grad():
            inputs = [leaf.detach().requires_grad_() for leaf in flat]
            out = fn(tree.unflatten(structure, inputs), *args, **kwargs)
            value, aux = out if has_aux else (out, None)
            if not isinstance(value, Tensor) or value.ndim != 0:
                raise ValueError(f"value_and_grad needs a function that returns a scalar tensor; got {_name(value)}")
            grads = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=materialize)
        detached = value.detach()
        result = (detached, tree.map(_detach, aux)) if has_aux else detached
        return result, tree.unflatten(structure, grads)

    return wrapped


def _detach(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _name(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
