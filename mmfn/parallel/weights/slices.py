"""`Cut`: how a leaf lies on all ranks, which part of it each of them holds, and which of several equal copies. `Turns`:
who writes.

A few integers say it for any number of ranks, so that none needs a table of what the others hold.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.weights.sharding import rows

Ranges = tuple[tuple[int, int], ...]  # (start, stop) for every dim of a leaf


@dataclass(frozen=True)
class Cut:
    """Ranks as a row-major grid of `sizes`; `dims`: the dim of the leaf that an axis of it cuts, None: it has copies.

    >>> cut = Cut((2, 4), (None, 0))  # two copies, each cut by dim 0 over four ranks
    >>> cut.ranges((10, 4), rank=7), cut.copy_of(7), cut.num_copies
    (((9, 10), (0, 4)), 1, 2)
    """

    sizes: tuple[int, ...]
    dims: tuple[int | None, ...]

    @property
    def num_ranks(self) -> int:
        """All of them."""
        return prod(self.sizes)

    @property
    def num_copies(self) -> int:
        """How many ranks hold each part."""
        return prod(size for size, dim in zip(self.sizes, self.dims, strict=True) if dim is None)

    def copy_of(self, rank: int) -> int:
        """Which copy of its part a rank holds."""
        copy = 0
        for size, dim, index in zip(self.sizes, self.dims, self._place(rank), strict=True):
            copy = copy * size + index if dim is None else copy
        return copy

    def ranges(self, shape: Sequence[int], rank: int) -> Ranges:
        """The part of a leaf of that shape that a rank holds."""
        ranges = [(0, size) for size in shape]
        for size, dim, index in zip(self.sizes, self.dims, self._place(rank), strict=True):
            if dim is not None:
                ranges[dim] = _rows(ranges[dim], size, index)
        return tuple(ranges)

    def holders(self, shape: Sequence[int], box: Ranges, copy: int) -> Iterator[tuple[int, Ranges]]:
        """The ranks whose part, in copy `copy`, has elements of a box, and their ranges; no other is looked at."""
        copies: list[int] = []  # of each axis with copies, the index; the last axis counts fastest
        for size, dim in zip(reversed(self.sizes), reversed(self.dims), strict=True):
            if dim is None:
                copies.insert(0, copy % size)
                copy //= size
        yield from self._descend(0, 0, [(0, size) for size in shape], box, copies)

    def _descend(
        self, axis: int, rank: int, ranges: list[tuple[int, int]], box: Ranges, copies: list[int]
    ) -> Iterator[tuple[int, Ranges]]:
        if axis == len(self.sizes):
            if all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(ranges, box, strict=True)):
                yield rank, tuple(ranges)
            return
        size, dim = self.sizes[axis], self.dims[axis]
        if dim is None:
            yield from self._descend(axis + 1, rank * size + copies[0], ranges, box, copies[1:])
            return
        start, stop = ranges[dim]
        each = -(-(stop - start) // size) or 1
        first, last = max(0, box[dim][0] - start) // each, min(size - 1, (box[dim][1] - 1 - start) // each)
        for index in range(first, last + 1):
            inner = [*ranges[:dim], _rows(ranges[dim], size, index), *ranges[dim + 1 :]]
            yield from self._descend(axis + 1, rank * size + index, inner, box, copies)

    def _place(self, rank: int) -> tuple[int, ...]:
        return _place(self.sizes, rank)


@dataclass
class Turns:
    """Whose turn it is to write a leaf of which several ranks hold copies: each writes as many bytes as the others.

    It follows from the leaves in their order alone, so ranks need not ask each other.
    """

    loads: dict[int, list[int]] = field(default_factory=dict)

    def next(self, num_copies: int, num_bytes: int) -> int:
        """The copy that is written."""
        loads = self.loads.setdefault(num_copies, [0] * num_copies)
        writer = loads.index(min(loads))
        loads[writer] += num_bytes
        return writer


def cut_of(leaf: Tensor, world: Axis) -> Cut:
    """How a leaf lies on the ranks of `world`. A plain tensor is the same, and whole, on all of them."""
    if not isinstance(leaf, DTensor):
        return Cut((world.size,), (None,))
    dims = tuple(p.dim if isinstance(p, Shard) else None for p in leaf.placements)
    return Cut(tuple(leaf.device_mesh.shape), dims)


@lru_cache(4096)
def _place(sizes: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """The coordinates of a rank in a row-major grid."""
    places: list[int] = []
    for size in reversed(sizes):
        rank, index = divmod(rank, size)
        places.insert(0, index)
    return tuple(places)


def _rows(ranges: tuple[int, int], size: int, index: int) -> tuple[int, int]:
    start, stop = ranges
    first, last = rows(stop - start, size, index)
    return start + first, start + last
