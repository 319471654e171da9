"""How full batches of a size would be, and which sizes suit a data set, worked out on its first rows.

A budget is a size of packed batches in tokens. Samples are packed as training with `data.batch_tokens` packs them, one
window after the other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mmfn.train.data.packing_plan import Bins, plan_window

BUDGETS = (2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
ROUND = 256  # tokens: what the budget of data that is less than any other is a multiple of
GOOD_FILL, FITTING = 0.97, 0.999  # shares: of real tokens in a batch, of samples that are not too long
Size = Mapping[str, int]  # "tokens" and the units of each tower
Plan = Callable[[Sequence[Size], int], Sequence[Sequence[int]]]  # (sizes, tokens of a batch) -> samples of each


def plan_batches(sizes: Sequence[Size], budget: int) -> Sequence[Sequence[int]]:
    """As training plans them, on one rank, with room for whatever the encoders read; the last samples may be left out.

    Every sample must fit the budget.
    """
    sizes_WD = np.array([list(size.values()) for size in sizes], dtype=np.int64).reshape(len(sizes), -1)
    room = (budget, *(max(1, int(total)) for total in sizes_WD[:, 1:].sum(0)))
    bins = Bins(sizes=room, segments=len(sizes), per_step=1)
    plan = plan_window(sizes_WD, sizes_WD[:, 1:].astype(np.float64), bins, seed=0, start=0)
    return [batch for step in plan.steps for batch in step]


@dataclass(kw_only=True)
class Fill:
    """Batches of one budget. `units`: of each tower, the most that one batch has."""

    budget: int
    batches: int = 0
    tokens: int = 0
    samples: int = 0
    too_long: int = 0
    units: dict[str, int] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Real tokens among all, in [0, 1]; 0 without batches."""
        return self.tokens / (self.batches * self.budget) if self.batches else 0.0

    @property
    def fitting(self) -> float:
        """Samples that are not too long among all, in [0, 1]."""
        return self.samples / (self.samples + self.too_long) if self.samples else 0.0


class Fills:
    """The fill of several budgets over the first windows of a stream of sizes."""

    def __init__(self, plan: Plan, budgets: Sequence[int] = BUDGETS, *, window: int = 4096, windows: int = 16) -> None:
        self._plan, self._window, self._left = plan, window, windows
        self._sizes: list[Size] = []
        self.fills = [Fill(budget=budget) for budget in sorted(budgets)]

    def add(self, size: Size) -> None:
        """The size of the next sample; behind the last window they are left out."""
        if self._left:
            self._sizes.append(size)
            if len(self._sizes) == self._window:
                self.flush()

    def flush(self) -> None:
        """Pack what has come in since the last window; what is less than any budget gets one that holds it whole."""
        if not self._sizes or not self._left:
            return
        total = sum(size["tokens"] for size in self._sizes)
        for fill in self.fills:
            if fill.budget > total:
                continue  # they are less than one batch
            fitting = [size for size in self._sizes if size["tokens"] <= fill.budget]
            fill.too_long += len(self._sizes) - len(fitting)
            for group in self._plan(fitting, fill.budget) if fitting else ():
                fill.batches += 1
                fill.samples += len(group)
                for name in fitting[0]:
                    num = sum(fitting[i][name] for i in group)
                    if name == "tokens":
                        fill.tokens += num
                    else:
                        fill.units[name] = max(fill.units.get(name, 0), num)
        if not any(fill.batches for fill in self.fills) and total < self.fills[0].budget:
            units = {name: sum(size[name] for size in self._sizes) for name in self._sizes[0]}
            whole = Fill(budget=-(-total // ROUND) * ROUND, batches=1, tokens=units.pop("tokens"), units=units)
            self.fills.insert(0, replace(whole, samples=len(self._sizes)))
        self._sizes, self._left = [], self._left - 1


def suggest(fills: Sequence[Fill]) -> Fill | None:
    """The smallest budget that nearly all samples fit and that is filled well; else the fullest of those they fit.

    None where no budget has a batch.
    """
    fitting = [fill for fill in fills if fill.fitting >= FITTING] or [fill for fill in fills[-1:] if fill.batches]
    good = (fill for fill in fitting if fill.share >= GOOD_FILL)
    return next(good, max(fitting, key=lambda fill: fill.share, default=None))
