"""Where records go beside `metrics.jsonl`: TensorBoard and Weights & Biases, each by one setting, on the first rank.

Both are optional packages. One that is not installed is said before anything is read; one that fails on the way is said
once and left out, and the run goes on.
"""

import importlib
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from mmfn.errors import MissingPackageError, UserError
from mmfn.train.config.schema import Config, LogSection

Say = Callable[[str], None]


class Tracker(Protocol):
    """What takes the records of a run."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take those of one step."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Event files in `tensorboard`, a scalar for every key. Steps that are taken again replace those that are there."""

    def __init__(self, config: Config, folder: Path, first_step: int) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self.writer: Any = writer(folder / "tensorboard", purge_step=first_step + 1 if first_step else None)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See `Tracker`."""
        self.writer.close()


class Wandb:
    """A run of Weights & Biases; one that resumes goes on in the same. Where it goes its own environment says
    (`WANDB_MODE=offline`: nowhere but `wandb` in the run folder)."""

    def __init__(self, config: Config, folder: Path, first_step: int) -> None:
        section = config.log.wandb
        assert section is not None
        path = folder / "wandb" / "run_id"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        self.run: Any = importlib.import_module("wandb").init(
            project=section.project,
            name=section.name or folder.name,
            id=path.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(folder),
            config=config.model_dump(mode="json"),
        )

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self.run.log(dict(numbers), step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self.run.finish()


KINDS: Mapping[str, tuple[Callable[..., Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboard"),
    "wandb": (Wandb, "wandb"),
}
"""Setting of the section `log` -> what opens it, and the package it needs."""


def check_installed(section: LogSection) -> None:
    """Raise ValueError for a tracker that is asked for but whose package is not there."""
    for name in _asked(section):
        spec = find_spec(KINDS[name][1])
        if spec is None or spec.origin is None:  # a folder of that name is none
            raise MissingPackageError(
                f"log.{name} needs the package {KINDS[name][1]}; install it with pip install mmfn[{name}], or remove it"
            )


@contextmanager
def trackers(config: Config, folder: Path, first_step: int, say: Say) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that gives a record to all trackers a config asks for, which are closed behind it.

    Raises ValueError for one that cannot be opened when a run begins; where a run goes on that is said.
    """
    found: dict[str, Tracker] = {}
    for name in _asked(config.log):
        try:
            found[name] = KINDS[name][0](config, folder, first_step)
        except Exception as error:
            if not first_step:
                raise UserError(f"log.{name} cannot be opened ({_line(error)}); mend that or remove it") from error
            say(f"warning: log.{name} cannot be opened ({_line(error)}); the run goes on without it")

    def attempt(name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever it is, it is not the run's
            found.pop(name)
            say(f"warning: log.{name} has failed ({_line(error)}); the run goes on without it")

    def write(record: Mapping[str, Any]) -> None:
        numbers = {name: value for name, value in record.items() if name != "step"}
        for name, tracker in list(found.items()):
            attempt(name, lambda tracker=tracker: tracker.write(record["step"], numbers))  # type: ignore[misc]

    try:
        yield write
    finally:
        for name, tracker in list(found.items()):
            attempt(name, tracker.close)


def _asked(section: LogSection) -> Sequence[str]:
    return [name for name, value in (("tensorboard", section.tensorboard), ("wandb", section.wandb)) if value]


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
