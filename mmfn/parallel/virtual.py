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

from mmfn.parallel.axis import Transport
from mmfn.parallel.mesh import Layout, Mesh, Partition, make_mesh

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
    channels: dict[tuple[str, tuple[int, ...]], _Channel] = {}
    lock = threading.Lock()
    results: list[Any] = [None] * layout.world
    errors: dict[int, BaseException] = {}
    calls: list[list[Call]] = [[] for _ in range(layout.world)]
    grad_enabled = torch.is_grad_enabled()

    def run(rank: int) -> None:
        def connect(name: str, partition: Partition) -> Transport:
            group = next(g for g in partition if rank in g)
            with lock:
                channel = channels.setdefault((name, group), _Channel(len(group)))
            return _Threads(name, group.index(rank), channel, calls[rank])

        try:
            with torch.set_grad_enabled(grad_enabled):
                results[rank] = fn(make_mesh(layout, rank, connect))
        except BaseException as error:  # the others wait for this rank: let them go
            errors[rank] = error
            for channel in list(channels.values()):
                channel.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(layout.world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        first = next((e for e in errors.values() if not isinstance(e, threading.BrokenBarrierError)), None)
        raise first or RuntimeError(f"ranks {sorted(errors)} wait for a collective that another rank never called")
    return World(results=results, calls=calls)


class _Channel:
    """Where the ranks of one group meet."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.slots: list[Any] = [None] * size

    def exchange(self, index: int, value: Any, read: Callable[[list[Any]], T]) -> T:
        """`read(what all ranks brought)`. The second meeting keeps values from being changed while others read them."""
        self.slots[index] = value
        self.barrier.wait()
        result = read(self.slots)
        self.barrier.wait()
        return result


@dataclass(frozen=True)
class _Threads:
    """The transport of one rank on one axis."""

    axis: str
    index: int
    channel: _Channel
    log: list[Call] = field(repr=False)

    def all_gather(self, x: Tensor, site: str) -> Tensor:
        return self._meet("all_gather", x, site, torch.cat)

    def reduce_scatter(self, x: Tensor, site: str) -> Tensor:
        size = len(self.channel.slots)
        return self._meet("reduce_scatter", x, site, lambda xs: _sum([x.chunk(size)[self.index] for x in xs]))

    def all_reduce(self, x: Tensor, site: str) -> Tensor:
        return self._meet("all_reduce", x, site, _sum)

    def all_to_all(self, x: Tensor, out_sizes: Sequence[int], in_sizes: Sequence[int], site: str) -> Tensor:
        if sum(in_sizes) != x.shape[0]:
            raise ValueError(f"all_to_all of {x.shape[0]} rows got in_sizes {list(in_sizes)}; they must add up to it")
        self._log("all_to_all", x, site)
        kind = ("all_to_all", site, x.shape[1:], x.dtype)
        parts = torch.split(x, list(in_sizes))
        own = self._exchange(kind, parts, lambda met: [part[self.index].clone() for part in met])
        if [p.shape[0] for p in own] != list(out_sizes):
            raise ValueError(f"all_to_all expects {list(out_sizes)} rows but gets {[p.shape[0] for p in own]}")
        return torch.cat(own)

    def wait(self, x: Tensor) -> Tensor:
        return x

    def _meet(self, name: str, x: Tensor, site: str, combine: Callable[[list[Tensor]], Tensor]) -> Tensor:
        self._log(name, x, site)
        return self._exchange((name, site, x.shape, x.dtype), x, combine)

    def _log(self, name: str, x: Tensor, site: str) -> None:
        self.log.append(Call(self.axis, name, site, tuple(x.shape), x.dtype))

    def _exchange(self, kind: tuple[Any, ...], value: Any, read: Callable[[list[Any]], T]) -> T:
        def check(met: list[Any]) -> T:
            for rank, (other, _) in enumerate(met):
                if other != kind:
                    raise ValueError(f"on axis {self.axis}, rank {self.index} calls {kind} but rank {rank} {other}")
            return read([value for _, value in met])

        return self.channel.exchange(self.index, (kind, value), check)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
