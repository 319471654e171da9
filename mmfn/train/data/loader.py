"""`Loader`: which samples make up a step, which of them are this rank's, and how they are packed.

The order of data is a pure function of (seed, place) and a step one of the order: nothing depends on workers, on time
or on what was asked before, and the samples of a step are the same on any mesh (`mmfn.train.data.windows`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import torch

from mmfn.batch import AUDIO, IMAGE, VIDEO, Batch, Sample, TowerKind
from mmfn.errors import UserError
from mmfn.models.work import Work
from mmfn.packing import Sizes
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.program import whole_batch
from mmfn.train.data.agree import NO_WORK, Agreed, Share, agree, stats
from mmfn.train.data.cursor import START, Cursor, State, digest_of, from_state, to_state
from mmfn.train.data.reader import LongPolicy, Reader, Samples
from mmfn.train.data.sizes import Buckets, Rate, Rates, Size
from mmfn.train.data.skips import Skip, check_share
from mmfn.train.data.windows import BySamples, ByTokens, Job, with_counts
from mmfn.train.data.workers import Workers, prefetch
from mmfn.train.objective import count_labels
from mmfn.train.watch import Watch

DIGEST_PLACES = 256  # of the order of data, by which two are told apart
COUNTED = ("counted_samples", "counted_steps")  # in a checkpoint: so many steps take so many samples
CHECKED = "checked"  # in a checkpoint: all samples were prepared once, by settings of this digest
ALONE = Axis(name="batch")
Pack = Callable[[Sequence[Sample], Sizes], Batch]  # (samples, static sizes) -> batch; `Family.pack` of a config
Split = Callable[[Batch], Batch]


class Packed(NamedTuple):
    """What becomes of a job: micro-batches, what was left out, how many samples were cut, sizes of samples of the next
    window, and tokens by the kind of media they stand for (`IMAGE`, ...)."""

    microbatches: list[Batch]
    skips: tuple[Skip, ...] = ()
    num_cut: int = 0
    measured: dict[int, Size | Skip] = {}  # noqa: RUF012  # never written
    kinds: tuple[int, ...] = (0, 0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class Packer:
    """Job -> whole micro-batches. It can be sent to a process if its data set and `pack` can.

    `num_segments`: samples that a micro-batch has room for, so that its shapes depend on its buckets only.
    """

    reader: Reader
    pack: Pack
    num_segments: int

    def __call__(self, job: Job) -> "Packed":
        """The micro-batches of a job."""
        groups, skips, num_cut = [], list(job.skips), 0
        for places in (job.places,) if job.bins is None else job.bins:
            samples, left_out, cut = self.reader.read(list(places), job.sizes)
            groups += self.groups(samples) if job.bins is None else [samples]
            skips, num_cut = skips + left_out, num_cut + cut
        return Packed(
            microbatches=[self.pack_one(group) for group in groups or [[]]],
            skips=tuple(skips),
            num_cut=num_cut,
            measured=self.reader.measure(list(job.measure)),
            kinds=_count_kinds([sample for group in groups for sample in group]),
        )

    def groups(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """Samples in few groups that fit a micro-batch each; a group keeps their order.

        Best fit, the largest first: each goes where the least room for tokens is left. It needs at most 11/9 of the
        fewest groups. Source: Johnson 1973.
        """
        largest = self.reader.buckets.largest
        sizes = [self.reader.buckets.sizes(sample) for sample in samples]
        shares = [max(n / most for n, most in zip(size, largest, strict=True)) for size in sizes]
        groups: list[list[int]] = []
        rooms: list[tuple[int, ...]] = []
        for i in sorted(range(len(samples)), key=lambda i: -shares[i]):
            left = [tuple(have - need for have, need in zip(room, sizes[i], strict=True)) for room in rooms]
            group = min((g for g, room in enumerate(left) if min(room) >= 0), key=lambda g: left[g][0], default=-1)
            if group < 0:
                groups.append([i])
                rooms.append(tuple(have - need for have, need in zip(largest, sizes[i], strict=True)))
            else:
                groups[group].append(i)
                rooms[group] = left[group]
        return [[samples[i] for i in group] for group in sorted(sorted(group) for group in groups)]

    def pack_one(self, samples: Sequence[Sample]) -> Batch:
        """One micro-batch in the smallest buckets that hold the samples."""
        buckets = self.reader.buckets
        used = [sum(sizes) for sizes in zip(*map(buckets.sizes, samples), strict=True)] or [0] * len(buckets.largest)
        tokens, *units = map(_bucket, (buckets.tokens, *buckets.units.values()), used)
        return self.pack(
            samples,
            Sizes(
                tokens=tokens,
                segments=self.num_segments,
                units=dict(zip(buckets.units, units, strict=True)),
                segment_multiple=buckets.segment_multiple,
            ),
        )


def order_facts(dataset: Samples, seed: int) -> dict[str, int | str]:
    """What a place in the order of data depends on, whatever a step takes of it."""
    first = dataset.order(seed).rows(torch.arange(DIGEST_PLACES)).tolist()
    return {
        "data": " ".join(dataset.fingerprints),
        "samples": len(dataset),
        "seed": seed,
        "order": digest_of(first),  # weights of several data sets, and more
    }


class Loader:
    """Micro-batches of every step, packed to static sizes."""

    def __init__(
        self,
        dataset: Samples,
        pack: Pack,
        towers: Mapping[str, TowerKind],
        *,
        batch_samples: int | None = None,
        batch_tokens: int | None = None,
        window_samples: int | None = None,
        token_buckets: Sequence[int],
        tower_buckets: Mapping[str, Sequence[int]],
        seed: int,
        axis: Axis = ALONE,
        world: Axis | None = None,
        split: Split = whole_batch,
        segment_multiple: int = 1,
        max_tokens: int | None = None,
        rates: Rates | None = None,
        long_samples: LongPolicy = "skip",
        max_bad_share: float = 0.01,
        workers: Workers = Workers(number=0),  # noqa: B008  # frozen
        work: Work = NO_WORK,
    ) -> None:
        """A step has `batch_samples` samples, or as many as fill `batch_tokens` tokens; one of the two is given.

        `token_buckets` and, for each of the model's `towers`, `tower_buckets`: static sizes a micro-batch may take, in
        tokens and in inputs of the encoder. `window_samples`: samples that are packed together by tokens, by default as
        many as make a good plan. `pack`: the family's. `axis`: the ranks that divide the samples of a step; `world`:
        all ranks, by default these; `split`: a batch -> what this rank computes of it; `segment_multiple`: what samples
        are padded to; `max_tokens`: of a sample; `rates`: what samples cost, by default as much as they have tokens and
        rows. `long_samples`: see `Reader`. `max_bad_share`: the run ends when more is skipped. `work`: the model's.

        By tokens, ranks measure the first samples together here. Raises ValueError for an empty dataset, a step that
        ranks cannot divide, and buckets as `Buckets.of` does.
        """
        if len(dataset) == 0:
            raise UserError("the dataset is empty; it must hold at least one sample")
        buckets = Buckets.of(token_buckets, tower_buckets, towers, segment_multiple, max_tokens)
        reader = Reader(
            dataset=dataset,
            order=dataset.order(seed),
            buckets=buckets,
            rates=rates or Rates(decoder=Rate(), towers=dict.fromkeys(towers, Rate())),
            long_samples=long_samples,
        )
        self.reader, self.axis, self.world, self.work = reader, axis, world or axis, work
        self.split, self.seed = split, seed
        self.max_bad_share, self.workers, self._found = max_bad_share, workers, dict[str, int | str]()
        self.source: BySamples | ByTokens
        if batch_tokens is None:
            if batch_samples is None or batch_samples < axis.size:
                least = f"at least {axis.size}, one for each rank with its own data"
                raise UserError(f"batch_samples must be {least}, got {batch_samples}")
            self.source = BySamples(number=batch_samples, axis=axis)
            self.room = num_segments = -(-batch_samples // axis.size)
        else:
            num_bins = check_batch_tokens(batch_tokens, buckets.tokens[-1], axis.size)
            self.source = ByTokens(reader, axis, num_bins, window_samples, workers.number, seed)
            self.room = (num_segments := self.source.bins.segments) * num_bins // axis.size
        self.packer = Packer(reader=reader, pack=pack, num_segments=num_segments)

    @property
    def dataset(self) -> Samples:
        """What is read."""
        return self.reader.dataset

    @property
    def fingerprint(self) -> dict[str, int | str]:
        """What a cursor's meaning depends on: integers and strings. The number of ranks is not among it."""
        facts = order_facts(self.dataset, self.seed)
        if isinstance(self.source, BySamples):
            return {**facts, "batch_samples": self.source.number}
        bins, buckets = self.source.bins, self.reader.buckets
        return {
            **facts,
            "batch_tokens": bins.per_step * bins.sizes[0],
            "window_samples": self.source.window,
            "samples_per_microbatch": bins.segments,
            "largest_buckets": str(bins.sizes),
            "segment_multiple": buckets.segment_multiple,
            "max_tokens": str(buckets.max_tokens),
            "long_samples": self.reader.long_samples,
            "sizes": self.source.digest,  # of samples as this template and these budgets of media make them
            "costs": str(self.reader.rates),
        }

    def count_steps(self, epochs: int) -> int:
        """Steps that take as many samples as there are, so often; ranks count together.

        By tokens, all samples are measured, unless a checkpoint's state says how many (`has_counted`).
        """
        num_samples = epochs * len(self.dataset)
        if isinstance(self.source, BySamples):
            return self.source.count_steps(num_samples)
        if not self.has_counted(epochs):
            num_steps = self.source.count_steps(num_samples)
            self._found |= dict(zip(COUNTED, (num_samples, num_steps), strict=True))
        return int(self._found[COUNTED[1]])

    def has_counted(self, epochs: int) -> bool:
        """Whether it is known how many steps so many epochs take, as it is where a run by tokens goes on (`resume`)."""
        return self._found.get(COUNTED[0]) == epochs * len(self.dataset)

    def note_checked(self, digest: str) -> None:
        """Keep for checkpoints that all samples were prepared once (`data.check`), by settings of that digest."""
        self._found[CHECKED] = digest

    def has_checked(self, digest: str) -> bool:
        """Whether it is known that they were, by such settings, as it is where a run goes on (`resume`)."""
        return self._found.get(CHECKED) == digest

    def state(self, cursor: Cursor) -> State:
        """A cursor for a checkpoint: integers and strings."""
        return {**to_state(cursor, self.fingerprint), **self._found}

    def resume(self, state: State) -> Cursor:
        """The cursor of a checkpoint. Raises ValueError where data or settings were others.

        What was counted and checked of these data stays known, whether or not this run does it again.
        """
        cursor = from_state(state, self.fingerprint)
        self._found = {name: state[name] for name in (*COUNTED, CHECKED) if name in state} | self._found
        return cursor

    def steps(
        self, stop: int, cursor: Cursor | None = None, workers: Workers | None = None, watch: Watch | None = None
    ) -> Iterator[Agreed]:
        """Steps from a cursor on (default: the first) until `stop` of them are done, prepared ahead by workers.

        What the ranks have agreed on: they go through the steps together. Its `cursor` is where to go on behind it. Its
        cost does not depend on where the cursor is. What the `watch` of any rank is asked for, all have in `asked`; a
        rank that is asked to stop waits for its data no longer, so that behind a stop they may be missing.
        Raises ValueError when too many samples are bad (`check_share`).
        """
        before, workers = cursor or START, workers or self.workers
        num_steps = max(0, stop - before.step)
        jobs = islice(self.source.jobs(before, workers.lead), num_steps)
        empty = self.empty()
        shares = self._shares(jobs, workers, None if watch is None else lambda: not watch.is_stopping)
        for _ in range(num_steps):
            share = next(shares, empty)
            self.source.note(share.measured)
            agreed = agree(share, self.axis, empty, world=self.world, asked=watch.asked if watch else 0)
            before = with_counts(agreed.cursor, before, agreed.counts.samples, len(agreed.skips))
            yield replace(agreed, cursor=before)

    def check_share(self, agreed: Agreed) -> None:
        """Raise ValueError, on all ranks, where too many samples were skipped up to a step."""
        if agreed.skips:
            cursor = agreed.cursor
            check_share(agreed.skips, cursor.bad, cursor.seen, len(self.dataset), self.max_bad_share)

    def _shares(self, jobs: Iterator[Job], workers: Workers, is_wanted: Callable[[], bool] | None) -> Iterator[Share]:
        """Threads split batches for this rank as well; a split knows the mesh, which cannot be sent to a process."""
        if workers.number == 0 or workers.kind == "threads":
            yield from prefetch(self.make, jobs, workers, is_wanted)
            return
        sent: list[Cursor] = []

        def noted() -> Iterator[Job]:
            for job in jobs:
                sent.append(job.cursor)
                yield job

        for packed in prefetch(self.packer, noted(), workers, is_wanted):
            yield self._share(packed, cursor=sent.pop(0))

    def make(self, job: Job) -> Share:
        """This rank's micro-batches of a step, split for it, and their counts."""
        return self._share(self.packer(job), cursor=job.cursor)

    def indices(self, step: int) -> list[int]:
        """Dataset indices of step `step` (from 0) by samples, of all ranks. It may span the end of an epoch."""
        return self.reader.indices(self._by_samples().places(step))

    def own(self, step: int) -> list[int]:
        """Those of `indices` that are this rank's."""
        return self.indices(step)[self.axis.index :: self.axis.size]

    def microbatches(self, step: int) -> list[Batch]:
        """This rank's samples of a step by samples in few batches, padded to the smallest buckets they fit.

        A sample's `number` is its place in the order of data.
        """
        return self.packer(self._by_samples().job(step)).microbatches

    def share(self, step: int) -> Share:
        """`microbatches` split for this rank, with their counts. Ranks may have different numbers: see `agree`."""
        return self.make(self._by_samples().job(step))

    def empty(self) -> Share:
        """One micro-batch without samples, in the smallest buckets."""
        return self._share(Packed([self.packer.pack_one([])]), START)

    def pack(self, samples: Sequence[Sample]) -> list[Batch]:
        """Samples -> micro-batches, as in `microbatches`. Raises ValueError for one that fits none."""
        for sample in samples:
            if (excess := self.reader.buckets.excess(sample)) is not None:
                raise UserError(f"sample {sample.id!r} {excess}")
        return [self.packer.pack_one(group) for group in self.packer.groups(samples)]

    def _by_samples(self) -> BySamples:
        assert isinstance(self.source, BySamples), "steps by tokens follow from the ones before: use `steps`"
        return self.source

    def _share(self, packed: Packed, cursor: Cursor) -> Share:
        counts = replace(
            stats(packed.microbatches, self.work),
            cut=packed.num_cut,
            image_tokens=packed.kinds[IMAGE],
            video_tokens=packed.kinds[VIDEO],
            audio_tokens=packed.kinds[AUDIO],
        )
        return Share(
            microbatches=[self.split(b) for b in packed.microbatches],
            counts=counts,
            labels_AN=count_labels(packed.microbatches),
            room=self.room,
            skips=packed.skips,
            measured=packed.measured,
            cursor=cursor,
        )


def check_batch_tokens(batch_tokens: int, bucket: int, num_ranks: int) -> int:
    """The micro-batches of a step. Raises ValueError unless they are whole and equally many on all ranks."""
    least = bucket * num_ranks
    if batch_tokens <= 0 or batch_tokens % least:
        of_ranks = f" times the {num_ranks} ranks with their own data" if num_ranks > 1 else ""
        raise UserError(
            f"data.batch_tokens {batch_tokens} must be a multiple of {least}, the largest token bucket {bucket}"
            f"{of_ranks}; use {max(1, round(batch_tokens / least)) * least}"
        )
    return batch_tokens // bucket


def _bucket(buckets: Sequence[int], size: int) -> int:
    return next(bucket for bucket in buckets if bucket >= size)


def _count_kinds(samples: Sequence[Sample]) -> tuple[int, ...]:
    """Tokens of samples by kind."""
    empty_T = torch.zeros(0, dtype=torch.int64)
    return tuple(torch.cat([empty_T, *(s.kinds_T for s in samples)]).bincount(minlength=AUDIO + 1).tolist())
