"""Ranks that are imagined: the mesh of one rank whose collectives are noted and answered as if all ranks were alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmfn.parallel.mesh.axis import InProcess
from mmfn.parallel.mesh.layout import Layout, Mesh, Partition, make_mesh
from mmfn.parallel.planning.trace import Recorder


@dataclass(frozen=True)
class Alike(InProcess):
    """The transport of one rank that stands for all: every other rank is taken to hold the values this one holds.

    What is known stays known (counts, lengths) and what is a shape has the shape it would have.
    """

    recorder: Recorder = field(repr=False)
    axis: str
    index: int
    size: int

    def all_gather(self, x: Tensor, site: str) -> Tensor:
        """See `Transport`."""

        def gathered() -> Tensor:
            return x.new_empty(self.size * x.shape[0], *x.shape[1:]).view(self.size, *x.shape).copy_(x).flatten(0, 1)

        return self._send("all_gather", x, site, gathered)

    def reduce_scatter(self, x: Tensor, site: str) -> Tensor:
        """See `Transport`."""
        return self._send("reduce_scatter", x, site, lambda: x.chunk(self.size)[self.index] * self.size)

    def all_reduce(self, x: Tensor, site: str) -> Tensor:
        """See `Transport`."""
        return self._send("all_reduce", x, site, lambda: x * self.size)

    def move(self, x: Tensor, out_sizes: Sequence[int], in_sizes: Sequence[int], site: str) -> Tensor:
        """See `InProcess`. With unequal sizes the rows that arrive are unknown, and given as zeros."""

        def moved() -> Tensor:
            own: Tensor = torch.split(x, list(in_sizes))[self.index]
            if set(out_sizes) == {own.shape[0]}:
                return own.repeat(self.size, *[1] * (x.ndim - 1))
            return x.new_zeros(sum(out_sizes), *x.shape[1:])

        return self._send("all_to_all", x, site, moved)

    def shift(self, x: Tensor, out_sizes: Sequence[int], in_sizes: Sequence[int], site: str) -> Tensor:
        """See `Transport`."""
        return self._send("shift", x, site, lambda: x.new_zeros(sum(out_sizes), *x.shape[1:]))

    def wait(self, x: Tensor) -> Tensor:
        """See `Transport`."""
        self.recorder.waited(x)
        return x

    def _send(self, op: str, x: Tensor, site: str, make: Callable[[], Tensor]) -> Tensor:
        key = self.recorder.called(self.axis, op, site, x)
        with self.recorder.labelled("communication"):
            out = make()
        self.recorder.sent(key, out)
        return out


def recording_mesh(layout: Layout, rank: int, recorder: Recorder | None = None) -> Mesh:
    """The mesh of one rank whose collectives are answered as if all ranks were alike, and noted where one records."""
    noted_by = recorder or Recorder(is_fake=False)

    def connect(name: str, partition: Partition) -> Alike:
        group = next(g for g in partition if rank in g)
        return Alike(noted_by, name, group.index(rank), len(group))

    return make_mesh(layout, rank, connect)
