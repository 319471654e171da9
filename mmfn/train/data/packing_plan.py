"""`plan_window`: which samples are computed together. A pure function of sizes: nothing here reads data or knows ranks.

A window is a range of samples in the order of data. Those at its beginning are laid into bins, each one micro-batch, so
that all bins are equally full of tokens *and* cost every encoder the same; as many bins as make a step are a step.
Legend: W samples, D sizes (tokens, then units of each tower), E loads (the same, as shares of a bin), B bins of each of
G groups.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mmfn import rng

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
FILLS = (1.0, 0.998, 0.995, 0.99, 0.985, 0.98, 0.97, 0.95, 0.92, 0.88, 0.8, 0.7, 0.6, 0.5, 0.35, 0.2, 0.1, 0.0)
"""How full of samples the bins of a window shall be, tried in this order."""
GROUP_BINS = 64  # bins that are looked at for a sample, at least; with more of them the look itself takes time


@dataclass(frozen=True, kw_only=True)
class Bins:
    """What a micro-batch holds at most: `sizes`, tokens and then units of each tower, and `segments`, samples.

    `per_step`: so many are a step, over all ranks.
    """

    sizes: tuple[int, ...]
    segments: int
    per_step: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`steps[s][b]`: the samples of bin b of step s, by their number in the window, ascending.

    `num_samples`: so many of the window are in it, from the first on; the next window begins behind them.
    """

    num_samples: int
    steps: tuple[tuple[tuple[int, ...], ...], ...]


def num_steps(sizes_WD: Ints, bins: Bins) -> float:
    """How many steps samples fill if none has a gap: what is scarcest decides."""
    return float((sizes_WD.sum(0) / np.array(bins.sizes)).max()) / bins.per_step


def plan_window(sizes_WD: Ints, costs_WE: Floats, bins: Bins, seed: int, start: int) -> Plan:
    """Whole steps of equal bins, from the first samples of a window.

    `sizes_WD`: int64, tokens and units of each tower of every sample, all zero for one that is left out. `costs_WE`:
    float64, what it costs each tower. `seed` and `start`, the place of the window in the order of data, decide which
    step comes first. Each sample must fit a bin. The samples are the longest beginning of the window that was found to
    fit whole steps, so that no step is begun and left; of less than one step all.

    Steps are made of bins that cost the encoders alike, so that ranks wait for none: the bins of a window differ little
    to begin with.

    >>> sizes = np.array([[60], [50], [40], [50], [10]])
    >>> plan_window(sizes, np.zeros((5, 0)), Bins(sizes=(100,), segments=4, per_step=2), 0, 0)
    Plan(num_samples=4, steps=(((0, 2), (1, 3)),))
    """
    shares_W = (sizes_WD / np.array(bins.sizes)).cumsum(0).max(1)
    num_bins = max(1, int(num_steps(sizes_WD, bins))) * bins.per_step
    for fill in FILLS:
        num = max(1, int(np.searchsorted(shares_W, num_bins * fill, side="right")))
        bin_W = _fill(sizes_WD[:num], costs_WE[:num], bins, num_bins)
        if bin_W is not None:
            break
    else:
        raise AssertionError("a sample does not fit a bin")
    return Plan(num_samples=num, steps=_steps(bin_W, costs_WE[:num].sum(1), bins.per_step, num_bins, seed, start))


def _fill(sizes_WD: Ints, costs_WE: Floats, bins: Bins, num_bins: int) -> Ints | None:
    """The bin of each sample, -1 of one without tokens; None where some were left over.

    The largest first, each to the bin which it then makes the least of its loads, the largest of them counting.
    """
    loads_WE = np.concatenate([sizes_WD[:, :1] / bins.sizes[0], _shares(costs_WE, num_bins)], 1)
    used = np.flatnonzero(sizes_WD[:, 0])
    order = used[np.argsort(-loads_WE[used].max(1), kind="stable")]
    rooms = _Rooms.empty(bins, num_bins, loads_WE.shape[1])
    bin_W = np.full(len(sizes_WD), -1)
    groups = rooms.num_groups
    for first in range(0, len(order), groups):  # a sample for each group of bins at a time
        some = order[first : first + groups]
        bin_W[some] = rooms.put(sizes_WD[some], loads_WE[some])
    rest = order[bin_W[order] < 0]
    rooms = rooms.as_one()
    for i in rest:
        bin_W[i] = rooms.put(sizes_WD[i : i + 1], loads_WE[i : i + 1])[0]
        if bin_W[i] < 0:
            return None
    return bin_W


