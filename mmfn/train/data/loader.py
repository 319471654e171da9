"""`Loader`: which samples make up step s, which of them are this rank's, and how they are packed.

The order of data is a pure function of (seed, epoch, step): step s takes the global samples [s*B, (s+1)*B) of the
concatenated permutations of all epochs. Nothing depends on workers, on time or on what was asked before. Rank i of n
that have different data takes every n-th of them from the i-th, so a step sees the same samples on any mesh.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from mmfn import rng
from mmfn.batch import IGNORE, Batch, Sample, pack
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.program import whole_batch

T = TypeVar("T")
ALONE = Axis(name="batch")


class Samples(Protocol):
    """What a loader needs of a dataset; `sample` is called from several threads at once."""

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample: ...


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Counts over the micro-batches of a step. `frames`: images, plus the temporal grids of videos."""

    samples: int
    tokens: int
    padded_tokens: int  # static size: tokens and padding
    supervised_tokens: int
    visual_tokens: int
    patches: int
    padded_patches: int
    frames: int

    @property
    def padding_share(self) -> float:
        """Part of the packed tokens that is padding, in [0, 1]."""
        return 1.0 - self.tokens / self.padded_tokens


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a rank computes in one step, and the counts of the samples it is a share of."""

    microbatches: list[Batch]
    counts: Stats


class Loader:
    """Micro-batches of every step, packed to static sizes."""

    def __init__(
        self,
        dataset: Samples,
        positions_fn: Callable[[Sample], Tensor],
        *,
        batch_samples: int,
        token_buckets: Sequence[int],
        patch_buckets: Sequence[int],
        seed: int,
        merge_size: int,
        patch_values: int,
        axis: Axis = ALONE,
        split: Callable[[Batch], Batch] = whole_batch,
        segment_multiple: int = 1,
    ) -> None:
        """`batch_samples` samples per step; `token_buckets`, `patch_buckets`: static sizes a micro-batch may take.

        `positions_fn(sample)`: int64[3, T], the family's rope positions. `axis`: the ranks that divide the samples of a
        step; `split`: a batch -> what this rank computes of it; `segment_multiple`: what samples are padded to. Raises
        ValueError for an empty dataset, fewer samples per step than ranks, buckets that are not positive and strictly
        increasing, or patch buckets not divisible by merge_size**2.
        """
        if len(dataset) == 0:
            raise ValueError("the dataset is empty; it must hold at least one sample")
        if batch_samples < axis.size:
            raise ValueError(
                f"batch_samples must be at least {axis.size}, one for each rank with its own data, got {batch_samples}"
            )
        _check_buckets("token_buckets", token_buckets, 1)
        _check_buckets("patch_buckets", patch_buckets, merge_size**2)
        self.dataset, self.positions_fn = dataset, positions_fn
        self.batch_samples, self.seed = batch_samples, seed
        self.token_buckets, self.patch_buckets = tuple(token_buckets), tuple(patch_buckets)
        self.merge_size, self.patch_values = merge_size, patch_values
        self.axis, self.split, self.segment_multiple = axis, split, segment_multiple

    def indices(self, step: int) -> list[int]:
        """Dataset indices of step `step` (from 0), of all ranks, in order. A step may span the end of an epoch."""
        size = len(self.dataset)
        return [_permutation(size, self.seed, place // size)[place % size] for place in self._places(step)]

    def own(self, step: int) -> list[int]:
        """Those of `indices` that are this rank's."""
        return self.indices(step)[self.axis.index :: self.axis.size]

    def _places(self, step: int) -> range:
        """Places of a step's samples, of all ranks, in the order of data."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        return range(step * self.batch_samples, (step + 1) * self.batch_samples)

    def microbatches(self, step: int) -> list[Batch]:
        """This rank's samples of a step in as few batches as first-fit finds, padded to the smallest buckets they fit.

        Every batch has room for as many segments as a rank has samples and `patches / merge_size**2` frames, so its
        shapes depend on its two buckets only. A sample's `number` is its place in the order of data. Raises ValueError
        naming the sample when one is larger than the largest bucket.
        """
        places = self._places(step)[self.axis.index :: self.axis.size]
        samples = [self.dataset.sample(index) for index in self.own(step)]
        return self.pack([replace(sample, number=place) for sample, place in zip(samples, places, strict=True)])

    def share(self, step: int) -> Share:
        """`microbatches` split for this rank, with their counts. Ranks may have different numbers: see `agree`."""
        return self._share(self.microbatches(step))

    def empty(self) -> Share:
        """One micro-batch without samples, in the smallest buckets."""
        return self._share([self._pack_one([])])

    def _share(self, microbatches: list[Batch]) -> Share:
        return Share(microbatches=[self.split(b) for b in microbatches], counts=stats(microbatches))

    def pack(self, samples: Sequence[Sample]) -> list[Batch]:
        """Samples -> micro-batches, as in `microbatches`."""
        for sample in samples:
            self.check_fits(sample)
        return [self._pack_one([samples[i] for i in group]) for group in self._groups(samples)]

    def _groups(self, samples: Sequence[Sample]) -> list[list[int]]:
        """First fit, longest first (it needs at most 11/9 of the fewest bins); a group keeps the order of the step."""
        groups: list[list[int]] = []
        room: list[list[int]] = []
        for i in sorted(range(len(samples)), key=lambda i: -self._num_tokens(samples[i])):
            tokens, patches = self._num_tokens(samples[i]), samples[i].num_patches
            fitting = (g for g, (t, p) in enumerate(room) if tokens <= t and patches <= p)
            group = next(fitting, len(groups))
            if group == len(groups):
                groups.append([])
                room.append([self.token_buckets[-1], self.patch_buckets[-1]])
            groups[group].append(i)
            room[group] = [room[group][0] - tokens, room[group][1] - patches]
        return sorted(sorted(group) for group in groups)

    def _pack_one(self, samples: Sequence[Sample]) -> Batch:
        num_patches = _bucket(self.patch_buckets, sum(s.num_patches for s in samples))
        return pack(
            samples,
            [self.positions_fn(s) for s in samples],
            merge_size=self.merge_size,
            patch_values=self.patch_values,
            num_tokens=_bucket(self.token_buckets, sum(map(self._num_tokens, samples))),
            num_patches=num_patches,
            num_segments=-(-self.batch_samples // self.axis.size),
            num_frames=num_patches // self.merge_size**2,
            segment_multiple=self.segment_multiple,
        )

    def _num_tokens(self, sample: Sample) -> int:
        """Tokens a sample takes in a batch."""
        return -(-sample.tokens_T.numel() // self.segment_multiple) * self.segment_multiple

    def check_fits(self, sample: Sample) -> None:
        """Raise ValueError, with the sizes, for a sample larger than the largest bucket."""
        sizes = (
            ("tokens", self._num_tokens(sample), self.token_buckets),
            ("patches", sample.num_patches, self.patch_buckets),
        )
        for what, size, buckets in sizes:
            if size > buckets[-1]:
                raise ValueError(
                    f"sample {sample.id!r} has {size} {what} but the largest bucket holds {buckets[-1]}; add a larger "
                    f"{what} bucket or remove the sample"
                )


def stats(microbatches: Sequence[Batch]) -> Stats:
    """Counts over micro-batches on the host."""
    places = [b.visual.patches_PF.shape[0] for b in microbatches]
    return Stats(
        samples=sum(_num_segments(b.segments.offsets_N) for b in microbatches),
        tokens=sum(int((b.segment_T < b.num_segments).sum()) for b in microbatches),
        padded_tokens=sum(b.tokens_T.numel() for b in microbatches),
        supervised_tokens=sum(int((b.labels_T != IGNORE).sum()) for b in microbatches),
        visual_tokens=sum(int((b.feature_index_T >= 0).sum()) for b in microbatches),
        patches=sum(int(b.visual.segments.offsets_N[-1]) for b in microbatches),
        padded_patches=sum(places),
        frames=sum(_num_segments(b.visual.segments.offsets_N) for b in microbatches),
    )


def agree(share: Share, axis: Axis, empty: Share) -> Share:
    """The share with as many micro-batches as any rank of `axis` has, and the counts of all of them together.

    Ranks must take part in the same collectives: those with fewer micro-batches get copies of `empty` behind them.
    """
    if axis.size == 1:
        return share
    own = torch.tensor([[len(share.microbatches), *astuple(share.counts)]])
    all_BK = axis.all_gather(own, "data")
    most = int(all_BK[:, 0].max())
    num_all, *totals = all_BK.sum(0).tolist()
    counts = Stats(**dict(zip(asdict(share.counts), totals, strict=True)))
    padded = counts.padded_tokens + (most * axis.size - num_all) * empty.counts.padded_tokens
    padding = empty.microbatches * (most - len(share.microbatches))
    return Share(microbatches=share.microbatches + padding, counts=replace(counts, padded_tokens=padded))


def prefetch(make: Callable[[int], T], start: int, stop: int, *, workers: int = 1, ahead: int = 2) -> Iterator[T]:
    """`make(step)` for step in [start, stop), computed in `workers` threads up to `ahead` steps early.

    The result does not depend on `workers` or `ahead`; 0 workers compute in the caller. An error of a step is raised
    when that step is due. Closing the iterator (or leaving the loop) waits for the running steps and drops the rest.
    """
    if workers < 0 or ahead < 1:
        raise ValueError(f"prefetch needs workers >= 0 and ahead >= 1, got {workers} and {ahead}")
    return _threaded(make, start, stop, workers, ahead) if workers else map(make, range(start, stop))


def _threaded(make: Callable[[int], T], start: int, stop: int, workers: int, ahead: int) -> Iterator[T]:
    # threads, not processes: decoding, resizing and copying release the interpreter lock, and samples stay shared
    pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="mmfn-data")
    pending: deque[Future[T]] = deque()
    try:
        for step in range(start, stop):
            for early in range(step + len(pending), min(step + ahead + 1, stop)):
                pending.append(pool.submit(make, early))
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(rng.permutation(size, seed, "epoch", epoch))


def _bucket(buckets: Sequence[int], size: int) -> int:
    return next(bucket for bucket in buckets if bucket >= size)


def _num_segments(offsets_N: Tensor) -> int:
    return int((offsets_N[1:] > offsets_N[:-1]).sum())


def _check_buckets(name: str, buckets: Sequence[int], multiple: int) -> None:
    positive = bool(buckets) and all(bucket > 0 for bucket in buckets)
    if not positive or any(b <= a for a, b in pairwise(buckets)):
        raise ValueError(f"{name} must be positive and strictly increasing, got {list(buckets)}")
    for bucket in buckets:
        if bucket % multiple:
            raise ValueError(f"{name} must be multiples of merge_size**2 = {multiple}, got {bucket}")
