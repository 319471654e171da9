"""`Gather`: the `gather` hook of a program. It makes the sharded leaves of a block whole, and reduces gradients.

Leaves that are gathered over the same axis in the same dtype travel together in one flat bucket: one all-gather in the
forward, one reduce-scatter (and, with replicas, one all-reduce) in the backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from mmfn import tree
from mmfn.dtypes import wide
from mmfn.ops.eager import is_eager
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.layout import Mesh
from mmfn.parallel.weights.host_memory import HostMemory
from mmfn.parallel.weights.hosted import Fetched, Hosted, fetch, fetch_in_graph, hosted_of, stand_for
from mmfn.parallel.weights.sharding import local
from mmfn.tree import Tree

Issued = tuple[Tensor, Tensor]  # what arrives, and what is sent, which must live until then


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

    def split_(self, out: Tensor, whole: Tensor) -> None:
        """`split` into `out`, in its dtype and without anything in between."""
        rows, parts = whole.movedim(self.dim, 0), out.view(self.size, *self.part)
        full, rest = divmod(rows.shape[0], self.each)  # ranks whose rows are all real, and the next one's real rows
        parts[:full].copy_(rows[: full * self.each].view(full, *self.part))
        if full < self.size:
            parts[full, :rest].copy_(rows[full * self.each :])
            parts[full, rest:].zero_()
            parts[full + 1 :].zero_()

    def unpack(self, flat: Tensor, num_rows: int) -> Tensor:
        """Inverse of `pack`: this rank's `num_rows` real rows."""
        return flat.view(self.part)[:num_rows].movedim(0, self.dim)


@dataclass(frozen=True)
class Typed:
    """A leaf on its way to `Gather` with a compute dtype of its own."""

    leaf: Tensor
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """That of the leaf."""
        return self.leaf.device


def typed(params: Tree, dtypes: Sequence[torch.dtype | None]) -> Tree:
    """Parameters as `Gather` wants them where `dtypes`, one per leaf, names some: those leaves carry it."""
    leaves, structure = tree.flatten(params)
    return tree.unflatten(structure, [Typed(x, d) if d else x for x, d in zip(leaves, dtypes, strict=True)])


