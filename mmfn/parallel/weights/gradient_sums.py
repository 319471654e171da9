"""`GradientSums`: the sums over ranks of a step's gradients, under way while the backward goes on.

A block's gradients are packed and sent where its backward ends, and waited for where two later blocks want to send
theirs, or at the end: a transport has the time of a block's backward for them, and there are two packed buffers at
most. What arrives is this rank's part, added over micro-batches as it lies; only the whole sum goes to the replicas.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from mmfn.dtypes import wide
from mmfn.parallel.weights.buckets import Bucket, Like

MOST_UNDER_WAY = 2
Kind = tuple[Bucket, tuple[str, ...]]  # a leaf may also travel otherwise, as a head that is gathered and also sharded


@dataclass(frozen=True, kw_only=True, eq=False)
class Sum:
    """Gradients of the leaves of a bucket, by path. `flat`: this rank's parts, as the bucket lies, or what becomes
    them; `sent`: what a transport may still read; `is_last`: of the step's last micro-batch."""

    bucket: Bucket
    paths: tuple[str, ...]
    like: tuple[Like, ...]
    flat: Tensor
    sent: Tensor | None
    is_last: bool

    @property
    def kind(self) -> Kind:
        """What is added up as it lies."""
        return self.bucket, self.paths


@dataclass(kw_only=True, eq=False)
class GradientSums:
    """See above. `most`: how many are under way at once; with 0 each is waited for where it is sent.

    `is_last`: this micro-batch is the step's last, so that with what is sent now a sum is whole.
    """

    most: int = MOST_UNDER_WAY
    is_last: bool = True
    _scattering: deque[Sum] = field(default_factory=deque, init=False)
    _reducing: deque[Sum] = field(default_factory=deque, init=False)
    _parts: dict[Kind, Sum] = field(default_factory=dict, init=False)  # of earlier micro-batches
    _whole: list[Sum] = field(default_factory=list, init=False)
    _paths: set[str] = field(default_factory=set, init=False)

    def __contains__(self, path: str) -> bool:
        """True for a leaf whose gradient was sent."""
        return path in self._paths

    def add(self, bucket: Bucket, paths: Sequence[str], like: Sequence[Like], grads: Sequence[Tensor | None]) -> None:
        """Send the gradients of the whole leaves of a bucket; None counts as zeros."""
        self._arrive(max(self.most - 1, 0))
        flat, sent = bucket.issue_sum(grads, like[0].device)
        self._scattering.append(
            Sum(bucket=bucket, paths=tuple(paths), like=tuple(like), flat=flat, sent=sent, is_last=self.is_last)
        )
        self._paths.update(paths)
        self._arrive(self.most)

    def take(self, *, is_wide: bool) -> dict[str, Tensor]:
        """The gradients of this rank's shards by path, complete, in float32 or wider if `is_wide`; none stays here."""
        self._arrive(0)
        for kind in list(self._parts):
            self._to_replicas(self._parts.pop(kind))
        self._from_replicas(0)
        found: dict[str, Tensor] = {}
        while self._whole:
            done = self._whole.pop()
            like = [x._replace(dtype=wide(x.dtype)) for x in done.like] if is_wide else done.like
            for path, grad in zip(done.paths, done.bucket.unpack(done.flat, like), strict=True):
                found[path] = found[path] + grad if path in found else grad  # an embedding may be the head as well
        return found

    def _arrive(self, most: int) -> None:
        """Wait for sums, the oldest first, until `most` are under way."""
        while len(self._scattering) > most:
            arrived = self._scattering.popleft()
            own = replace(arrived, flat=arrived.bucket.axis.wait(arrived.flat, "gradients"), sent=None)
            if (part := self._parts.pop(own.kind, None)) is not None:
                own.flat.add_(part.flat)
            if own.is_last:
                self._to_replicas(own)
            else:
                self._parts[own.kind] = own

    def _to_replicas(self, own: Sum) -> None:
        """Send a whole sum of this replica's ranks."""
        self._from_replicas(max(self.most - 1, 0))
        issued = own.bucket.replicate.issue_all_reduce(own.flat, "gradients")
        self._reducing.append(replace(own, flat=issued, sent=own.flat))

    def _from_replicas(self, most: int) -> None:
        while len(self._reducing) > most:
            own = self._reducing.popleft()
            self._whole.append(replace(own, flat=own.bucket.replicate.wait(own.flat, "gradients"), sent=None))
