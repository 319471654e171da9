"""Plans of windows: what every plan must be, the best there is on small cases, how good they are on real lengths."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest

from mmfn.balance import spread_by_cost
from mmfn.train.data.packing_plan import Bins, num_steps, plan_window


def llava_like(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens and vision units, cost of vision) of samples as those of LLaVA-like mixtures.

    Text is log-normal: a median of 200 tokens beside an image (one of 256 to 1,280 tokens), of 400 in the tenth that is
    text alone. Vision attends within the image.
    """
    draw = np.random.default_rng(seed)
    has_image = draw.random(size) >= 0.1
    units = np.where(has_image, draw.integers(256, 1281, size), 0)
    text = np.exp(draw.normal(np.where(has_image, 5.3, 6.0), np.where(has_image, 0.9, 1.0))).astype(np.int64) + 20
    rows = 4 * units.astype(np.float64)
    sizes = np.stack([np.minimum(text, 6000) + units + 2 * has_image, units], 1)
    return sizes, (rows * (rows + 6144))[:, None]


def check(plan, sizes, bins):
    """What holds for every plan: it has its first samples once each, and no bin holds too much."""
    places = Counter(place for step in plan.steps for group in step for place in group)
    assert places == Counter(np.flatnonzero(sizes[: plan.num_samples, 0]).tolist())
    for step in plan.steps:
        assert len(step) == bins.per_step
        for group in step:
            assert list(group) == sorted(group)
            assert len(group) <= bins.segments
            assert (sizes[list(group)].sum(0) <= bins.sizes).all()


@pytest.mark.parametrize("seed", range(60))
def test_plans_of_anything_are_valid(seed):
    draw = np.random.default_rng(seed)
    num_towers = int(draw.integers(0, 3))
    caps = tuple(int(draw.integers(20, 200)) for _ in range(1 + num_towers))
    bins = Bins(sizes=caps, segments=int(draw.integers(1, 9)), per_step=int(draw.integers(1, 5)))
    sizes = np.stack([draw.integers(low, cap + 1, 200) for low, cap in zip((1, 0, 0), caps, strict=False)], 1)
    sizes[draw.random(200) < 0.1] = 0  # left out
    plan = plan_window(sizes, sizes[:, 1:].astype(np.float64), bins, 0, 0)
    check(plan, sizes, bins)
    assert len(plan.steps) == max(1, int(num_steps(sizes, bins)))
    assert plan == plan_window(sizes.copy(), sizes[:, 1:].astype(np.float64), bins, 0, 0)


def fits(sizes, bins, num_bins):
    """Whether all samples fit so many bins, by trying everything."""
    room = np.zeros((num_bins, sizes.shape[1]), dtype=np.int64)
    counts = [0] * num_bins

    def place(i):
        if i == len(sizes):
            return True
        for k in range(num_bins):
            if counts[k] < bins.segments and (room[k] + sizes[i] <= bins.sizes).all():
                room[k] += sizes[i]
                counts[k] += 1
                if place(i + 1):
                    return True
                room[k] -= sizes[i]
                counts[k] -= 1
            if counts[k] == 0:  # empty bins are alike
                break
        return False

    return place(0)


@pytest.mark.parametrize("seed", range(40))
def test_close_to_the_best_there_is(seed):
    """A plan takes at most what fits, and what it leaves of that is less than what two bins hold on average."""
    draw = np.random.default_rng(100 + seed)
    sizes = np.stack([draw.integers(5, 60, 14), draw.integers(0, 40, 14)], 1)
    bins = Bins(sizes=(100, 80), segments=5, per_step=2)
    plan = plan_window(sizes, sizes[:, 1:].astype(np.float64), bins, 0, 0)
    check(plan, sizes, bins)
    num_bins = len(plan.steps) * 2
    best = max(n for n in range(1, 15) if fits(sizes[:n], bins, num_bins))
    assert best - 14 * 2 / num_bins <= plan.num_samples <= best