class Like(NamedTuple):
    """What the gradient of a shard looks like: rows along the cut dim, dtype and device."""

    num_rows: int
    dtype: torch.dtype
    device: torch.device


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

    def issue(self, shards: Sequence[Tensor]) -> Issued:
        """The all-gather of this rank's shards, under way."""
        sent = self.pack(shards)
        return self.axis.issue_all_gather(sent, "weights"), sent

    def join(self, gathered: Tensor) -> list[Tensor]:
        """The whole leaves from what all ranks sent."""
        pieces = torch.split(gathered.view(self.axis.size, -1), [cut.numel for cut in self.cuts], dim=1)
        return [cut.join(piece) for cut, piece in zip(self.cuts, pieces, strict=True)]

    def gather(self, shards: Sequence[Tensor], issued: Issued | None) -> list[Tensor]:
        """The whole leaves; `issued`: their all-gather, where it is under way."""
        gathered, _sent = issued or self.issue(shards)
        return self.join(self.axis.wait(gathered))

    def sum_gradients(self, grads: Sequence[Tensor | None], like: Sequence[Like]) -> list[Tensor]:
        """This rank's shards of the gradients, summed over all ranks that used the leaves; None counts as zeros."""
        packed = self._pack_gradients(grads, like[0].device)
        own = self.replicate.all_reduce(self.axis.reduce_scatter(packed, "gradients"), "gradients")
        pieces = torch.split(own, [cut.numel for cut in self.cuts])
        parts = zip(self.cuts, pieces, like, strict=True)
        return [cut.unpack(piece, to.num_rows).to(to.dtype) for cut, piece, to in parts]

    def _pack_gradients(self, grads: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """What this rank sends of the gradients: one flat vector.

        A compiler makes plain loops of a concatenation, but of writes into a buffer one loop with all their conditions.
        """
        sizes = [cut.numel for cut in self.cuts]
        sent = torch.empty(self.axis.size, sum(sizes), dtype=self.reduce, device=device)
        if is_eager(sent):
            for cut, g, out in zip(self.cuts, grads, torch.split(sent, sizes, dim=1), strict=True):
                out.zero_() if g is None else cut.split_(out, g)
            return sent.view(-1)
        whole = [
            sent.new_zeros(cut.shape) if g is None else g.to(self.reduce)
            for cut, g in zip(self.cuts, grads, strict=True)
        ]
        return torch.cat([cut.split(g) for cut, g in zip(self.cuts, whole, strict=True)], dim=1).view(-1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bucket: Bucket, issued: Issued | None, *shards: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.bucket = bucket
        ctx.like = [Like(x.shape[c.dim], x.dtype, x.device) for x, c in zip(shards, bucket.cuts, strict=True)]
        return tuple(bucket.gather(shards, issued))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.bucket.sum_gradients(grads, ctx.like)


@dataclass(kw_only=True, eq=False)
class Pending:
    """A block's parameters, and their copies from the host and all-gathers under way.

    `Gather.fetch` and `Gather.issue` start them, a `Gather` takes them.
    """

    params: Tree
    fetched: Fetched | None = None
    issued: list[Issued] | None = None

    def take(self) -> tuple[Fetched | None, list[Issued] | None]:
        """What is under way; nothing is from here on, so that gathered weights are not kept alive."""
        found = self.fetched, self.issued
        self.fetched = self.issued = None
        return found


@dataclass(frozen=True, kw_only=True)
class Gather:
    """The hook: DTensor leaves -> whole tensors (experts: whole local experts) in the compute dtype.

    `compute`: dtype of leaves in computation, default their own; a `Typed` leaf brings one. `reduce`: dtype in which
    gradients are summed, default float32, or float64 for what is computed in that. Gradients come back with the
    placement and dtype of the leaf: summed over "shard" (experts: edp) by reduce-scatter and over "replicate" by
    all-reduce. Leaves that need no gradient go in a bucket of their own. With `is_sharded` leaves stay this rank's
    shards, and what computes with them has summed their gradients over "shard" itself. `Hosted` leaves are copied to
    the device before, through `memory`; without one the copies are operators of a graph.
    """

    mesh: Mesh
    compute: torch.dtype | None = None
    reduce: torch.dtype | None = None
    is_sharded: bool = False
    memory: HostMemory | None = None

    def __call__(self, params: Tree | Pending) -> Tree:
        """Leaves that are whole already stay as they are, but for their dtype."""
        params, fetched, issued = self._under_way(params)
        found, structure = tree.flatten(params)
        leaves, dtypes = self._typed(found)
        away, copies = hosted_of(found), fetched.arrived() if fetched is not None else {}
        for i, leaf in away.items():
            if not isinstance(leaves[i], DTensor):
                leaves[i] = stand_for(leaves[i], copies.pop(i)) if i in copies else fetch_in_graph(leaves[i], leaf.host)
        buckets = self._buckets(leaves, dtypes)
        given: Sequence[Issued | None] = issued or [None] * len(buckets)
        for (bucket, members), started in zip(buckets, given, strict=True):
            shards = [leaves[i].to_local(grad_placements=leaves[i].placements) for i in members]
            if started is None and away:
                shards = [fetch_in_graph(x, away[i].host) for i, x in zip(members, shards, strict=True)]
            if shards[0].requires_grad:
                gathered = _Gather.apply(bucket, started, *shards)  # type: ignore[no-untyped-call]
            else:  # torch's compiler confuses the arguments of a Function that needs no gradient
                gathered = bucket.gather(shards, started)
            for i, whole in zip(members, gathered, strict=True):
                leaves[i] = whole
        return tree.unflatten(structure, [leaf.to(dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)])

    def fetch(self, pending: Pending) -> None:
        """Start the copies of a block's leaves that lie on the host, unless they or its all-gathers are under way."""
        if self.memory is not None and pending.fetched is None and pending.issued is None:
            pending.fetched = fetch(hosted_of(tree.leaves(pending.params)), self.memory)

    def issue(self, pending: Pending) -> None:
        """Start the all-gathers of a block, unless they are under way; of what lies on the host, behind its copies."""
        if pending.issued is None:
            self.fetch(pending)
            leaves, dtypes = self._typed(tree.leaves(pending.params))
            buckets = self._buckets(leaves, dtypes)
            copies = pending.fetched.arrived() if pending.fetched is not None and buckets else {}
            pending.issued = [
                bucket.issue([copies.pop(i) if i in copies else local(leaves[i]) for i in members])
                for bucket, members in buckets
            ]

    def _under_way(self, params: Tree | Pending) -> tuple[Tree, Fetched | None, list[Issued] | None]:
        """Parameters, and what is under way for them: of a program with a `memory` all that they need."""
        if not isinstance(params, Pending):
            if self.memory is None:
                return params, None, None
            params = Pending(params=params)
        if self.memory is not None:
            self.issue(params)
        return params.params, *params.take()

    def _typed(self, leaves: Sequence[Any]) -> tuple[list[Any], list[torch.dtype]]:
        """The tensors of leaves (handles) and the dtypes they are computed in; integers stay what they are."""
        leaves = [x.leaf if isinstance(x, Hosted) else x for x in leaves]
        bare = [x.leaf if isinstance(x, Typed) else x for x in leaves]
        kept = [isinstance(x, Typed) or not x.is_floating_point() for x in leaves]
        own = [x.dtype if is_kept else self.compute or x.dtype for x, is_kept in zip(leaves, kept, strict=True)]
        return bare, own

    def _buckets(self, leaves: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[tuple[Bucket, list[int]]]:
        """Buckets and the positions of their leaves, in the order of first leaves."""
        groups: dict[tuple[Any, ...], dict[int, DTensor]] = {}
        for i, (leaf, dtype) in enumerate(zip(leaves, dtypes, strict=True)):
            if isinstance(leaf, DTensor):
                key = leaf.device_mesh.mesh_dim_names, leaf.requires_grad, dtype  # leaves with one key share a bucket
                groups.setdefault(key, {})[i] = leaf
        return [
            (bucket_of(list(group.values()), self.mesh, dtype, self.reduce, self.is_sharded), list(group))
            for (*_, dtype), group in groups.items()
        ]


def bucket_of(
    leaves: Sequence[DTensor], mesh: Mesh, compute: torch.dtype, reduce: torch.dtype | None, is_sharded: bool = False
) -> Bucket:
    """The bucket of leaves with one placement and compute dtype."""
    _, parts, *_ = leaves[0].device_mesh.mesh_dim_names or ()
    axis = Axis(name="own") if is_sharded else mesh[parts]
    return Bucket(
        axis=axis,
        replicate=mesh["replicate"],
        cuts=tuple(_cut(leaf, axis) for leaf in leaves),
        compute=compute,
        reduce=reduce or wide(compute),
    )


def _cut(leaf: DTensor, axis: Axis) -> Cut:
    shape, dim = list(leaf._local_tensor.shape), 0
    for name, placement in zip(leaf.device_mesh.mesh_dim_names or (), leaf.placements, strict=True):
        if isinstance(placement, Shard) and name == axis.name:
            dim = placement.dim
            shape[dim] = leaf.shape[dim]
    return Cut(shape=tuple(shape), dim=dim, size=axis.size)