def _shares(costs_WE: Floats, num_bins: int) -> Floats:
    """Costs as shares of what a bin costs each tower on average."""
    shares_WE: Floats = costs_WE * (num_bins / np.maximum(costs_WE.sum(0), 1e-30))
    return shares_WE


@dataclass
class _Rooms:
    """Bins in groups: `room_DGB`, tokens, units and samples that still fit; `load_EGB`, what is in them."""

    room_DGB: Ints
    load_EGB: Floats

    @staticmethod
    def empty(bins: Bins, num_bins: int, num_loads: int) -> "_Rooms":
        groups = max(1, num_bins // GROUP_BINS)
        width = -(-num_bins // groups)
        room_DK = np.zeros((len(bins.sizes) + 1, groups * width), dtype=np.int64)
        room_DK[:, :num_bins] = np.array([*bins.sizes, bins.segments])[:, None]
        # bin k lies in group k % groups, so that the places that are no bins are spread over groups
        return _Rooms(
            np.ascontiguousarray(room_DK.reshape(-1, width, groups).swapaxes(1, 2)),
            np.zeros((num_loads, groups, width)),
        )

    @property
    def num_groups(self) -> int:
        return int(self.room_DGB.shape[1])

    def as_one(self) -> "_Rooms":
        """The same bins, in the order of their numbers, in one group."""
        room_D1K = self.room_DGB.swapaxes(1, 2).reshape(len(self.room_DGB), 1, -1)
        return _Rooms(room_D1K, self.load_EGB.swapaxes(1, 2).reshape(len(self.load_EGB), 1, -1))

    def put(self, sizes_GD: Ints, loads_GE: Floats) -> Ints:
        """Put sample g into a bin of group g; the number of each bin, -1 for a sample that fits none of them."""
        num, groups = len(sizes_GD), self.num_groups
        need_DG1 = np.concatenate([sizes_GD, np.ones((num, 1), dtype=np.int64)], 1).T[:, :, None]
        load_EG1 = loads_GE.T[:, :, None]
        fits_GB = np.logical_and.reduce(self.room_DGB[:, :num] >= need_DG1)
        # a tower that reads nothing of a sample has no say in where it goes
        after_GB = np.where(load_EG1 > 0, self.load_EGB[:, :num] + load_EG1, 0.0).max(0)
        best_G = np.where(fits_GB, after_GB, np.inf).argmin(1)
        g = np.flatnonzero(fits_GB[np.arange(num), best_G])
        b = best_G[g]
        self.room_DGB[:, g, b] -= need_DG1[:, g, 0]
        self.load_EGB[:, g, b] += load_EG1[:, g, 0]
        found = np.full(num, -1)
        found[g] = b * groups + g
        return found


def _steps(
    bin_W: Ints, cost_W: Floats, per_step: int, num_bins: int, seed: int, start: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Bins of neighbouring cost make a step; steps come in an order drawn for the window."""
    used = np.flatnonzero(bin_W >= 0)
    by_bin = used[np.argsort(bin_W[used], kind="stable")]
    counts_K = np.bincount(bin_W[used], minlength=num_bins)
    samples = [tuple(part.tolist()) for part in np.split(by_bin, counts_K.cumsum()[:-1])]
    cost_K = np.bincount(bin_W[used], weights=cost_W[used], minlength=num_bins)
    order = np.argsort(cost_K, kind="stable").reshape(-1, per_step)
    drawn = rng.permutation(len(order), seed, "steps of the window from", start)
    return tuple(tuple(samples[k] for k in sorted(order[s])) for s in drawn)
