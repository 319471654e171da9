"""What ranks tell each other of sizes, and what a window's plan is told of them."""

from typing import Any

import numpy as np
import pytest

from mmfn.parallel.mesh.layout import Layout
from mmfn.parallel.mesh.virtual import virtual
from mmfn.train.data.agree import gather_sizes
from mmfn.train.data.cursor import digest_of
from mmfn.train.data.sizes import Size
from mmfn.train.data.windows import PROBE, ByTokens
from tests.train.data.order_cases import Data, make_loader

EXACT = 2**62 + 1  # no float64


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("number", [1, 5, 6])
def test_sizes_come_back_in_order(num_ranks: int, number: int) -> None:
    """Also where ranks have measured different numbers of samples, and where one has no good sample."""
    values = [None if i % 3 == 1 else Size(sizes=(i, 0), costs=(EXACT + i, 7 * i)) for i in range(number)]

    def on_rank(mesh: Any) -> Any:
        axis = mesh["batch"]
        return gather_sizes(values[axis.index :: axis.size], 2, axis)

    for sizes_WD, costs_WD in virtual(Layout(dp=num_ranks), on_rank):
        assert sizes_WD.dtype == costs_WD.dtype == np.int64
        assert sizes_WD[:number].tolist() == [[-1, -1] if value is None else [*value.sizes] for value in values]
        assert costs_WD[:number].tolist() == [[-1, -1] if value is None else [*value.costs] for value in values]
        assert (sizes_WD[number:] == -1).all()


def test_nothing_good_on_any_rank_and_nothing_at_all() -> None:
    for own, num in (([None, None], 2), ([], 0)):
        for sizes_WD, costs_WD in virtual(Layout(dp=2), lambda mesh, own=own: gather_sizes(own, 3, mesh["batch"])):
            assert sizes_WD.tolist() == costs_WD.tolist() == [[-1] * 3] * (2 * num)


def test_a_cursor_is_bound_to_sizes_as_ever() -> None:
    """What saved cursors hold: the digest of tuples of integers, None for what is left out."""
    loader = make_loader("tokens")
    assert isinstance(loader.source, ByTokens)
    places = list(range(min(PROBE, len(loader.dataset))))
    measured = loader.reader.measure(places)
    sizes = [found.sizes if isinstance(found := measured[place], Size) else None for place in places]
    assert None in sizes
    assert loader.source.digest == digest_of(sizes) == "9309b9b3df38"


def test_what_is_left_out_takes_nothing_and_costs_nothing() -> None:
    """In a window of several measurements, since none of them fills a step."""
    loader = make_loader("tokens", window_samples=2, dataset=Data())
    assert isinstance(loader.source, ByTokens)
    window = loader.source._plan(0)
    assert len(window.sizes_WD) >= window.plan.num_samples > 2
    measured = loader.reader.measure(list(range(len(window.sizes_WD))))
    for place, found in measured.items():
        sizes, cost = (found.sizes, sum(found.costs)) if isinstance(found, Size) else ((0, 0), 0)
        assert (tuple(window.sizes_WD[place]), window.costs_W[place]) == (sizes, cost)
