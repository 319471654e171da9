"""Orders of data: shares are exact in every block, each row comes once per epoch, any start gives the same."""

import pytest
import torch

from mmfn.errors import UserError
from mmfn.train.data.sources.mixing import MAX_BLOCK, Epochs, Mixture, shares


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1], [1]),
        ([2, 2, 2], [1, 1, 1]),
        ([0.75, 0.25], [3, 1]),
        ([0.7, 0.2, 0.1], [7, 2, 1]),
        ([1, 2, 3.5], [2, 4, 7]),
        ([1, 2**0.5], [4142, 5858]),
        ([1 / 3, 1 / 3, 1 / 3 + 1e-7], [3333, 3333, 3334]),
        ([0.9999, 0.0001], [9999, 1]),
    ],
)
def test_shares(weights: list[float], expected: list[int]) -> None:
    assert shares(weights) == expected


def test_shares_are_as_near_as_whole_numbers_can_be() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        weights = torch.rand(7, generator=generator, dtype=torch.float64) + 0.01
        counts = shares(weights.tolist())
        block = sum(counts)
        assert block <= MAX_BLOCK
        assert (torch.tensor(counts) - weights / weights.sum() * block).abs().max() < 1


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"weight 1e-05 of data set 1 is less than one sample in 10000; raise"):
        shares([1.0, 1e-5])


def test_epochs_hold_every_row_once() -> None:
    order = Epochs(10, 3)
    rows = order.rows(torch.arange(40)).view(4, 10)
    assert torch.equal(rows.sort(dim=1).values, torch.arange(10).expand(4, 10))
    assert rows.unique(dim=0).shape[0] == 4


def test_a_mixture_has_exact_shares_and_epochs() -> None:
    sizes, weights = [5, 7, 100], [0.5, 0.2, 0.3]
    order = Mixture(sizes, weights, 1)
    assert order.counts == [5, 2, 3]
    rows = order.rows(torch.arange(10 * 2100))
    sources = torch.bucketize(rows, torch.tensor([5, 12, 112]), right=True)
    for source, (count, size, first) in enumerate(zip(order.counts, sizes, [0, 5, 12], strict=True)):
        is_its = sources == source
        assert (is_its.view(-1, 10).sum(1) == count).all()
        epochs = (rows[is_its] - first).view(3, -1)  # 700 blocks hold whole epochs of all three
        for epoch in epochs:
            assert (epoch.bincount(minlength=size) == 700 * count // size).all()
    patterns = sources.view(-1, 10).unique(dim=0)
    assert len(patterns) > 1000  # of 2520: the order in a block is drawn anew


def test_any_start_gives_the_same_order() -> None:
    order = Mixture([50, 3, 1000], [1, 2**0.5, 1], 9)
    places = torch.arange(30_000)
    rows = order.rows(places)
    again = Mixture([50, 3, 1000], [1, 2**0.5, 1], 9)
    for start, stop in ((29_999, 30_000), (12_345, 12_400), (9_990, 20_010)):
        assert torch.equal(again.rows(places[start:stop]), rows[start:stop])
    assert not torch.equal(Mixture([50, 3, 1000], [1, 2**0.5, 1], 8).rows(places), rows)
    shuffled = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(order.rows(shuffled), rows[shuffled])
    assert order.rows(torch.tensor([10**12])).numel() == 1
