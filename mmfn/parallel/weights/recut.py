"""A leaf cut another way, so that a rank's part of it is a run of rows as they are stored."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.layout import Mesh
from mmfn.parallel.weights.sharding import rows


def cut_for_disk(
    values: Tensor, leaf: Tensor, mesh: Mesh, dims: Sequence[int]
) -> tuple[tuple[tuple[int, int], ...], Tensor]:
    """This rank's `(ranges, values)` of a leaf that is written in the order `dims`, innermost last.

    Where ranks would each have a few elements of every row there, they exchange them for rows: the dim that is
    innermost on disk is made whole, and the first of the others that nobody cuts is cut in its place. `values`: this
    rank's shard of `leaf`; all ranks of its replica must call it.
    """
    if not isinstance(leaf, DTensor):
        return tuple((0, size) for size in leaf.shape), values
    names, placed = leaf.device_mesh.mesh_dim_names or (), {}
    for name, placement in zip(names, leaf.placements, strict=True):
        if isinstance(placement, Shard) and mesh[name].size > 1:
            placed[placement.dim] = mesh[name]
    free = [dim for dim in dims if dim not in placed]
    if free and (axis := placed.pop(dims[-1], None)) is not None:
        values = _recut(values, axis, dims[-1], free[0], leaf.shape[dims[-1]])
        placed[free[0]] = axis
    ranges = [rows(n, placed[d].size, placed[d].index) if d in placed else (0, n) for d, n in enumerate(leaf.shape)]
    return tuple(ranges), values


def _recut(part: Tensor, axis: Axis, dim: int, other: int, num_rows: int) -> Tensor:
    """A shard that is cut over an axis by `dim` -> one that is cut by `other` there, which was whole."""
    cuts = [rows(part.shape[other], axis.size, rank) for rank in range(axis.size)]
    sent = [part.narrow(other, start, stop - start).reshape(-1) for start, stop in cuts]
    start, stop = cuts[axis.index]
    shapes = []
    for rank in range(axis.size):
        first, last = rows(num_rows, axis.size, rank)
        shape = list(part.shape)
        shape[dim], shape[other] = last - first, stop - start
        shapes.append(torch.Size(shape))
    sizes = [shape.numel() for shape in shapes]
    received = axis.all_to_all(torch.cat(sent), "export", out_sizes=sizes, in_sizes=[x.numel() for x in sent])
    pieces = zip(torch.split(received, sizes), shapes, strict=True)
    return torch.cat([piece.view(shape) for piece, shape in pieces], dim)
