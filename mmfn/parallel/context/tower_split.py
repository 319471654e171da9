"""Towers under context parallelism: whole items are spread over the ranks, features come back to tokens.

An item (a frame, a window of sound) is what may lie on any rank, since no segment crosses its ends; so it runs on one
rank, by the tower's plain attention. Every rank has the same number of units, padding included, and runs the tower
whether or not it has an item. Legend: U units, I items, M features, T tokens, W ranks.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmfn.balance import spread_by_cost
from mmfn.batch import Batch, Segments, Tower, TowerKind
from mmfn.ops import place_features
from mmfn.parallel.mesh.axis import Axis, all_gather
from mmfn.parallel.mesh.layout import Mesh

SITE = "features"


def item_cost(num_rows: int, matmul_rows: int) -> int:
    """FLOPs of one item, up to a factor: matmuls, linear in its rows, and attention, quadratic."""
    return num_rows * (num_rows + matmul_rows)


def assign_items(lengths: list[int], num_ranks: int, matmul_rows: int) -> list[int]:
    """The rank of each item of `lengths[n]` rows: the dearest first, each to the rank with the least cost so far.

    Ties go to the earlier item and the lower rank.
    """
    ranks = [0] * len(lengths)
    for rank, items in enumerate(spread_by_cost([item_cost(n, matmul_rows) for n in lengths], num_ranks)):
        for item in items:
            ranks[item] = rank
    return ranks


def static_units(most: int, num_units: int, num_ranks: int) -> int:
    """Units every rank has room for when the fullest needs `most` of a batch with `num_units`.

    The even share, or 1.25, 1.5, 2, 3, 4, 6, ... times that: a quarter to a half more than needed at most, and few
    shapes, each of which is compiled once, on however many ranks (2, 4, 8, 16: at most 4, 6, 8, 10).
    """
    even = max(1, -(-num_units // num_ranks))
    quarters = [4, 5, 6, 8]
    while -(-even * quarters[-1] // 4) < most:
        quarters.append(2 * quarters[-2])
    return next(size for n in quarters if (size := -(-even * n // 4)) >= most)


def split_tower(tower: Tower, kind: TowerKind, axis: Axis) -> tuple[Tower, Tensor]:
    """This rank's items on the host, and where each feature of the whole tower then is among those of all ranks.

    The second is int64[1 + M], to be indexed by 1 + feature: -1 stays -1. Every rank makes the same assignment from the
    same batch, without communication.
    """
    items_I = tower.items_I[tower.items_I > 0].long()
    ranks_I = torch.tensor(assign_items((items_I * kind.rows).tolist(), axis.size, kind.matmul_rows), dtype=torch.int64)
    ranks_U = ranks_I.repeat_interleave(items_I)
    loads_W = torch.bincount(ranks_U, minlength=axis.size)
    size = static_units(int(loads_W.max()), tower.inputs_UF.shape[0] // kind.inputs, axis.size)
    order_U = ranks_U.argsort(stable=True)
    first_W = loads_W.cumsum(0) - loads_W
    places_U = torch.empty_like(order_U)
    places_U[order_U] = ranks_U[order_U] * size + torch.arange(order_U.numel()) - first_W[ranks_U[order_U]]
    own = _take(tower, kind, ranks_I == axis.index, ranks_U == axis.index, size)
    return own, pad(_within(places_U, kind.features), (1, 0), value=-1)


def split_towers(batch: Batch, kinds: dict[str, TowerKind], mesh: Mesh) -> Batch:
    """This rank's items of each of a batch's towers; indices of features, those ahead too, then count those of all."""
    towers, places = {}, {}
    for name, tower in batch.towers.items():
        own, places[name] = split_tower(tower, kinds[name], mesh["cp"])
        towers[name] = replace(own, index_T=places[name][tower.index_T + 1])
    ahead = tuple(
        replace(further, index_T={name: places[name][index_T + 1] for name, index_T in further.index_T.items()})
        for further in batch.ahead
    )
    return replace(batch, towers=towers, ahead=ahead)


def spread_features(features_MD: Tensor, index_T: Tensor, axis: Axis) -> Tensor:
    """`ops.place_features` from the features of all ranks: one all-gather, and one reduce-scatter in the backward."""
    return place_features(all_gather(features_MD, axis, SITE), index_T)


def _within(units: Tensor, per_unit: int) -> Tensor:
    """Places of what units consist of, `per_unit` in each."""
    return (units[:, None] * per_unit + torch.arange(per_unit)).flatten()


def _take(tower: Tower, kind: TowerKind, is_own_I: Tensor, is_own_U: Tensor, size: int) -> Tower:
    """Some items of a tower's input, padded to `size` units."""
    units = is_own_U.nonzero()[:, 0]
    rest = size - units.numel()
    inputs, rows = _within(units, kind.inputs), _within(units, kind.rows)
    no_place_P4 = torch.tensor([[0, 0, 1, 1]], dtype=tower.coords_P4.dtype).expand(rest * kind.rows, 4)
    lengths = tower.items_I[: is_own_I.numel()]
    items = lengths[is_own_I]
    starts = (lengths.cumsum(0) - lengths) * kind.rows
    return replace(
        tower,
        inputs_UF=pad(tower.inputs_UF[inputs], (0, 0, 0, rest * kind.inputs)),
        coords_P4=torch.cat([tower.coords_P4[rows], no_place_P4]),
        segments=tuple(
            _segments(own, starts, is_own_I, min(size * most, own.num))
            for own, most in zip(tower.segments, kind.segments_per_unit, strict=True)
        ),
        ids_P=pad(tower.ids_P[rows], (0, rest * kind.rows), value=-1),
        items_I=pad(items, (0, tower.items_I.numel() - items.numel())),
    )


def _segments(segments: Segments, starts_I: Tensor, is_own_I: Tensor, num: int) -> Segments:
    """Those of some items, moved together, and unused ones up to `num`. `starts_I`: first rows of items."""
    offsets_N = segments.host_N
    lengths_N = offsets_N.diff()
    used_N = lengths_N.nonzero()[:, 0]
    item = torch.searchsorted(starts_I, offsets_N[:-1][used_N].long(), right=True) - 1
    ends = lengths_N[used_N][is_own_I[item]].cumsum(0)
    return Segments.of(_padded(ends, num + 1).to(offsets_N.dtype))


def _padded(ends: Tensor, num: int) -> Tensor:
    """Boundaries from 0 on, the last one repeated up to `num`."""
    offsets = pad(ends, (1, 0))
    return torch.cat([offsets, offsets[-1:].expand(num - offsets.numel())])
