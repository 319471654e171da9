"""Buckets: leaves that travel together, as one flat vector each way.

Leaves that are gathered over one axis in one dtype share an all-gather in the forward and a reduce-scatter (with
replicas also an all-reduce) in the backward. What a bucket does follows from how its leaves are cut, planned once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from mmfn.ops.eager import is_eager
from mmfn.parallel.mesh.axis import Axis

Issued = tuple[Tensor, Tensor]  # what arrives, and what is sent, which must live until then


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How one leaf lies in a bucket. `shape`: gathered, cut along `dim`; every rank sends ceil(rows / ranks) rows.

    What a rank sends is its shard as it lies, so what comes back of a gradient lies as the shard does.
    """

    shape: tuple[int, ...]
    dim: int
    size: int

    @property
    def each(self) -> int:
        """Rows a rank sends, padding included."""
        return -(-self.shape[self.dim] // self.size)

    @property
    def part(self) -> tuple[int, ...]:
        """Shape of what a rank sends."""
        return (*self.shape[: self.dim], self.each, *self.shape[self.dim + 1 :])

    @property
    def numel(self) -> int:
        """Elements a rank sends."""
        return prod(self.part)

    def pack(self, shard: Tensor) -> Tensor:
        """A shard as a flat vector, its rows padded with zeros."""
        return _padded(shard, self.dim, self.each).reshape(-1)

    def join(self, parts: Tensor) -> Tensor:
        """[ranks, numel] -> the gathered leaf, in one copy."""
        split = parts.view(self.size, *self.part).movedim(0, self.dim)
        return split.flatten(self.dim, self.dim + 1).narrow(self.dim, 0, self.shape[self.dim]).contiguous()

    def split(self, whole: Tensor) -> Tensor:
        """Inverse of `join`: [ranks, numel], padded with zeros."""
        padded = _padded(whole, self.dim, self.size * self.each)
        cut = padded.reshape(*self.shape[: self.dim], self.size, self.each, *self.shape[self.dim + 1 :])
        return cut.movedim(self.dim, 0).reshape(self.size, -1)

    def split_(self, out: Tensor, whole: Tensor) -> None:
        """`split` into `out`, in its dtype and without anything in between."""
        rows, parts = whole.movedim(self.dim, 0), out.view(self.size, *self.part).movedim(self.dim + 1, 1)
        full, rest = divmod(rows.shape[0], self.each)  # ranks whose rows are all real, and the next one's real rows
        parts[:full].copy_(rows[: full * self.each].view(full, self.each, *rows.shape[1:]))
        if full < self.size:
            parts[full, :rest].copy_(rows[full * self.each :])
            parts[full, rest:].zero_()
            parts[full + 1 :].zero_()

    def unpack(self, flat: Tensor, num_rows: int) -> Tensor:
        """Inverse of `pack`: this rank's `num_rows` real rows, dense, as an update of the shard wants them."""
        return flat.view(self.part).narrow(self.dim, 0, num_rows).contiguous()


def _padded(x: Tensor, dim: int, num_rows: int) -> Tensor:
    """Zeros behind the rows of a dim, up to `num_rows`."""
    if missing := num_rows - x.shape[dim]:
        return torch.cat([x, x.new_zeros(*x.shape[:dim], missing, *x.shape[dim + 1 :])], dim)
    return x


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
        return self.join(self.axis.wait(gathered, "weights"))

    def sum_gradients(self, grads: Sequence[Tensor | None], like: Sequence[Like]) -> list[Tensor]:
        """This rank's shards of the gradients, summed over all ranks that used the leaves; None counts as zeros."""
        packed = self._pack_gradients(grads, like[0].device)
        own = self.replicate.all_reduce(self.axis.reduce_scatter(packed, "gradients"), "gradients")
        return self.unpack(own, like)

    def issue_sum(self, grads: Sequence[Tensor | None], device: torch.device) -> Issued:
        """The reduce-scatter of gradients of whole leaves, under way."""
        sent = self._pack_gradients(grads, device)
        return self.axis.issue_reduce_scatter(sent, "gradients"), sent

    def unpack(self, own: Tensor, like: Sequence[Like]) -> list[Tensor]:
        """The gradients of this rank's shards from the flat vector of their sums."""
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
