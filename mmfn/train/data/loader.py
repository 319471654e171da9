"""`Loader`: which samples make up step s, which of them are this rank's, and how they are packed.

The order of data is a pure function of (seed, epoch, step): step s takes the global samples [s*B, (s+1)*B) of the
concatenated permutations of all epochs. Nothing depends on workers, on time or on what was asked before. Rank i of n
that have different data takes every n-th of them from the i-th, so a step sees the same samples on any mesh.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from mmfn import rng
from mmfn.batch import IGNORE, Batch, Sample, Tower, TowerKind
from mmfn.errors import UserError
from mmfn.packing import Sizes, num_units
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.program import whole_batch
from mmfn.train.objective import count_labels

T = TypeVar("T")
ALONE = Axis(name="batch")


class Samples(Protocol):
    """What a loader needs of a dataset; `sample` is called from several threads at once."""

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample: ...


Pack = Callable[[Sequence[Sample], Sizes], Batch]  # (samples, static sizes) -> batch; `Family.pack` of a config


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Counts over the micro-batches of a step. `inputs`: what encoders read, all towers together."""

    samples: int
    tokens: int
    padded_tokens: int  # static size: tokens and padding
    supervised_tokens: int
    media_tokens: int
    inputs: int
    padded_inputs: int

    @property
    def padding_share(self) -> float:
        """Part of the packed tokens that is padding, in [0, 1]."""
        return 1.0 - self.tokens / self.padded_tokens


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a rank computes in one step, and the counts of the samples it is a share of.

    `labels_AN`: int64, supervised tokens of every sample of the A whole micro-batches, N places for samples in each.
    """

    microbatches: list[Batch]
    counts: Stats
    labels_AN: Tensor


class Loader:
    """Micro-batches of every step, packed to static sizes."""

    def __init__(
        self,
        dataset: Samples,
        pack: Pack,
        towers: Mapping[str, TowerKind],
        *,
        batch_samples: int,
        token_buckets: Sequence[int],
        tower_buckets: Mapping[str, Sequence[int]],
        seed: int,
        axis: Axis = ALONE,
        split: Callable[[Batch], Batch] = whole_batch,
        segment_multiple: int = 1,
    ) -> None:
        """`batch_samples` samples per step; `token_buckets` and, for each of the model's `towers`, `tower_buckets`:
        static sizes a micro-batch may take, in tokens and in inputs of the encoder.

        `pack`: the family's. `axis`: the ranks that divide the samples of a step; `split`: a batch -> what this rank
        computes of it; `segment_multiple`: what samples are padded to. Raises ValueError for an empty dataset, fewer
        samples per step than ranks, a tower without buckets or buckets without a tower, and buckets that are not
        positive and strictly increasing, or not made of whole units.
        """
        if len(dataset) == 0:
            raise UserError("the dataset is empty; it must hold at least one sample")
        if batch_samples < axis.size:
            raise UserError(
                f"batch_samples must be at least {axis.size}, one for each rank with its own data, got {batch_samples}"
            )
        if odd := sorted(tower_buckets.keys() ^ towers.keys()):
            raise UserError(
                f"tower_buckets has sizes for {', '.join(tower_buckets) or 'nothing'} but the model's towers are "
                f"{', '.join(towers) or 'none'}; {'add' if odd[0] in towers else 'remove'} {odd[0]!r}"
            )
        _check_buckets("token_buckets", token_buckets, 1)
        for name, kind in towers.items():
            _check_buckets(f"tower_buckets of {name!r}", tower_buckets[name], kind.inputs)
        self.dataset, self._pack, self.towers = dataset, pack, towers
        self.batch_samples, self.seed = batch_samples, seed
        self.buckets = {
            "tokens": tuple(token_buckets),
            **{name: tuple(n // kind.inputs for n in tower_buckets[name]) for name, kind in towers.items()},
        }
        self.axis, self.split, self.segment_multiple = axis, split, segment_multiple
        self.num_segments = -(-batch_samples // axis.size)

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
            raise UserError(f"step must not be negative, got {step}")
        return range(step * self.batch_samples, (step + 1) * self.batch_samples)

    def microbatches(self, step: int) -> list[Batch]:
        """This rank's samples of a step in as few batches as first-fit finds, padded to the smallest buckets they fit.

        Every batch has room for as many segments as a rank has samples, so its shapes depend on its buckets only. A
        sample's `number` is its place in the order of data. Raises ValueError naming the sample when one is larger than
        the largest bucket.
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
        labels_AN = count_labels(microbatches)
        return Share(
            microbatches=[self.split(b) for b in microbatches], counts=stats(microbatches), labels_AN=labels_AN
        )

    def pack(self, samples: Sequence[Sample]) -> list[Batch]:
        """Samples -> micro-batches, as in `microbatches`."""
        for sample in samples:
            self.check_fits(sample)
        return [self._pack_one([samples[i] for i in group]) for group in self._groups(samples)]

    def _groups(self, samples: Sequence[Sample]) -> list[list[int]]:
        """First fit, longest first (it needs at most 11/9 of the fewest bins); a group keeps the order of the step."""
        groups: list[list[int]] = []
        rooms: list[dict[str, int]] = []
        for i in sorted(range(len(samples)), key=lambda i: -self._size(samples[i])["tokens"]):
            size = self._size(samples[i])
            fitting = (g for g, room in enumerate(rooms) if all(size[name] <= room[name] for name in size))
            group = next(fitting, len(groups))
            if group == len(groups):
                groups.append([])
                rooms.append({name: buckets[-1] for name, buckets in self.buckets.items()})
            groups[group].append(i)
            rooms[group] = {name: room - size[name] for name, room in rooms[group].items()}
        return sorted(sorted(group) for group in groups)

    def _pack_one(self, samples: Sequence[Sample]) -> Batch:
        sizes = [self._size(sample) for sample in samples]
        chosen = {name: _bucket(b, sum(size[name] for size in sizes)) for name, b in self.buckets.items()}
        return self._pack(
            samples,
            Sizes(
                tokens=chosen.pop("tokens"),
                segments=self.num_segments,
                units=chosen,
                segment_multiple=self.segment_multiple,
            ),
        )

    def _size(self, sample: Sample) -> dict[str, int]:
        """What a sample takes in a batch: tokens, and units of each tower."""
        tokens = -(-sample.tokens_T.numel() // self.segment_multiple) * self.segment_multiple
        return {"tokens": tokens, **{name: num_units(sample, kind) for name, kind in self.towers.items()}}

    def check_fits(self, sample: Sample) -> None:
        """Raise ValueError, with the sizes, for a sample larger than the largest bucket."""
        for name, size in self._size(sample).items():
            inputs = self.towers[name].inputs if name in self.towers else 1
            what = f"inputs of {name}" if name in self.towers else name
            if size > (largest := self.buckets[name][-1]):
                raise UserError(
                    f"sample {sample.id!r} has {size * inputs} {what} but the largest bucket holds {largest * inputs}; "
                    f"add a larger bucket for {what} or remove the sample"
                )


def stats(microbatches: Sequence[Batch]) -> Stats:
    """Counts over micro-batches on the host."""
    towers = [tower for b in microbatches for tower in b.towers.values()]
    return Stats(
        samples=sum(_num_samples(b) for b in microbatches),
        tokens=sum(int((b.segment_T < b.num_segments).sum()) for b in microbatches),
        padded_tokens=sum(b.tokens_T.numel() for b in microbatches),
        supervised_tokens=sum(int((b.labels_T != IGNORE).sum()) for b in microbatches),
        media_tokens=sum(int((tower.index_T >= 0).sum()) for tower in towers),
        inputs=sum(_num_inputs(tower) for tower in towers),
        padded_inputs=sum(tower.inputs_UF.shape[0] for tower in towers),
    )


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """What all ranks with their own data know of a step: `share` of this rank, with as many micro-batches as any has.

    `counts`: of all ranks together. `labels_DAN`: int64, supervised tokens of every sample of all D ranks, what
    `objective.weigh_by` takes.
    """

    microbatches: list[Batch]
    counts: Stats
    labels_DAN: Tensor


def agree(share: Share, axis: Axis, empty: Share) -> Agreed:
    """One exchange of a few numbers per sample over `axis`, the ranks with their own data.

    Ranks must take part in the same collectives: those with fewer micro-batches get copies of `empty` behind them.
    """
    A, N = share.labels_AN.shape
    micro_S, place_S = _samples_of(share)
    own = torch.full((2, N), -1)
    own[:, : micro_S.numel()] = torch.stack([micro_S, share.labels_AN[micro_S, place_S]])
    facts = torch.tensor([A, *astuple(share.counts)])
    all_DK = axis.all_gather(torch.cat([facts, own.flatten()])[None], "data")
    most = int(all_DK[:, 0].max())
    num_all, *totals = all_DK[:, : facts.numel()].sum(0).tolist()
    counts = Stats(**dict(zip(asdict(share.counts), totals, strict=True)))
    padded = counts.padded_tokens + (most * axis.size - num_all) * empty.counts.padded_tokens
    return Agreed(
        microbatches=share.microbatches + empty.microbatches * (most - A),
        counts=replace(counts, padded_tokens=padded),
        labels_DAN=_labels(all_DK[:, facts.numel() :].view(axis.size, 2, N), most),
    )


def _samples_of(share: Share) -> tuple[Tensor, Tensor]:
    """Micro-batch and place in it of every sample."""
    numbers_A = torch.tensor([_num_samples(b) for b in share.microbatches])
    micro_S = torch.repeat_interleave(numbers_A)
    return micro_S, torch.arange(micro_S.numel()) - (numbers_A.cumsum(0) - numbers_A)[micro_S]


def _labels(all_D2N: Tensor, num_microbatches: int) -> Tensor:
    """labels_DAN from the micro-batch (-1: no sample) and the count of every sample of every rank, in order."""
    D, _, N = all_D2N.shape
    micro_DN, count_DN = all_D2N.unbind(1)
    is_first_DN = micro_DN.diff(dim=1, prepend=micro_DN.new_full((D, 1), -2)) != 0
    places_N = torch.arange(N)
    place_DN = places_N - torch.where(is_first_DN, places_N, 0).cummax(1).values  # in its micro-batch
    d, n = (micro_DN >= 0).nonzero(as_tuple=True)
    labels_DAN = torch.zeros(D, num_microbatches, N, dtype=torch.int64)
    labels_DAN[d, micro_DN[d, n], place_DN[d, n]] = count_DN[d, n]
    return labels_DAN


def prefetch(make: Callable[[int], T], start: int, stop: int, *, workers: int = 1, ahead: int = 2) -> Iterator[T]:
    """`make(step)` for step in [start, stop), computed in `workers` threads up to `ahead` steps early.

    The result does not depend on `workers` or `ahead`; 0 workers compute in the caller. An error of a step is raised
    when that step is due. Closing the iterator (or leaving the loop) waits for the running steps and drops the rest.
    """
    if workers < 0 or ahead < 1:
        raise UserError(f"prefetch needs workers >= 0 and ahead >= 1, got {workers} and {ahead}")
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


def _num_samples(batch: Batch) -> int:
    return int((batch.segments.host_N.diff() > 0).sum())


def _num_inputs(tower: Tower) -> int:
    """Inputs that are not padding."""
    rows = tower.inputs_UF.shape[0] / max(1, tower.coords_P4.shape[0])
    return round(int(tower.segments[0].host_N[-1]) * rows)


def _check_buckets(name: str, buckets: Sequence[int], multiple: int) -> None:
    positive = bool(buckets) and all(bucket > 0 for bucket in buckets)
    if not positive or any(b <= a for a, b in pairwise(buckets)):
        raise UserError(f"{name} must be positive and strictly increasing, got {list(buckets)}")
    for bucket in buckets:
        if bucket % multiple:
            raise UserError(f"{name} must be multiples of {multiple}, what makes a feature, got {bucket}")