def test_exact_cases():
    sizes = np.array([[60], [50], [40], [50], [10]])
    plan = plan_window(sizes, np.zeros((5, 0)), Bins(sizes=(100,), segments=4, per_step=2), 0, 0)
    assert (plan.num_samples, plan.steps) == (4, (((0, 2), (1, 3)),))
    # equal fill could put both costly samples into one bin
    sizes, costs = np.array([[50], [50], [50], [50]]), np.array([[9.0], [9.0], [0.0], [0.0]])
    plan = plan_window(sizes, costs, Bins(sizes=(100,), segments=4, per_step=2), 0, 0)
    assert sorted(len({0, 1} & set(group)) for group in plan.steps[0]) == [1, 1]
    # the order of steps is drawn for each window
    sizes, costs = llava_like(2000, 0)
    bins = Bins(sizes=(8192, 8192), segments=40, per_step=8)
    one, other = (plan_window(sizes, costs, bins, 0, start).steps for start in (0, 5))
    assert one != other
    assert sorted(one) == sorted(other)


@pytest.mark.parametrize(("bucket", "least", "window"), [(8192, 0.97, 640), (32768, 0.99, 4 * 8 * 32768 // 850)])
@pytest.mark.parametrize("seed", range(5))
def test_real_lengths_fill_bins_and_cost_ranks_alike(bucket, least, window, seed):
    """Eight ranks with one micro-batch each, in the smallest window there is by default."""
    sizes, costs = llava_like(window, seed)
    bins = Bins(sizes=(bucket, bucket), segments=bucket // 300, per_step=8)
    plan = plan_window(sizes, costs, bins, seed, 0)
    check(plan, sizes, bins)
    assert len(plan.steps) >= 4
    assert sizes[: plan.num_samples, 0].sum() / (len(plan.steps) * 8 * bucket) >= least
    loads = [[costs[list(group)].sum() for group in step] for step in plan.steps]
    ratios = [max(load) / np.mean(load) for load in loads]
    assert np.mean(ratios) <= 1.05
    # as they come, ranks differ by far more
    assert np.mean([costs[i : i + 10].sum() for i in range(0, 400, 10)]) * 1.2 < max(
        costs[i : i + 10].sum() for i in range(0, 400, 10)
    )


def test_time_grows_with_the_window_and_not_with_its_square():
    """100,000 samples for 256 ranks; measured 0.3 s."""
    bins, seconds = Bins(sizes=(8192, 8192), segments=40, per_step=256), []
    for num_samples in (25_000, 100_000):
        sizes, costs = llava_like(num_samples, 0)
        times = []
        for _ in range(3):
            start = time.process_time()
            plan = plan_window(sizes, costs, bins, 0, 0)
            times.append(time.process_time() - start)
        seconds.append(min(times))
    assert seconds[1] < 8 * seconds[0]  # 4 where linear, 16 where squared
    assert sizes[: plan.num_samples, 0].sum() / (len(plan.steps) * 256 * 8192) > 0.97
    loads = [[costs[list(group)].sum() for group in step] for step in plan.steps]
    assert np.mean([max(load) / np.mean(load) for load in loads]) < 1.01


@pytest.mark.parametrize("seed", range(20))
def test_ranks_get_equally_many_bins_of_like_cost(seed):
    draw = np.random.default_rng(seed)
    costs = (draw.random(6) * 9 + 1).tolist()
    ranks = spread_by_cost(costs, 3, room=2)
    assert sorted(itertools.chain(*ranks)) == list(range(6))
    assert [len(rank) for rank in ranks] == [2, 2, 2]
    best = min(
        max(sum(costs[i] for i in order[k : k + 2]) for k in (0, 2, 4)) for order in itertools.permutations(range(6))
    )
    assert max(sum(costs[i] for i in rank) for rank in ranks) <= 4 / 3 * best
