"""Functions with a backward of their own, written once: the form torch wants of them is made here.

In eager execution they are an `autograd.Function`, elsewhere an operator or a plain formula (`mmfn.ops.eager`).

    double = function(_double, _double_grad)         # eager alone: beside it stands a formula
    PRODUCT = operator("mmfn::product", _product, _product_fake)      # one operator, entered either way
    product = PRODUCT.with_gradient(_save, _product_grad)             # and its gradient, either way
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmfn.ops.eager import is_eager
from mmfn.torch_private import dispatch_modes


class Context(Protocol):
    """What a forward hands to its backward: torch's own context, as it is used here. `settings`: what is no tensor."""

    settings: Any

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...

    @property
    def needs_input_grad(self) -> tuple[bool, ...]: ...

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


def function(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward(ctx, *args) -> out` as a function of args, with the gradients that `backward(ctx, *douts)` returns.

    `ctx` is a `Context`. The backward gives one gradient or None for each of args, and is not differentiable again.
    """
    methods = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(backward))}
    entry: Any = type(forward.__name__, (torch.autograd.Function,), methods)

    def call(*args: Any) -> Any:
        return entry.apply(*args)  # a compiler takes a Function's `apply` for what it is in such a call alone

    return call


@dataclass(frozen=True, eq=False)
class Operator:
    """A torch operator, `traced`, and the Python function it runs, `direct`: the same numbers, without its dispatch.

    `is_whole`: it stays one operator under a plan's mode too, whose work and workspace its `Whole` counts.
    """

    name: str
    direct: Callable[..., Any]
    traced: Any
    is_whole: bool = False

    def __call__(self, *args: Any) -> Any:
        """One or the other, as the first argument and the modes around say."""
        return self.direct(*args) if self.is_direct(args[0]) else self.traced(*args)

    def is_direct(self, x: Tensor) -> bool:
        """Whether a call whose first argument is x runs the Python function."""
        return is_eager(x) and not (self.is_whole and dispatch_modes())

    def with_gradient(self, save: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
        """The first result of the operator as a function of its arguments, with gradients, entered either way.

        `save(ctx, inputs, outputs)` keeps what `backward(ctx, dout, *others)` needs; it returns a gradient or None for
        each input. The backward calls other operators, which are entered by the same rule.
        """
        self.traced.register_autograd(backward, setup_context=lambda ctx, inputs, output: save(ctx, inputs, output))
        direct, traced = self.direct, self.traced

        def forward(ctx: Context, *args: Any) -> Tensor:
            out = direct(*args)
            save(ctx, args, out)
            first: Tensor = out[0] if isinstance(out, tuple) else out
            return first

        eager = function(forward, backward)

        def call(*args: Any) -> Tensor:
            out = eager(*args) if self.is_direct(args[0]) else traced(*args)
            first: Tensor = out[0] if isinstance(out, tuple) else out
            return first

        return call


def operator(name: str, direct: Callable[..., Any], fake: Callable[..., Any], *, is_whole: bool = False) -> Operator:
    """Register `direct` as the torch operator `name`; it writes to none of its arguments and returns new tensors.

    Its annotations are the operator's schema. `fake`: the same function of tensors without values. `is_whole`: a trace
    of it is long (a loop over pieces of a row), so that a plan counts it as its `Whole` says; its loops are `turns`.
    """
    traced = torch.library.custom_op(name, direct, mutates_args=())
    traced.register_fake(fake)
    return Operator(name, direct, traced, is_whole)


def turns(loop: range, x: Tensor) -> range:
    """The turns of a loop over pieces of x: all, but the first three where x is on the meta device.

    There a function runs only to tell what it holds, and by the third turn that is all: what the first begins with,
    what the second still has of the first, and what the third finds as every later one does.
    """
    return loop[:3] if x.is_meta else loop
