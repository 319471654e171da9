"""`make_gather`: the `gather` hook of a program. It makes the sharded leaves of a block whole, and reduces gradients.

Leaves that are gathered over the same axis in the same dtype travel together in one flat bucket: one all-gather in the
forward, one reduce-scatter (and, with replicas, one all-reduce) in the backward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from mmfn import tree
from mmfn.parallel.axis import Axis
from mmfn.parallel.mesh import Mesh
from mmfn.tree import Tree

SHARDED = ("ep",)  # mesh dims that stay sharded in computation: a rank computes with its own experts


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How one leaf lies in a bucket. `shape`: gathered, cut along `dim`; every rank sends ceil(rows / ranks) rows."""

    shape: tuple[int, ...]
    dim: int
    size: int

    @property
    def each(self) -> int:
        """Rows a rank sends, padding included."""
        return -(-self.shape[self.dim] // self.size)

    @property
    def part(self) -> tuple[int, ...]:
        """Shape of what a rank sends, the cut dim first."""
        return (self.each, *self.shape[: self.dim], *self.shape[self.dim + 1 :])

    @property
    def numel(self) -> int:
        """Elements a rank sends."""
        return prod(self.part)

    def pack(self, shard: Tensor) -> Tensor:
        """A shard as a flat vector with the cut dim first, padded with zeros."""
        rows = shard.movedim(self.dim, 0)
        if rows.shape[0] < self.each:
            rows = torch.cat([rows, rows.new_zeros(self.each - rows.shape[0], *rows.shape[1:])])
        return rows.reshape(-1)

    def join(self, parts: Tensor) -> Tensor:
        """[ranks, numel] -> the gathered leaf, in one copy."""
        split = parts.view(self.size, *self.part).movedim((0, 1), (self.dim, self.dim + 1))
        return split.flatten(self.dim, self.dim + 1).narrow(self.dim, 0, self.shape[self.dim]).contiguous()

    def split(self, whole: Tensor) -> Tensor:
        """Inverse of `join`: [ranks, numel], padded with zeros."""
        missing = self.size * self.each - self.shape[self.dim]
        if missing:
            zeros = whole.new_zeros(*self.shape[: self.dim], missing, *self.shape[self.dim + 1 :])
            whole = torch.cat([whole, zeros], self.dim)
        cut = whole.reshape(*self.shape[: self.dim], self.size, self.each, *self.shape[self.dim + 1 :])
        return cut.movedim((self.dim, self.dim + 1), (0, 1)).reshape(self.size, -1)

    def unpack(self, flat: Tensor, num_rows: int) -> Tensor:
        """Inverse of `pack`: this rank's `num_rows` real rows."""
        return flat.view(self.part)[:num_rows].movedim(0, self.dim)


@dataclass(frozen=True, kw_only=True, eq=False)
class Bucket:
    """Leaves that travel together. `compute` and `reduce`: dtypes of the whole leaves and of the gradient's sum."""

    axis: Axis
    replicate: Axis
    cuts: tuple[Cut, ...]
    compute: torch.dtype
    reduce: torch.dtype

    def pack(self, shards: Sequence[Tensor]) -> Tensor:
        """What this rank sends: one flat vector."""
        return torch.cat([cut.pack(x.to(self.compute)) for cut, x in zip(self.cuts, shards, strict=True)])

    def join(self, gathered: Tensor) -> list[Tensor]:
        """The whole leaves from what all ranks sent."""
        pieces = torch.split(gathered.view(self.axis.size, -1), [cut.numel for cut in self.cuts], dim=1)
        return [cut.join(piece) for cut, piece in zip(self.cuts, pieces, strict=True)]

    def reduce_(self, grads: Sequence[Tensor | None], like: Sequence[tuple[int, torch.dtype]]) -> list[Tensor]:
        """This rank's shards of the gradients, summed over all ranks that used the leaves."""
        zeros = (torch.zeros(cut.shape, dtype=self.reduce, device=self._device(grads)) for cut in self.cuts)
        whole = [z if g is None else g.to(self.reduce) for g, z in zip(grads, zeros, strict=True)]
        packed = torch.cat([cut.split(g) for cut, g in zip(self.cuts, whole, strict=True)], dim=1).view(-1)
        own = self.replicate.all_reduce(self.axis.reduce_scatter(packed, "gradients"), "gradients")
        pieces = torch.split(own, [cut.numel for cut in self.cuts])
        parts = zip(self.cuts, pieces, like, strict=True)
        return [cut.unpack(piece, num_rows).to(dtype) for cut, piece, (num_rows, dtype) in parts]

    @staticmethod
    def _device(grads: Sequence[Tensor | None]) -> torch.device:
        return next(g.device for g in grads if g is not None)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bucket: Bucket, issued: Tensor | None, *shards: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.bucket, ctx.like = bucket, [(x.shape[c.dim], x.dtype) for x, c in zip(shards, bucket.cuts, strict=True)]
        if issued is None:
            issued = bucket.axis.issue_all_gather(bucket.pack(shards), "weights")
        return tuple(bucket.join(bucket.axis.wait(issued)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.bucket.reduce_(grads, ctx.like)


def make_gather(mesh: Mesh, compute: torch.dtype | None, reduce: torch.dtype | None) -> Callable[[Tree], Tree]:
    """`gather(params)`: DTensor leaves -> whole tensors (experts: whole local experts) in the compute dtype.

    `compute`: dtype of leaves in computation, default their own. `reduce`: dtype in which gradients are summed, default
    the compute dtype. Gradients come back with the placement and dtype of the leaf: summed over "shard" (experts: edp)
    by reduce-scatter and over "replicate" by all-reduce. Leaves that need no gradient go in a bucket of their own.
    """

    def gather(params: Tree) -> Tree:
        leaves, structure = tree.flatten(params)
        out = list(leaves)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, DTensor):
                groups.setdefault(_key(leaf, compute), []).append(i)
            elif compute is not None:
                out[i] = leaf.to(compute)
        for members in groups.values():
            for i, whole in zip(members, _gather([leaves[i] for i in members], mesh, compute, reduce), strict=True):
                out[i] = whole
        return tree.unflatten(structure, out)

    return gather


def _key(leaf: DTensor, compute: torch.dtype | None) -> tuple[Any, ...]:
    """Leaves with one key share a bucket."""
    return leaf.device_mesh.mesh_dim_names, leaf.requires_grad, compute or leaf.dtype


def _gather(
    leaves: Sequence[DTensor], mesh: Mesh, compute: torch.dtype | None, reduce: torch.dtype | None
) -> tuple[Tensor, ...]:
    shards = [leaf.to_local(grad_placements=leaf.placements) for leaf in leaves]
    bucket = bucket_of(leaves, mesh, compute, reduce)
    out: tuple[Tensor, ...] = _Gather.apply(bucket, None, *shards)  # type: ignore[no-untyped-call]
    return out


def bucket_of(leaves: Sequence[DTensor], mesh: Mesh, compute: torch.dtype | None, reduce: torch.dtype | None) -> Bucket:
    """The bucket of leaves with one placement."""
    names = leaves[0].device_mesh.mesh_dim_names or ()
    (name,) = [n for n, p in zip(names, leaves[0].placements, strict=True) if isinstance(p, Shard) and n not in SHARDED]
    axis = mesh[name]
    compute = compute or leaves[0].dtype
    return Bucket(
        axis=axis,
        replicate=mesh["replicate"],
        cuts=tuple(_cut(leaf, axis) for leaf in leaves),
        compute=compute,
        reduce=reduce or compute,
    )


def _cut(leaf: DTensor, axis: Axis) -> Cut:
    shape, dim = list(leaf._local_tensor.shape), 0
    for name, placement in zip(leaf.device_mesh.mesh_dim_names or (), leaf.placements, strict=True):
        if isinstance(placement, Shard) and name == axis.name:
            dim = placement.dim
            shape[dim] = leaf.shape[dim]
    return Cut(shape=tuple(shape), dim=dim, size=axis.size)
