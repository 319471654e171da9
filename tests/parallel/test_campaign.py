"""The random campaign: 160 combinations of family, layout, transforms, objective, optimizer and precision, by seed.

`make test` runs the first eight. A combination that fails is reproduced by its number: `check(draw(17))`.
"""

from collections import Counter

import pytest

from tests import tiny
from tests.parallel.campaign import check
from tests.parallel.campaign_draws import draw

NUM, FAST = 160, 8
SEEDS = [pytest.param(seed, marks=() if seed < FAST else pytest.mark.slow) for seed in range(NUM)]


@pytest.mark.parametrize("seed", SEEDS)
def test_combination(seed: int) -> None:
    check(draw(seed))


def test_everything_is_drawn_often() -> None:
    """Each value of each choice, and in pairs with every family."""
    cases = [draw(seed) for seed in range(NUM)]
    for name, least in (
        *(("kind", 8), ("remat", 5), ("head", 20), ("gathered", 20), ("ties", 10), ("trained", 5), ("objective", 15)),
        *(("z_loss", 20), ("smoothing", 20), ("optimizer", 8), ("dtype", 5), ("micro_batches", 20), ("offload", 8)),
    ):
        drawn = Counter(getattr(case, name) for case in cases)
        assert min(drawn.values()) >= least, (name, drawn)
    assert {case.trained for case in cases} == set(tiny.TRAINED)
    assert len({str(case.layout) for case in cases}) >= 25
    assert Counter(case.layout.world > 1 for case in cases)[True] >= 120
    assert {case.family for case in cases} == {name for name in tiny.TINY if name != "small"}
