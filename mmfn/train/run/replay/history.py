"""What a run has left: its settings, the record of every step, and the checkpoints that its steps can be taken from."""

import math
import sys
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmfn.errors import UserError
from mmfn.parallel.mesh.axis import Axis
from mmfn.train.checkpoint import Checkpoint, newest
from mmfn.train.checkpoint.format import folder_name
from mmfn.train.checkpoint.read import names
from mmfn.train.run.folder import STATE, earlier_settings
from mmfn.train.run.keeper import LOGS
from mmfn.train.run.record import StepRecord, read_records


@dataclass(frozen=True, kw_only=True)
class History:
    """A run's folder."""

    folder: Path

    def records(self, behind: int = 0, until: int = sys.maxsize) -> Iterator[StepRecord]:
        """Those in its log of the steps behind `behind` up to `until`, one by one."""
        return read_records(self.folder / LOGS[0], behind, until)

    @property
    def config(self) -> Path:
        """Its settings, those of its last steps."""
        return self.folder / "config.yaml"

    def settings(self, step: int) -> Path:
        """Those that a step was taken with: a run may have gone on with others since."""
        return next((path for end, path in earlier_settings(self.folder).items() if step <= end), self.config)

    def check_settings(self, before: int, step: int) -> None:
        """Raise ValueError where the steps behind the first `before` up to `step` were not taken with one config."""
        earlier = self.settings(before + 1)
        if earlier != self.settings(step):
            last = max(end for end in earlier_settings(self.folder) if end < step)
            raise UserError(
                f"step {step} cannot be taken again: steps {before + 1} to {last}, which lead to it, were taken with "
                f"other settings ({earlier}), and no checkpoint behind them is left to begin at; choose an earlier "
                "step, or one behind a checkpoint"
            )

    def start(self, step: int, world: Axis) -> tuple[Checkpoint | None, tuple[str, ...]]:
        """The newest whole checkpoint behind at most `step` steps, and a sentence for each newer one that is none.

        None: there is none, so that steps are taken from the first one on. All ranks of `world` call it.
        """
        search = newest(self.folder / STATE, world, below=step + 1)
        return search.checkpoint, tuple(search.skipped)

    def newest(self, world: Axis) -> Checkpoint | None:
        """The newest whole checkpoint, if there is one. All ranks of `world` call it."""
        return newest(self.folder / STATE, world).checkpoint

    def behind(self, step: int, world: Axis) -> Checkpoint | None:
        """The checkpoint behind exactly so many steps, where there is a whole one. All ranks of `world` call it."""
        if folder_name(step) not in names(self.folder / STATE):
            return None
        return newest(self.folder / STATE, world, name=folder_name(step)).checkpoint


def read_history(folder: Path) -> History:
    """The run in a folder. Raises ValueError for a folder that no run has written."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{str(folder)!r} has no config.yaml, so it is no run's folder; give the output.path of a run")
    return History(folder=folder)


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number of a step's record: in the log of the run, and now. `is_data`: it is of the step's data."""

    step: int
    name: str
    logged: float
    found: float
    is_data: bool = False

    @property
    def is_same(self) -> bool:
        """Whether they are the same, bit for bit; numbers that are none are."""
        return self.logged == self.found or (math.isnan(self.logged) and math.isnan(self.found))

    @property
    def relative(self) -> float:
        """How far they are from each other."""
        size = max(abs(self.logged), abs(self.found))
        error = abs(self.logged - self.found) / size if size else 0.0
        return math.inf if math.isnan(error) and not self.is_same else error

    def __str__(self) -> str:
        return f"{self.name} {self.found!r} where the log has {self.logged!r}"


def numbers_of_step(logged: StepRecord | None, found: Mapping[str, float], data: Container[str] = ()) -> list[Number]:
    """The numbers that a step gives whenever it is taken, beside those of its record; none where there is no record.

    `data`: the names of those of its data.
    """
    if logged is None:
        return []
    common = [name for name in found if name in logged and name != "step"]
    step = int(logged["step"])
    return [
        Number(step=step, name=name, logged=logged[name], found=found[name], is_data=name in data) for name in common
    ]


def first_step_apart(steps: Iterable[Sequence[Number]], tolerance: float) -> list[Number]:
    """The numbers that differ in the first step that has any; `tolerance`: of relative differences that pass."""
    for numbers in steps:
        found = [n for n in numbers if not n.is_same and not n.relative <= tolerance]
        if found:
            return found
    return []
