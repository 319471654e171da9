"""`Axis`: ranks along one dimension of a mesh and the collectives among them, the only object that knows ranks.

A collective names its `site`, the purpose it serves ("weights", "experts", ...), by which plans and logs count it. The
methods of an `Axis` are not differentiable; `psum`, `all_gather`, `exchange` and `shift` below are.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mmfn import torch_private
from mmfn.ops.eager import is_eager
from mmfn.parallel.mesh.collective import Collective


class MismatchError(ValueError):
    """Ranks that meet in a collective call different ones. `shapes`: what each of them gave, by rank."""

    def __init__(self, text: str, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__(text)
        self.shapes = shapes


Sizes = Sequence[int] | None  # rows to or from every rank of an axis; None: equal parts


class Transport(Protocol):
    """Moves tensors between the ranks of one axis. What a method returns may be used after `wait`.

    Tensors are contiguous. `all_gather`: [n, ...] -> [size * n, ...], by rank. `reduce_scatter`: [size * n, ...] ->
    [n, ...], the sum of this rank's parts. `all_to_all`: the first dim is cut by `in_sizes`, part i goes to rank i.
    `shift`: the same where every rank gives all of it to one other. `name`: the fourth argument of the operator that
    `all_to_all` is to what watches operators. `widest`: the widest dtype that it adds up. `is_traceable`: its
    collectives may be part of a graph.
    """

    @property
    def name(self) -> str: ...
    @property
    def widest(self) -> torch.dtype: ...
    @property
    def is_traceable(self) -> bool: ...
    def all_gather(self, x: Tensor, site: str) -> Tensor: ...
    def reduce_scatter(self, x: Tensor, site: str) -> Tensor: ...
    def all_reduce(self, x: Tensor, site: str) -> Tensor: ...
    def all_to_all(self, x: Tensor, out_sizes: Sequence[int], in_sizes: Sequence[int], site: str) -> Tensor: ...
    def shift(self, x: Tensor, out_sizes: Sequence[int], in_sizes: Sequence[int], site: str) -> Tensor: ...
    def wait(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Axis:
    """This rank's place among `size` ranks. An axis of size 1 has no transport and its collectives do nothing."""

    name: str
    size: int = 1
    index: int = 0
    transport: Transport | None = None

    @property
    def widest(self) -> torch.dtype:
        """The widest dtype that can be summed over these ranks."""
        return torch.float64 if self.transport is None else self.transport.widest

    def all_gather(self, x: Tensor, site: str) -> Tensor:
        """Parts of all ranks end to end along the first dim."""
        x = x.contiguous()  # here and below: what is sent lives until it has arrived
        with Collective("all_gather", self.name, site):
            return self.wait(self.issue_all_gather(x, site))

    def issue_all_gather(self, x: Tensor, site: str) -> Tensor:
        """`all_gather` of a contiguous tensor under way: keep it, and `wait` for the result before it is read."""
        return x if self.transport is None else self.transport.all_gather(x, site)

    def wait(self, x: Tensor, site: str = "") -> Tensor:
        """The result of an issued collective, complete."""
        if self.transport is None:
            return x
        with Collective("wait", self.name, site):
            return self.transport.wait(x)

    def reduce_scatter(self, x: Tensor, site: str) -> Tensor:
        """This rank's part of the sum over ranks; the first dim is cut evenly."""
        x = x.contiguous()
        with Collective("reduce_scatter", self.name, site):
            return self.wait(self.issue_reduce_scatter(x, site))

    def issue_reduce_scatter(self, x: Tensor, site: str) -> Tensor:
        """`reduce_scatter` of a contiguous tensor under way: keep it, and `wait` for the result before it is read."""
        return x if self.transport is None else self.transport.reduce_scatter(x, site)

    def all_reduce(self, x: Tensor, site: str) -> Tensor:
        """The sum over ranks."""
        x = x.contiguous()
        with Collective("all_reduce", self.name, site):
            return self.wait(self.issue_all_reduce(x, site))

    def issue_all_reduce(self, x: Tensor, site: str) -> Tensor:
        """`all_reduce` of a contiguous tensor under way: keep it, and `wait` for the result before it is read."""
        return x if self.transport is None else self.transport.all_reduce(x, site)

    def all_to_all(self, x: Tensor, site: str, out_sizes: Sizes = None, in_sizes: Sizes = None) -> Tensor:
        """Part i of the first dim goes to rank i; what arrives lies in the order of ranks. Default: equal parts."""
        if self.transport is None:
            return x
        x, even = x.contiguous(), [x.shape[0] // self.size] * self.size
        with Collective("all_to_all", self.name, site):
            return self.wait(self.transport.all_to_all(x, out_sizes or even, in_sizes or even, site))

    def shift(self, x: Tensor, by: int, site: str) -> Tensor:
        """The tensor of the rank `by` places before this one, around the ring; all have one shape."""
        x = x.contiguous()
        with Collective("shift", self.name, site):
            return self.wait(self.issue_shift(x, by, site))

    def issue_shift(self, x: Tensor, by: int, site: str) -> Tensor:
        """`shift` of a contiguous tensor under way: keep it, and `wait` for the result before it is read."""
        if self.transport is None:
            return x
        sizes_in, sizes_out = [0] * self.size, [0] * self.size
        sizes_in[(self.index + by) % self.size] = sizes_out[(self.index - by) % self.size] = x.shape[0]
        return self.transport.shift(x, sizes_out, sizes_in, site)


@dataclass(frozen=True)
class Group:
    """Real ranks: torch's functional collectives over a process group, traceable by torch.compile.

    `scatters`: a group of the same ranks for reduce-scatters alone, as those of one group wait for each other.
    """

    name: str
    size: int
    widest: torch.dtype = torch.float64
    is_traceable: bool = True
    scatters: str = ""

    def all_gather(self, x: Tensor, site: str) -> Tensor:
        """See `Transport`."""
        return torch_private.all_gather(x, self.size, self.name)

    def reduce_scatter(self, x: Tensor, site: str) -> Tensor:
        """See `Transport`."""
        return torch_private.reduce_scatter(x, self.size, self.scatters or self.name)

    def all_reduce(self, x: Tensor, site: str) -> Tensor:
        """See `Transport`."""
        return torch_private.all_reduce(x, self.name)

    def all_to_all(self, x: Tensor, out_sizes: Sequence[int], in_sizes: Sequence[int], site: str) -> Tensor:
        """See `Transport`."""
        return torch_private.all_to_all(x, out_sizes, in_sizes, self.name)

    def shift(self, x: Tensor, out_sizes: Sequence[int], in_sizes: Sequence[int], site: str) -> Tensor:
        """See `Transport`."""
        return self.all_to_all(x, out_sizes, in_sizes, site)

    def wait(self, x: Tensor) -> Tensor:
        """See `Transport`."""
        return torch_private.wait(x)


class InProcess(ABC):
    """A transport in plain Python. To what watches operators its all-to-all is one, as that of real ranks is."""

    widest = torch.float64
    is_traceable = False

    @property
    def name(self) -> str:
        """See `Transport`; no other transport has it while this one lives."""
        return f"{type(self).__name__} {id(self):x}"

    def all_to_all(self, x: Tensor, out_sizes: Sequence[int], in_sizes: Sequence[int], site: str) -> Tensor:
        """See `Transport`."""
        if is_eager(x):
            return self.move(x, out_sizes, in_sizes, site)
        _calling[self.name] = self
        try:
            out: Tensor = _all_to_all(x, out_sizes, in_sizes, self.name, site)
            return out
        finally:
            del _calling[self.name]

    @abstractmethod
    def move(self, x: Tensor, out_sizes: Sequence[int], in_sizes: Sequence[int], site: str) -> Tensor:
        """`all_to_all`, unseen."""


_calling: dict[str, InProcess] = {}  # by name, for the time of a call: an operator takes no objects


@torch.library.custom_op("mmfn::all_to_all", mutates_args=())
def _all_to_all(x: Tensor, out_sizes: Sequence[int], in_sizes: Sequence[int], transport: str, site: str) -> Tensor:
    """`InProcess.move` as one operator."""
    return _calling[transport].move(x, out_sizes, in_sizes, site)


@_all_to_all.register_fake
def _(x: Tensor, out_sizes: Sequence[int], in_sizes: Sequence[int], transport: str, site: str) -> Tensor:
    return _calling[transport].move(x, out_sizes, in_sizes, site)


ALL_TO_ALL = torch.ops.mmfn.all_to_all.default  # that operator, as dispatch modes see it


def psum(x: Tensor, axis: Axis, site: str) -> Tensor:
    """Sum over the ranks of an axis. A rank's loss is its share of a plain sum, so the gradient is summed as well."""
    return x if axis.size == 1 else _apply(_Psum, x, axis, site)


def all_gather(x: Tensor, axis: Axis, site: str) -> Tensor:
    """Parts of all ranks end to end along the first dim; the gradient is summed and cut back."""
    return x if axis.size == 1 else _apply(_AllGather, x, axis, site)


def exchange(x: Tensor, axis: Axis, site: str, out_sizes: Sizes = None, in_sizes: Sizes = None) -> Tensor:
    """Part i of the first dim to rank i (`Axis.all_to_all`); the gradient travels back."""
    return x if axis.size == 1 else _apply(_Exchange, x, axis, site, out_sizes, in_sizes)


def shift(x: Tensor, axis: Axis, site: str, by: int = 1) -> Tensor:
    """The tensor of the rank `by` places before this one; the gradient travels back."""
    return x if axis.size == 1 else _apply(_Shift, x, axis, site, by)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    out: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return out


class _Psum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, site: str) -> Tensor:
        ctx.axis, ctx.site = axis, site
        return axis.all_reduce(x, site)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.axis.all_reduce(grad, ctx.site), None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, site: str) -> Tensor:
        ctx.axis, ctx.site = axis, site
        return axis.all_gather(x, site)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.axis.reduce_scatter(grad, ctx.site), None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, site: str, out_sizes: Sizes, in_sizes: Sizes) -> Tensor:
        ctx.axis, ctx.site, ctx.sizes = axis, site, (in_sizes, out_sizes)
        return axis.all_to_all(x, site, out_sizes, in_sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.axis.all_to_all(grad, ctx.site, *ctx.sizes), None, None, None, None


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, site: str, by: int) -> Tensor:
        ctx.axis, ctx.site, ctx.by = axis, site, by
        return axis.shift(x, by, site)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.axis.shift(grad, -ctx.by, ctx.site), None, None, None
