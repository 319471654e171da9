"""Streams of a device that are clocks: every operator of a program, on the CPU, is given to the stream that is current.

A stream knows how far it has waited for the others. What an operator reads must have been written before by its own
stream or by one that it has waited for, and what it writes must have been read so. Memory that is let go may be handed
out again by the stream that it came from, at once: all that used it must be behind that stream by then. So whatever
order a device chooses, a program that passes gives the same values.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmfn.parallel.mesh.axis import Transport
from mmfn.parallel.mesh.layout import Mesh
from mmfn.parallel.weights import streams
from mmfn.torch_private import EagerMode, local_tensor, schema, storage_key

Time = tuple[str, int]  # a stream, and how many operators it had been given


class RaceError(AssertionError):
    """Two streams use memory in no order."""


class Stream:
    """A stream; within `with` it is the current one."""

    def __init__(self, name: str, clocks: "Clocks") -> None:
        self.name, self.clocks, self.seen = name, clocks, {name: 0}

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())

    def record_event(self) -> dict[str, int]:
        return dict(self.seen)

    def wait_event(self, event: dict[str, int]) -> None:
        self.seen = {name: max(self.seen.get(name, 0), event.get(name, 0)) for name in {**self.seen, **event}}

    def __enter__(self) -> None:
        self.clocks.entered.append(self)

    def __exit__(self, *_: Any) -> None:
        self.clocks.entered.pop()

    def follows(self, *times: Time | None) -> bool:
        """Whether it has waited for all of these."""
        return all(time is None or self.seen.get(time[0], 0) >= time[1] for time in times)


@dataclass(eq=False)
class Memory:
    """A storage: the stream it came from, who wrote it last and who has read it since, and what wrote it."""

    owner: Stream
    written: Time | None = None
    read: dict[str, int] = field(default_factory=dict)
    by: str = ""

    @property
    def uses(self) -> tuple[Time | None, ...]:
        return self.written, *self.read.items()


class Clocks(EagerMode):
    """See above. `given`: how many operators of a name each stream was given, by `(stream, operator)`."""

    is_eager = True

    def __init__(self) -> None:
        super().__init__()
        self.streams = {"compute": Stream("compute", self)}
        self.entered = [self.streams["compute"]]
        self.memory: dict[int, Memory] = {}
        self.let_go: dict[str, list[Memory]] = {}
        self.given: dict[tuple[str, str], int] = {}
        self.finalizers: dict[int, Any] = {}

    def stream(self, name: str) -> Stream:
        """The stream of a name, made at its first use."""
        return self.streams.setdefault(name, Stream(name, self))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        stream, name = self.entered[-1], str(func.overloadpacket)
        stream.seen[stream.name] += 1
        self.given[stream.name, name] = self.given.get((stream.name, name), 0) + 1
        given = [
            *zip(schema(func).arguments, args, strict=False),
            *((a, kwargs[a.name]) for a in schema(func).arguments if a.name in kwargs),
        ]
        makes = list(_tensors(out))
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema(func).returns)
        for argument, value in given:
            for x in _tensors(value):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._write(stream, x, name)
                elif not is_view:
                    self._read(stream, x, name)
        for x in makes:
            if storage_key(x.untyped_storage()) not in self.memory:
                self._write(stream, x, name)
        return out

    def _find(self, stream: Stream, x: Tensor, name: str) -> Memory:
        storage = x.untyped_storage()
        key = storage_key(storage)
        if key in self.memory:
            return self.memory[key]
        for old in self.let_go.pop(stream.name, []):
            if not stream.follows(*old.uses):
                raise RaceError(f"{stream.name} reuses, for {name}, what {old.by} has made and {old.uses} still use")
        found = self.memory[key] = Memory(stream)

        def free(_: Any) -> None:
            del self.memory[key], self.finalizers[key]
            self.let_go.setdefault(found.owner.name, []).append(found)

        self.finalizers[key] = weakref.ref(storage, free)
        return found

    def _read(self, stream: Stream, x: Tensor, name: str) -> None:
        memory = self._find(stream, x, name)
        if not stream.follows(memory.written):
            raise RaceError(f"{stream.name} reads, for {name}, what {memory.by} writes on {memory.written}")
        memory.read[stream.name] = stream.seen[stream.name]

    def _write(self, stream: Stream, x: Tensor, name: str) -> None:
        memory = self._find(stream, x, name)
        if not stream.follows(*memory.uses):
            raise RaceError(f"{stream.name} overwrites, by {name}, what {memory.by} has made and {memory.uses} use")
        memory.written, memory.read, memory.by = (stream.name, stream.seen[stream.name]), {}, name


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, DTensor):
        yield local_tensor(value)
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


@contextmanager
def streamed(clocks: Clocks) -> Iterator[None]:
    """Everything within runs on clocks: the streams of `mmfn.parallel.weights.streams` too."""

    def make(device: Any) -> Stream:
        return clocks.stream("side")

    with (
        patch.object(streams, "has_streams", lambda device: True),
        patch.object(torch, "Stream", make),
        patch.object(torch.accelerator, "current_stream", lambda device=None: clocks.entered[-1]),
        clocks,
    ):
        yield


@dataclass(eq=False)
class Wired:
    """A transport whose collectives run on a stream of their own, as those of a process group of a device do. It holds
    nothing that it is given."""

    inner: Transport
    size: int
    clocks: Clocks
    axis: str
    under_way: dict[int, dict[str, int]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def widest(self) -> torch.dtype:
        return self.inner.widest

    @property
    def is_traceable(self) -> bool:
        return self.inner.is_traceable

    def all_gather(self, x: Tensor, site: str) -> Tensor:
        return self._send(x, self.size * x.shape[0], "gathers", lambda: self.inner.all_gather(x, site))

    def reduce_scatter(self, x: Tensor, site: str) -> Tensor:
        return self._send(x, x.shape[0] // self.size, "scatters", lambda: self.inner.reduce_scatter(x, site))

    def all_reduce(self, x: Tensor, site: str) -> Tensor:
        return self._send(x, x.shape[0], "gathers", lambda: self.inner.all_reduce(x, site))

    def wait(self, x: Tensor) -> Tensor:
        self.clocks.entered[-1].wait_event(self.under_way.pop(storage_key(x.untyped_storage())))
        return x

    def _send(self, x: Tensor, num_rows: int, group: str, move: Callable[[], Tensor]) -> Tensor:
        out = x.new_empty(num_rows, *x.shape[1:])  # of the stream that sends
        wire = self.clocks.stream(f"{group} of {self.axis}")
        wire.wait_stream(self.clocks.entered[-1])
        with wire:
            out.copy_(self.inner.wait(move()))
        self.under_way[storage_key(out.untyped_storage())] = wire.record_event()
        return out


def wired(mesh: Mesh, clocks: Clocks) -> Mesh:
    """A mesh whose collectives run on streams of their own."""
    axes = {
        name: axis
        if axis.transport is None
        else replace(axis, transport=Wired(axis.transport, axis.size, clocks, name))
        for name, axis in mesh.axes.items()
    }
    return replace(mesh, axes=axes)
