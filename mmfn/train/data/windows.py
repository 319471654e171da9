"""Jobs of steps: which samples a rank reads for each, by a number of samples or by a budget of tokens.

Both are pure functions of the order of data, the settings and the cursor. A budget of tokens needs the sizes of samples
before they are read: the ranks measure a window of them together, and plan it each for itself, alike.
Legend: W samples, D sizes (tokens, then units of each tower), or what decoder and towers cost.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from mmfn.balance import spread_by_cost
from mmfn.errors import UserError
from mmfn.parallel.mesh.axis import Axis
from mmfn.train.data.agree import gather_sizes, gather_skips
from mmfn.train.data.cursor import Cursor, digest_of
from mmfn.train.data.packing_plan import Bins, Floats, Ints, Plan, num_steps, plan_window
from mmfn.train.data.reader import Reader
from mmfn.train.data.sizes import Size
from mmfn.train.data.skips import Skip

PROBE = 256  # samples whose mean length says how many a window and a micro-batch need
WINDOW_STEPS, WINDOW_SAMPLES = 4, 640  # a window has at least so many of both: enough to choose from


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a rank reads for one step.

    `bins`: places of the samples of each micro-batch; None: `places` are packed as they fit. `sizes`: what was measured
    of each place. `skips`: found while the
    window was measured. `measure`: places of the next window. `cursor`: behind the step.
    """

    places: tuple[int, ...]
    bins: tuple[tuple[int, ...], ...] | None = None
    sizes: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    skips: tuple[Skip, ...] = ()
    measure: tuple[int, ...] = ()
    cursor: Cursor


