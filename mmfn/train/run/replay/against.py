"""Two runs beside each other at one step: settings, logs, and what the step begins with and gives."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mmfn.errors import UserError
from mmfn.train.config import changes as settings
from mmfn.train.config.load import Loaded, describe
from mmfn.train.run.record import OF_MACHINE, StepRecord
from mmfn.train.run.replay.compare import Change, changes
from mmfn.train.run.replay.history import History, Number, first_step_apart, numbers_of_step
from mmfn.train.run.replay.other import LeafError, gradient_errors
from mmfn.train.run.replay.steps import Observation, data_changes
from mmfn.tree import paths


@dataclass(frozen=True, kw_only=True)
class Against:
    """How a run differs from another, `name`.

    `settings` that decide numbers, from that one's to this one's; `apart`: numbers of the first step whose records
    differ; of the step asked about its `data` (None: ranks read other parts), `params` before it and `gradients`.
    """

    name: str
    settings: Sequence[settings.Change]
    apart: Sequence[Number]
    data: Sequence[Change] | None
    params: Sequence[Change]
    gradients: Sequence[LeafError]

    @property
    def is_same(self) -> bool:
        """Whether nothing differs, to the last bit."""
        return not (self.settings or self.apart or self.data or self.params or self.farthest.error)

    @property
    def farthest(self) -> LeafError:
        """The gradient that differs most."""
        return self.gradients[0]

    def lines(self) -> Iterator[str]:
        """What differs, for a person."""
        if self.is_same:
            yield f"beside {self.name}: settings, logs, parameters, data and gradients are the same, bit for bit"
            return
        yield f"beside {self.name}:"
        yield f"  settings: {', '.join(map(str, self.settings)) or 'the same'}"
        yield f"  logs: {self._logs()}"
        yield f"  data: {'of other ranks' if self.data is None else _first(self.data)}"
        yield f"  parameters before it: {_first(self.params)}"
        yield f"  gradients: {f'{self.farthest} at most' if self.farthest.error else 'the same'}"

    def _logs(self) -> str:
        if not self.apart:
            return "the same"
        numbers = ", ".join(f"{n.name} {n.found!r} and {n.logged!r}" for n in self.apart[:3])
        return f"apart from step {self.apart[0].step} on: {numbers}"


def logs_apart(one: History, other: History) -> list[Number]:
    """The numbers that differ in the first step whose records do, but for those of the machine: `one`'s as found."""
    pairs = _of_same_steps(other.records(), one.records())
    comparable = ((logged, {name: x for name, x in mine.items() if _is_of_run(name, x)}) for logged, mine in pairs)
    return first_step_apart((numbers_of_step(logged, mine) for logged, mine in comparable), 0.0)


def beside(
    name: str,
    one: Sequence[Observation],
    other: Sequence[Observation],
    loaded: tuple[Loaded, Loaded],
    apart: Sequence[Number],
) -> Against:
    """What ranks saw of a step in two runs, whose settings are `loaded`. Raises ValueError for two models."""
    mine, theirs = one[0].params, other[0].params
    if paths(mine) != paths(theirs):
        raise UserError(f"{name} trains another model: its parameters have other paths; compare runs of one model")
    has_same_ranks = loaded[0].config.layout.sizes == loaded[1].config.layout.sizes
    return Against(
        name=name,
        settings=settings.changes(describe(loaded[1]), loaded[0]),
        apart=apart,
        data=[c for a, b in zip(one, other, strict=True) for c in data_changes(a.batches, b.batches)]
        if has_same_ranks
        else None,
        params=list(changes(mine, theirs)),
        gradients=gradient_errors(one[0].grads, other[0].grads),
    )


def _of_same_steps(one: Iterator[StepRecord], other: Iterator[StepRecord]) -> Iterator[tuple[StepRecord, StepRecord]]:
    """The records of the steps that both logs have."""
    waiting: StepRecord | None = next(other, None)
    for record in one:
        while waiting is not None and waiting["step"] < record["step"]:
            waiting = next(other, None)
        if waiting is not None and waiting["step"] == record["step"]:
            yield record, waiting


def _is_of_run(name: str, value: Any) -> bool:
    return isinstance(value, int | float) and name not in OF_MACHINE


def _first(found: Sequence[Change]) -> str:
    if not found:
        return "the same"
    return f"{found[0]}" + (f", and {len(found) - 1} more" if len(found) > 1 else "")
