"""`DiskTensor`: one tensor of a checkpoint and the part of a leaf that it holds, whole or cut to a rank's shard.

>>> # Half of expert 3 of `gate_up`, [E, 2F, D], is stored as [F, D] = [4, 6]; a rank has experts 2 and 3, half of D.
>>> up_3 = DiskTensor(path="gate_up", ranges=((3, 4), (4, 8), (0, 6)), dims=(0, 1, 2), shape=(4, 6), leaf=spec)
>>> up_3.part(((2, 4), (0, 8), (0, 3))).disk, up_3.part(((2, 4), (0, 8), (0, 3))).place
(((0, 4), (0, 3)), ((1, 2), (4, 8), (0, 3)))
>>> list(up_3.part(((2, 4), (0, 8), (0, 3))).runs())  # where the elements of `place` are stored, 3 at a time
[(0, 3), (6, 3), (12, 3), (18, 3)]
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from torch import Tensor

from mmfn.spec import ParamSpec

Ranges = tuple[tuple[int, int], ...]
"""`(start, stop)` for every dim of a tensor."""


def whole(shape: Sequence[int]) -> Ranges:
    """The ranges of all elements.

    >>> whole((2, 3))
    ((0, 2), (0, 3))
    """
    return tuple((0, size) for size in shape)


def sizes(ranges: Ranges) -> tuple[int, ...]:
    """Lengths of the ranges: the shape of what they cut out."""
    return tuple(stop - start for start, stop in ranges)


def slices(ranges: Ranges) -> tuple[slice, ...]:
    """The index that cuts the ranges out of a tensor."""
    return tuple(slice(start, stop) for start, stop in ranges)


def overlap(ranges: Ranges, others: Ranges) -> Ranges:
    """What two boxes of one tensor have in common; a dim that they share nothing of stops where it starts, or before.

    >>> overlap(((0, 4), (2, 8)), ((3, 9), (0, 6)))
    ((3, 4), (2, 6))
    """
    return tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(ranges, others, strict=True))


def within(ranges: Ranges, outer: Ranges) -> Ranges:
    """A box counted from where the one around it begins.

    >>> within(((3, 4), (2, 6)), ((3, 9), (0, 6)))
    ((0, 1), (2, 6))
    """
    return tuple((start - base, stop - base) for (start, stop), (base, _) in zip(ranges, outer, strict=True))


@dataclass(frozen=True, kw_only=True)
class DiskTensor:
    """A tensor on disk that holds `ranges` of the leaf `path`.

    `dims`: the leaf's dims in the order they have on disk; `shape`: the shape on disk of the elements in that order.
    `leaf`: the spec of the leaf (or a tensor of its shape).
    """

    path: str
    ranges: Ranges
    dims: tuple[int, ...]
    shape: tuple[int, ...]
    leaf: ParamSpec

    def to_disk(self, leaf: Tensor) -> Tensor:
        """What it holds of a whole leaf, as it is on disk: a view, where strides allow one."""
        return leaf[slices(self.ranges)].permute(self.dims).reshape(self.shape)

    def from_disk(self, tensor: Tensor) -> Tensor:
        """Inverse of `to_disk`: the leaf's `ranges`, a view of a contiguous tensor."""
        extent = sizes(self.ranges)
        return tensor.reshape([extent[d] for d in self.dims]).permute(_inverse(self.dims))

    def part(self, ranges: Ranges) -> "Part | None":
        """What a shard with these `ranges` of the leaf needs of this tensor; None where that is nothing."""
        common: list[tuple[int, int]] = []
        for (a, b), (c, d) in zip(self.ranges, ranges, strict=True):
            common.append((max(a, c), min(b, d)))
            if common[-1][0] >= common[-1][1]:
                return None
        starts, extent = [start for start, _ in self.ranges], sizes(self.ranges)
        local = [(start - base, stop - base) for (start, stop), base in zip(common, starts, strict=True)]
        ordered = [local[d] for d in self.dims]
        disk, read = _disk_ranges([extent[d] for d in self.dims], self.shape, ordered)
        return Part(
            disk=disk,
            place=tuple((a - base, b - base) for (a, b), (base, _) in zip(common, ranges, strict=True)),
            read=sizes(read),
            crop=tuple((a - base, b - base) for (a, b), (base, _) in zip(ordered, read, strict=True)),
            dims=self.dims,
            extent=tuple(extent[d] for d in self.dims),
            box=tuple(ordered),
        )


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a shard needs of a tensor on disk: `disk`, ranges of the tensor, go to `place`, ranges of the shard.

    `read`: the shape of what is read, in the leaf's dims as ordered on disk, of which `crop` is needed: less than all
    only where a dim of the shard is stored as several. `extent`: the shape of the whole tensor in those dims, of which
    `box` is exactly what goes to `place`.
    """

    disk: Ranges
    place: Ranges
    read: tuple[int, ...]
    crop: Ranges
    dims: tuple[int, ...]
    extent: tuple[int, ...]
    box: Ranges

    def from_disk(self, tensor: Tensor) -> Tensor:
        """The elements of `place` from those of `disk`: a view of a contiguous tensor."""
        return tensor.reshape(self.read)[slices(self.crop)].permute(_inverse(self.dims))

    def to_disk(self, shard: Tensor) -> Tensor:
        """Of a shard the elements of `place` in the order in which they are stored: a view."""
        return shard[slices(self.place)].permute(self.dims)

    def runs(self) -> Iterator[tuple[int, int]]:
        """Where the tensor stores the elements of `to_disk`, in their order: `(first element, how many)` of each run.

        It stores all of its elements in row-major order, whatever its shape there.
        """
        num_outer = len(self.extent)  # dims behind these are whole: what lies in them is one run
        while num_outer and self.box[num_outer - 1] == (0, self.extent[num_outer - 1]):
            num_outer -= 1
        strides = [prod(self.extent[dim + 1 :]) for dim in range(num_outer)]
        if not strides:
            yield 0, prod(self.extent)
            return
        (start, stop), stride = self.box[num_outer - 1], strides[-1]
        outer = (range(a * step, b * step, step) for (a, b), step in zip(self.box, strides[:-1], strict=False))
        for offsets in product(*outer):
            yield sum(offsets) + start * stride, (stop - start) * stride


def _disk_ranges(
    extent: Sequence[int], shape: Sequence[int], local: Sequence[tuple[int, int]]
) -> tuple[Ranges, Ranges]:
    """Ranges of `shape` that hold the ranges `local` of its reshape `extent`, and what they are ranges of there.

    A dim that is the same in both (same size, as many elements before it) is cut; dims that were merged or split are
    read whole.
    """
    disk, read = list(whole(shape)), list(whole(extent))
    places = {(prod(shape[:i]), size): i for i, size in enumerate(shape)}
    for i, size in enumerate(extent):
        place = places.get((prod(extent[:i]), size))
        if place is not None:
            disk[place] = read[i] = local[i]
    return tuple(disk), tuple(read)


def _inverse(dims: Sequence[int]) -> list[int]:
    return sorted(range(len(dims)), key=dims.__getitem__)