@dataclass(frozen=True, kw_only=True)
class BySamples:
    """Steps of `number` samples: step s takes places [s * number, (s + 1) * number), rank i of n every n-th of them."""

    number: int
    axis: Axis

    def places(self, step: int) -> range:
        """Places of a step, of all ranks. Raises ValueError for a negative one."""
        if step < 0:
            raise UserError(f"step must not be negative, got {step}")
        return range(step * self.number, (step + 1) * self.number)

    def job(self, step: int) -> Job:
        """Of step `step`, from 0."""
        own = tuple(self.places(step)[self.axis.index :: self.axis.size])
        return Job(places=own, cursor=Cursor(step=step + 1, place=(step + 1) * self.number))

    def count_steps(self, num_samples: int) -> int:
        """Steps that take so many samples, the last of them maybe some more."""
        return -(-num_samples // self.number)

    def jobs(self, cursor: Cursor, lead: int) -> Iterator[Job]:
        """Jobs from a cursor on, without end."""
        step = cursor.step
        while True:
            yield self.job(step)
            step += 1

    def note(self, measured: Mapping[int, Size | Skip]) -> None:
        """Nothing is measured."""


@dataclass(frozen=True, kw_only=True)
class _Window:
    """A planned window. `sizes_WD` and `costs_W`: of its samples."""

    plan: Plan
    start: int
    sizes_WD: Ints
    costs_W: Floats
    skips: tuple[Skip, ...]

    @property
    def end(self) -> int:
        return self.start + self.plan.num_samples


class ByTokens:
    """Steps of full bins, planned window by window. Ranks take part in the same collectives, in the caller's thread."""

    def __init__(
        self, reader: Reader, axis: Axis, bins_per_step: int, window: int | None, num_threads: int, seed: int
    ) -> None:
        """Measures the first samples, to find how many a window (default) and a micro-batch need."""
        self.reader, self.axis, self.seed = reader, axis, seed
        self._num_threads = max(1, num_threads)
        self._measured: dict[int, Size | Skip] = {}  # of this rank's places
        size = len(reader.dataset)
        sizes_WD, _, _ = self._sizes(0, min(PROBE, size))
        first = [tuple(row) if row[0] >= 0 else None for row in sizes_WD.tolist()]
        self.digest = digest_of(first)
        tokens = [sizes[0] for sizes in first if sizes is not None]
        if not tokens:
            raise UserError(f"none of the first {len(first)} samples can be used; run `mmfn data check` on the file")
        bucket, mean = reader.buckets.largest[0], sum(tokens) / len(tokens)
        per_step = bins_per_step * bucket / mean
        default = max(min(max(WINDOW_STEPS * per_step, WINDOW_SAMPLES), size), 2 * per_step)
        self.window = math.ceil(default) if window is None else window
        # twice as many samples as an average micro-batch has
        self.bins = Bins(sizes=reader.buckets.largest, segments=int(2 * bucket // mean) + 1, per_step=bins_per_step)

    def jobs(self, cursor: Cursor, lead: int) -> Iterator[Job]:
        """Jobs from a cursor on, without end. `lead`: how many of them are taken before the first is done.

        Those of a window bring the measuring of the next one along, so that no step waits for it.
        """
        step, start, first = cursor.step, cursor.place, cursor.window_step
        while True:
            window = self._plan(start)
            num = len(window.plan.steps)
            following = self._own(window.end, self.window)
            part = -(-len(following) // max(1, num - first - lead))
            for i in range(first, num):
                step += 1
                measure = following[(i - first) * part : (i - first + 1) * part]
                is_last = i + 1 == num
                behind = (
                    Cursor(step=step, place=window.end)
                    if is_last
                    else Cursor(step=step, place=start, window_step=i + 1)
                )
                yield self._job(window, i, tuple(measure), behind)
            start, first = window.end, 0

    def count_steps(self, num_samples: int) -> int:
        """Steps that take so many samples, or leave them out: all are measured, and window by window forgotten."""
        start = steps = num_taken = 0
        while True:
            window = self._plan(start)
            num_taken += len(window.skips)
            for bins in window.plan.steps:
                if num_taken >= num_samples:
                    return steps
                steps, num_taken = steps + 1, num_taken + sum(map(len, bins))
            start = window.end

    def note(self, measured: Mapping[int, Size | Skip]) -> None:
        """Keep what workers have measured for the next window."""
        self._measured.update(measured)

    def _job(self, window: _Window, i: int, measure: tuple[int, ...], cursor: Cursor) -> Job:
        bins = window.plan.steps[i]
        costs = [float(window.costs_W[list(samples)].sum()) for samples in bins]
        # equally many for each rank, which divide bins; a rank computes its dearest first, as the others do theirs
        own = spread_by_cost(costs, self.axis.size, room=len(bins) // self.axis.size)[self.axis.index]
        places = [tuple(window.start + sample for sample in bins[b]) for b in own]
        sizes = {place: tuple(window.sizes_WD[place - window.start].tolist()) for group in places for place in group}
        says_skips = i == 0 and self.axis.index == 0
        return Job(
            places=tuple(place for group in places for place in group),
            bins=tuple(places),
            sizes=sizes,
            skips=window.skips if says_skips else (),
            measure=measure,
            cursor=cursor,
        )

    def _own(self, start: int, number: int) -> range:
        return range(start + self.axis.index, start + number, self.axis.size)

    def _plan(self, start: int) -> _Window:
        """The plan of the window from a place on: as many samples as it has, or as a step takes."""
        self._measured = {place: size for place, size in self._measured.items() if place >= start}
        sizes_WD = costs_WD = np.zeros((0, len(self.bins.sizes)), dtype=np.int64)
        skips: list[Skip] = []
        while True:
            more_WD, cost_more_WD, left_out = self._sizes(start + len(sizes_WD), self.window)
            # what is left out has no tokens and costs nothing
            sizes_WD = np.append(sizes_WD, more_WD.clip(0), 0)
            costs_WD = np.append(costs_WD, cost_more_WD.clip(0), 0)
            skips += left_out
            if num_steps(sizes_WD, self.bins) >= 1:
                break
            if len(sizes_WD) >= len(self.reader.dataset) and not sizes_WD.any():
                raise UserError(f"none of {len(sizes_WD)} samples can be used, among them {skips[0]}")
        flops_WD = costs_WD.astype(np.float64)
        plan = plan_window(sizes_WD, flops_WD[:, 1:], self.bins, self.seed, start)
        inside = tuple(skip for skip in skips if skip.place < start + plan.num_samples)
        return _Window(plan=plan, start=start, sizes_WD=sizes_WD, costs_W=flops_WD.sum(1), skips=inside)

    def _sizes(self, start: int, number: int) -> tuple[Ints, Ints, list[Skip]]:
        """sizes_WD and costs_WD of so many samples from a place on, of all ranks; -1 of those that are left out."""
        own = list(self._own(start, number))
        absent = [place for place in own if place not in self._measured]
        for measured in self._measure(absent):
            self._measured.update(measured)
        values = [self._measured[place] for place in own]
        skips = [value for value in values if isinstance(value, Skip)]
        sizes = [None if isinstance(value, Skip) else value for value in values]
        sizes_WD, costs_WD = gather_sizes(sizes, len(self.reader.buckets.largest), self.axis)
        sizes_WD, costs_WD = sizes_WD[:number], costs_WD[:number]
        has_skips = bool((sizes_WD[:, 0] < 0).any())
        return sizes_WD, costs_WD, list(gather_skips(skips, self.axis)) if has_skips else []

    def _measure(self, places: Sequence[int]) -> list[dict[int, Size | Skip]]:
        parts = [list(places[i :: self._num_threads]) for i in range(self._num_threads)]
        if self._num_threads == 1:
            return [self.reader.measure(parts[0])]
        with ThreadPoolExecutor(max_workers=self._num_threads, thread_name_prefix="mmfn-measure") as pool:
            return list(pool.map(self.reader.measure, parts))


def with_counts(cursor: Cursor, before: Cursor, num_samples: int, num_skips: int) -> Cursor:
    """A cursor that counts on from the one before it."""
    return replace(cursor, seen=before.seen + num_samples + num_skips, bad=before.bad + num_skips)
