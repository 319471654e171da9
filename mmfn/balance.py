"""`spread_by_cost`: items over ranks, so that all ranks cost alike."""

from collections.abc import Sequence
from heapq import heappop, heapreplace


def spread_by_cost(costs: Sequence[float], num_ranks: int, room: int | None = None) -> list[list[int]]:
    """The items of each rank, the dearest first: each went to the rank with the least cost so far.

    Ties go to the earlier item and the lower rank. `room`: the most items that a rank may take. Without it the largest
    load of costs that are not negative is at most 4/3 of the smallest possible one.

    >>> spread_by_cost([5, 9, 5, 1, 1], 2)
    [[1, 3, 4], [0, 2]]
    >>> spread_by_cost([5, 9, 5, 1], 2, room=2)
    [[1, 3], [0, 2]]

    Raises ValueError where items are more than ranks have room for. Source: Graham 1969 (longest processing time
    first).
    """
    most = len(costs) if room is None else room
    if len(costs) > most * num_ranks:
        raise ValueError(f"{num_ranks} ranks with room {room} cannot take {len(costs)} items; raise room")
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    loads: list[tuple[float, int]] = [(0, rank) for rank in range(num_ranks)]  # a heap, as it is sorted
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, rank = loads[0]
        ranks[rank].append(i)
        if len(ranks[rank]) < most:
            heapreplace(loads, (load + costs[i], rank))
        else:
            heappop(loads)
    return ranks
