"""Which checkpoints of a run stay: the newest, those of every k-th step, and the best by a held-out loss."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from mmfn.errors import UserError
from mmfn.parallel.mesh.axis import Axis
from mmfn.train.checkpoint import read
from mmfn.train.checkpoint.disk import delete
from mmfn.train.checkpoint.format import folder_name, step_of
from mmfn.train.checkpoint.write import on_all


@dataclass(frozen=True, kw_only=True)
class Retention:
    """The newest `num_newest` stay, those of every `every`-th step for ever, and the `num_best` of the lowest loss.

    >>> Retention(num_newest=1, every=100, num_best=1).stay({100: 3.0, 150: 2.0, 200: None, 250: 2.5, 300: None})
    {300, 100, 200, 150}
    """

    num_newest: int
    every: int | None = None
    num_best: int = 0

    def __post_init__(self) -> None:
        if self.num_newest < 1:
            raise UserError(f"at least 1 checkpoint must stay, got {self.num_newest}")

    def is_forever(self, step: int) -> bool:
        """Whether a checkpoint stays whatever others there are."""
        return self.every is not None and step % self.every == 0

    def stay(self, losses: Mapping[int, float | None]) -> set[int]:
        """The steps that stay of those of all checkpoints, given the loss of each that has one."""
        newest = sorted(losses)[-self.num_newest :]
        return {*newest, *filter(self.is_forever, losses), *self._best(losses)}

    def is_best(self, loss: float, losses: Mapping[int, float | None]) -> bool:
        """Whether a loss is among the best beside those of all checkpoints."""
        return -1 in self._best({**losses, -1: loss})

    def _best(self, losses: Mapping[int, float | None]) -> list[int]:
        """The first of equal ones counts as better."""
        known = [(loss, abs(step), step) for step, loss in losses.items() if loss is not None and loss == loss]
        return [step for _, _, step in sorted(known)[: self.num_best]]


def whole_in(
    root: Path, retention: Retention, known: Mapping[int, float | None] = MappingProxyType({})
) -> dict[int, float | None]:
    """The steps of whole checkpoints, and the held-out loss of each that has one.

    Those that stay for ever behind the newest are not looked at, as a run has ever more: unless the best are asked for
    they do not count, and then each is as it was `known` to be before.
    """
    found: dict[int, float | None] = {}
    for name in read.names(root):
        step = step_of(name) or 0
        if len(found) >= retention.num_newest and retention.is_forever(step):
            if not retention.num_best:
                continue
            if step in known:
                found[step] = known[step]
                continue
        with suppress(UserError):
            facts = read.open_checkpoint(root / name).manifest.facts
            found[facts.step] = facts.loss
    return found


def remove_old(
    root: Path, retention: Retention, world: Axis, known: dict[int, float | None] | None = None
) -> list[str]:
    """Delete the whole checkpoints that need not stay; returns their names. All ranks call it behind a save.

    `known`: losses of whole ones by step, as the first rank found them before, and what it finds is added (`whole_in`).
    Raises ValueError on all of them where one cannot be deleted. Damaged ones stay, and do not count.
    """

    def remove() -> list[str]:
        losses = whole_in(root, retention, known or {}) if world.index == 0 else {}
        if known is not None:
            known.update({step: loss for step, loss in losses.items() if retention.is_forever(step)})
        old = [folder_name(step) for step in sorted(losses.keys() - retention.stay(losses))]
        for name in old:
            delete(root, name)
        return old

    return on_all(remove, world, "deleting old checkpoints")[0]
