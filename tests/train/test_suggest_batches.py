"""Sizes of batches for a data set: those that suit it, and those within settings that are given."""

import pytest

from mmfn.batch import AUDIO, IMAGE, TowerKind
from mmfn.train.commands.suggest import budgets_of, mean_tokens, samples_within, typical_tokens
from mmfn.train.survey.counts import Counts
from mmfn.train.survey.fill import BUDGETS, Fill
from mmfn.train.survey.given_batches import grown, limits_of, plan_within
from mmfn.train.survey.survey import Survey

TOWERS = {
    "vision": TowerKind(media=(IMAGE,), inputs=4, rows=4, features=1, values=6, matmul_rows=9),
    "audio": TowerKind(media=(AUDIO,), inputs=8, rows=4, features=1, values=5, matmul_rows=9),
}


def test_batches_within_given_towers() -> None:
    """A batch has room for one image of 4 units; longer samples, and those of more, are left out."""
    sizes = [{"tokens": 40, "vision": 4}, {"tokens": 20, "vision": 0}, {"tokens": 90, "vision": 0}] * 3
    plan = plan_within({"tokens": 64, "vision": 4})
    batches = plan([*sizes, {"tokens": 50, "vision": 8}], 128)
    assert {i for batch in batches for i in batch} <= {0, 1, 3, 4, 6, 7}
    assert len(batches) == 3
    assert all(sum(sizes[i]["vision"] for i in batch) <= 4 for batch in batches)
    assert plan([{"tokens": 50, "vision": 8}], 128) == []


def test_rows_that_are_less_than_a_given_bucket() -> None:
    """As many more as the data has, of what fits the bucket and given towers."""
    seen = Fill(budget=512, batches=1, tokens=500, samples=10, units={"vision": 40})
    large = grown(seen, 4096, {}, times=100.0)
    assert (large.budget, large.tokens, large.units) == (4096, 4096, {"vision": 328})
    assert grown(seen, 4096, {}, times=2.0).share == pytest.approx(1000 / 4096)
    assert grown(seen, 4096, {"vision": 4}, times=2.0).share == pytest.approx(50 / 4096)


def test_limits_of_some_towers() -> None:
    """Of towers without buckets a batch has as many units as it takes; a bucket of no tower is refused."""
    assert limits_of({"audio": [8, 16]}, TOWERS, longest=None, bucket=64) == ({"audio": 2}, (64,))
    assert limits_of({}, TOWERS, longest=64, bucket=None) == ({"tokens": 64}, BUDGETS)
    assert limits_of({}, {}, longest=2**20, bucket=None) == ({"tokens": 2**20}, (2**20,))
    with pytest.raises(ValueError, match="the model's towers are vision, audio; remove 'sight'"):
        limits_of({"sight": [16]}, TOWERS, longest=None, bucket=64)
    with pytest.raises(ValueError, match="tower_buckets of 'audio' must be multiples of 8"):
        limits_of({"audio": [12]}, TOWERS, longest=None, bucket=64)


def test_batches_suit_the_data() -> None:
    """Of sizes that the samples fit, those of which an epoch has enough steps; the smallest where none has."""
    counts = Counts(rows=1000)
    counts.tokens.update({500: 900, 3000: 100})
    fills = [
        Fill(budget=2048, batches=9, tokens=9 * 2000, samples=900, too_long=100, units={"vision": 300}),
        Fill(budget=4096, batches=9, tokens=9 * 4000, samples=1000, units={"vision": 600}),
        Fill(budget=8192, batches=9, tokens=9 * 8100, samples=1000, units={"vision": 1000}),
        Fill(budget=16_384, batches=9, tokens=9 * 16_300, samples=1000, units={"vision": 2000}),
        Fill(budget=32_768),
    ]
    seen = Survey(counts=counts, fills=fills, inputs={"vision": 4})
    assert (mean_tokens(seen), typical_tokens(seen)) == (750, 1500)
    assert [b.tokens for b in budgets_of(seen, 1_000_000, world=16)] == [4096, 8192, 16_384]
    assert [b.tokens for b in budgets_of(seen, 5_000, world=16)] == [4096]
    assert [b.tokens for b in budgets_of(seen, 10_000, world=1)] == [4096, 8192, 16_384]
    (first, *_) = budgets_of(seen, 10_000, world=1)
    assert first.towers == {"vision": 640 * 4}
    assert first.fill == pytest.approx(4000 / 4096)
    with pytest.raises(ValueError, match="the data has no sample that can be used; see mmfn data check"):
        budgets_of(Survey(counts=Counts(), fills=[Fill(budget=64)]), 10, world=1)


def test_samples_that_are_too_long_do_not_count() -> None:
    """Neither for the length that is planned with nor for the tokens of a step."""
    counts = Counts(rows=8)
    counts.tokens.update({100: 4, 64_000: 4})
    seen = Survey(counts=counts)
    within = samples_within(seen, 100)
    assert (mean_tokens(within), typical_tokens(within), within.counts.skipped) == (50, 100, 4)
    assert samples_within(seen, None).counts == samples_within(seen, 64_000).counts == counts
