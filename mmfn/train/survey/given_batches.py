"""How full batches are where their settings are given: buckets of tokens and of towers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil

import numpy as np

from mmfn.batch import TowerKind
from mmfn.train.data.packing_plan import Bins, plan_window
from mmfn.train.data.sizes import Buckets
from mmfn.train.survey.fill import BUDGETS, Fill, Plan, Size


def limits_of(
    tower_buckets: Mapping[str, Sequence[int]],
    towers: Mapping[str, TowerKind],
    *,
    longest: int | None,
    bucket: int | None,
) -> tuple[Size, Sequence[int]]:
    """The most that a sample has of tokens and a batch of units, and the sizes of batches in tokens.

    `tower_buckets`: of some towers, in inputs. `longest`: tokens of a sample that are allowed; `bucket`: the largest of
    batches; None where they are not given. Raises ValueError as `Buckets.of` does.
    """
    every = {name: [kind.inputs] for name, kind in towers.items()} | dict(tower_buckets)
    sizes = Buckets.of([1], every, towers).units
    units = {name: sizes[name][-1] for name in tower_buckets}
    limits = units if longest is None else {"tokens": longest, **units}
    if bucket is not None:
        return limits, (bucket,)
    least = longest or 0
    return limits, tuple(budget for budget in BUDGETS if budget >= least) or (least,)


def plan_within(limits: Size) -> Plan:
    """`plan_batches` where a sample has `limits["tokens"]` at most and a batch the units of the towers named there.

    Longer samples are left out.
    """

    def plan(sizes: Sequence[Size], budget: int) -> list[list[int]]:
        places = [i for i, size in enumerate(sizes) if all(size[name] <= most for name, most in limits.items())]
        if not places:
            return []
        sizes_WD = np.array([list(sizes[i].values()) for i in places], dtype=np.int64)
        totals = dict(zip(sizes[0], sizes_WD.sum(0).tolist(), strict=True))
        room = {name: limits.get(name, max(1, total)) for name, total in totals.items()} | {"tokens": budget}
        bins = Bins(sizes=tuple(room.values()), segments=len(places), per_step=1)
        steps = plan_window(sizes_WD, sizes_WD[:, 1:].astype(np.float64), bins, seed=0, start=0).steps
        return [[places[i] for i in batch] for step in steps for batch in step]

    return plan


def grown(fill: Fill, budget: int, limits: Size, times: float) -> Fill:
    """Of rows that are less than one batch, a batch of `budget` tokens of `times` as many, as far as `limits` allow."""
    rooms = [limits[name] / units for name, units in fill.units.items() if name in limits and units]
    scale = min(times, budget / fill.tokens, *rooms)
    units = {name: ceil(num * scale) for name, num in fill.units.items()}
    return replace(fill, budget=budget, tokens=round(fill.tokens * scale), units=units)
