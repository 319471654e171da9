"""`virtual`: every rank of a mesh in one process, a thread each, with real values.

The ranks run the same code as real ones; only the transport differs. Reductions add in the order of ranks, so results
are the same from run to run and on every rank. A collective checks that all its ranks call the same one.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmfn.parallel.mesh.axis import InProcess, MismatchError, Transport
from mmfn.parallel.mesh.layout import AXES, Layout, Mesh, Partition, make_mesh

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """One collective a rank took part in: axis, operation, site and the shape and dtype it gave."""

    axis: str
    name: str
    site: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class World:
    """What ran: the results of all ranks and the collectives each of them called, in order."""

    results: list[Any]
    calls: list[list[Call]]


def virtual(layout: Layout, fn: Callable[[Mesh], T]) -> list[T]:
    """`[fn(mesh of rank 0), fn(mesh of rank 1), ...]`, all at once. An error of a rank stops all and is raised."""
    return run_virtual(layout, fn).results


def run_virtual(layout: Layout, fn: Callable[[Mesh], Any]) -> World:
    """`virtual` with a log of collectives."""
    groups = {(name, group) for name in AXES for group in layout.partition(name) if len(group) > 1}
    channels = {key: _Channel(len(key[1])) for key in groups}
    results: list[Any] = [None] * layout.world
    errors: dict[int, BaseException] = {}
    calls: list[list[Call]] = [[] for _ in range(layout.world)]
    grad_enabled = torch.is_grad_enabled()

    def run(rank: int) -> None:
        def connect(name: str, partition: Partition) -> Transport:
            group = next(g for g in partition if rank in g)
            return _Threads(name, group.index(rank), channels[name, group], calls[rank])

        try:
            with torch.set_grad_enabled(grad_enabled):
                results[rank] = fn(make_mesh(layout, rank, connect))
        except BaseException as error:
            errors[rank] = error
        for (_, group), channel in channels.items():
            if rank in group:
                channel.leave()

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(layout.world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors.values() if not isinstance(e, DesertedError)), errors[min(errors)])
    return World(results=results, calls=calls)


class DesertedError(RuntimeError):
    """A rank waits for a collective that another one, which has ended, never called."""


class _Channel:
    """Where the ranks of one group meet, round after round."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = threading.Condition()
        self.round = 0
        self.brought: dict[int, Any] = {}
        self.met: list[Any] = []
        self.is_deserted = False

    def meet(self, index: int, value: Any) -> list[Any]:
        """What all ranks brought, in their order. Raises DesertedError when one of them has left."""
        with self.changed:
            here = self.round
            self.brought[index] = value
            if len(self.brought) == self.size:
                self.met = [self.brought[i] for i in range(self.size)]
                self.brought, self.round = {}, here + 1
                self.changed.notify_all()
            self.changed.wait_for(lambda: self.round > here or self.is_deserted)
            if self.round == here:
                raise DesertedError
            return self.met  # of this round: the next one cannot end without this rank

    def leave(self) -> None:
        """A rank has ended: whoever waits for it, or will, waits in vain."""
        with self.changed:
            self.is_deserted = True
            self.changed.notify_all()


@dataclass(frozen=True)
class _Threads(InProcess):
    """The transport of one rank on one axis."""

    axis: str
    index: int
    channel: _Channel
    log: list[Call] = field(repr=False)

    def all_gather(self, x: Tensor, site: str) -> Tensor:
        return torch.cat(self._meet("all_gather", x, site, x.shape))

    def reduce_scatter(self, x: Tensor, site: str) -> Tensor:
        if x.shape[0] % self.channel.size:
            raise ValueError(
                f"reduce_scatter of {x.shape[0]} rows over {self.channel.size} ranks; pad them to a multiple"
            )
        met = self._meet("reduce_scatter", x, site, x.shape)
        return _sum([other.chunk(self.channel.size)[self.index] for other in met])

    def all_reduce(self, x: Tensor, site: str) -> Tensor:
        return _sum(self._meet("all_reduce", x, site, x.shape))

    def move(self, x: Tensor, out_sizes: Sequence[int], in_sizes: Sequence[int], site: str) -> Tensor:
        return self._move("all_to_all", x, out_sizes, in_sizes, site)

    def shift(self, x: Tensor, out_sizes: Sequence[int], in_sizes: Sequence[int], site: str) -> Tensor:
        return self._move("shift", x, out_sizes, in_sizes, site)

    def _move(self, name: str, x: Tensor, out_sizes: Sequence[int], in_sizes: Sequence[int], site: str) -> Tensor:
        if sum(in_sizes) != x.shape[0]:
            raise ValueError(f"{name} of {x.shape[0]} rows got in_sizes {list(in_sizes)}; they must add up to it")
        met = self._meet(name, x, site, x.shape[1:], list(in_sizes))
        own = [torch.split(other, sizes)[self.index] for other, sizes in met]
        if [part.shape[0] for part in own] != list(out_sizes):
            raise ValueError(f"{name} expects {list(out_sizes)} rows but gets {[part.shape[0] for part in own]}")
        return torch.cat(own)

    def wait(self, x: Tensor) -> Tensor:
        return x

    def _meet(self, name: str, x: Tensor, site: str, shape: Sequence[int], sizes: list[int] | None = None) -> list[Any]:
        """The tensors of all ranks (with `sizes`: and theirs), copied, as a rank may overwrite its own at once.

        `shape`: what all ranks must have in common.
        """
        if not x.is_contiguous():  # real transports send memory as it lies
            raise ValueError(f"{name} ({site}) got a tensor of strides {x.stride()}; make it contiguous")
        self.log.append(Call(self.axis, name, site, tuple(x.shape), x.dtype))
        kind, copy = (name, site, tuple(shape), x.dtype), x.detach().clone()
        try:
            met = self.channel.meet(self.index, (kind, copy if sizes is None else (copy, sizes)))
        except DesertedError:
            raise DesertedError(
                f"rank {self.index} of axis {self.axis} waits in {kind}, which another never called"
            ) from None
        for rank, (other, _) in enumerate(met):
            if other != kind:
                text = f"on axis {self.axis}, rank {self.index} calls {kind} but rank {rank} {other}"
                raise MismatchError(text, [shape for (_, _, shape, _), _ in met])
        return [value for _, value in met]


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
