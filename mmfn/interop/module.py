"""Bridges to `torch.nn`: a model as a module, and a module as a pure function."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from mmfn import tree
from mmfn.batch import Batch
from mmfn.model import Model, logits
from mmfn.ops import Ops
from mmfn.tree import Tree


class ModelModule(nn.Module):
    """A model as an `nn.Module`: what `as_module` returns.

    Parameters are registered under their paths with dots for slashes (`text.layers.0.attention.q.weight`, an adapter's
    `text.layers.0.attention.q.lora.weight.a`).
    """

    def __init__(self, model: Model, ops: Ops | None = None) -> None:
        super().__init__()
        self._model = replace(model, params=None)
        self._ops = ops
        self._names = tree.map_with_path(lambda path, leaf: path.replace("/", "."), model.params)
        _register(self, model.params)

    @property
    def params(self) -> Tree:
        """The parameters as a tree, the module's own `nn.Parameter`s as leaves."""
        return tree.map(self.get_parameter, self._names)

    def forward(self, batch: Batch, objective: str | None = None) -> Any:
        """`logits_TV` of the real tokens, or `(loss, metrics)` when an objective is named (see `mmfn.loss`)."""
        from mmfn.train.objective import loss  # the core stays importable without the training package

        if objective is None:
            return logits(replace(self._model, params=self.params), batch, self._ops)
        return loss(self.params, batch, self._model, objective=objective, ops=self._ops)


def as_module(model: Model, ops: Ops | None = None) -> ModelModule:
    """The model as an `nn.Module`, for trainers, hooks and tools that want one; gradients flow to its parameters.

    The parameters share memory with `model.params`: an optimizer that steps the module changes both. `ops` defaults to
    `ops.portable()`.
    """
    return ModelModule(model, ops)


def functional(module: nn.Module) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """`(fn, params)` of any module: `fn(params, *args, **kwargs)` is its forward with those parameters.

    `params` maps dotted names to detached tensors (a tied parameter appears once), a pytree for `value_and_grad`.
    Buffers stay the module's own; a module that writes to them in forward is not pure.
    """

    def fn(params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        return functional_call(module, dict(params), args, kwargs)

    return fn, {name: value.detach() for name, value in module.named_parameters()}


def _register(module: nn.Module, node: Tree) -> None:
    """A module per inner node of the tree; the children of a list are named by their index."""
    for name, child in _children(node):
        if isinstance(child, Tensor):
            module.register_parameter(name, nn.Parameter(child.detach()))
        else:
            inner = nn.ModuleList() if isinstance(child, list) else nn.Module()
            _register(inner, child)
            module.add_module(name, inner)


def _children(node: Tree) -> list[tuple[str, Tree]]:
    """`(name, child)` of an inner node: a list, a dict, or a dataclass of them (an adapter), static fields left out."""
    if isinstance(node, list):
        return [(str(i), child) for i, child in enumerate(node)]
    if isinstance(node, dict):
        return list(node.items())
    parts = ((f.name, getattr(node, f.name)) for f in fields(node) if not f.metadata.get("static"))
    return [(name, child) for name, child in parts if child is not None]
