"""Items over ranks by cost: the rule, item by item."""

import random

import pytest

from mmfn.balance import spread_by_cost


def check(ranks: list[list[int]], costs: list[float], room: int | None) -> None:
    """In order of cost, then of number, each item lies on the first of the ranks that had the least, with room."""
    rank_of = {item: rank for rank, items in enumerate(ranks) for item in items}
    order = sorted(range(len(costs)), key=lambda item: (-costs[item], item))
    assert sorted(rank_of) == list(range(len(costs))) == sorted(item for items in ranks for item in items)
    assert all(items == [item for item in order if rank_of[item] == rank] for rank, items in enumerate(ranks))
    loads: list[float] = [0] * len(ranks)
    counts = [0] * len(ranks)
    for item in order:
        least = min(load for load, count in zip(loads, counts, strict=True) if room is None or count < room)
        first = next(r for r, load in enumerate(loads) if load == least and (room is None or counts[r] < room))
        assert rank_of[item] == first
        loads[first] += costs[item]
        counts[first] += 1
    assert room is None or max(counts) <= room


@pytest.mark.parametrize("seed", range(300))
def test_each_item_goes_where_the_rule_says(seed: int) -> None:
    """With many ties, with none, with costs that no float holds exactly, with and without room to spare."""
    draw = random.Random(seed)
    num_items, num_ranks = draw.randint(0, 40), draw.randint(1, 9)
    cost = draw.choice(
        [lambda: draw.randint(0, 3), draw.random, lambda: 2**60 + draw.randint(0, 2), lambda: draw.choice([0.0, 0.1])]
    )
    costs = [cost() for _ in range(num_items)]
    even = -(-num_items // num_ranks)
    for room in (None, even, even + 1):
        check(spread_by_cost(costs, num_ranks, room), costs, room)


def test_more_items_than_room_are_refused() -> None:
    with pytest.raises(ValueError, match="2 ranks with room 1 cannot take 3 items; raise room"):
        spread_by_cost([1, 1, 1], 2, room=1)
