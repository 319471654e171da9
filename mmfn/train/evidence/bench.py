"""What the stages of a card run with: its config, the folder of its runs, and training as a user starts it."""

import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmfn.errors import UserError
from mmfn.parallel.mesh.launch import Ranks
from mmfn.spec import num_params
from mmfn.train.build.data import open_dataset
from mmfn.train.build.model import find_family
from mmfn.train.build.processor import load_model_processor
from mmfn.train.config.load import Loaded, load_config
from mmfn.train.data import Dataset
from mmfn.train.evidence.card import Card
from mmfn.train.evidence.files import newest
from mmfn.train.evidence.processes import MMFN, start
from mmfn.train.run.folder import locate
from mmfn.train.run.record import OF_MACHINE

RECORDS, POLL_S = "metrics.jsonl", 0.02


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A card and its file, overrides behind the card's own, the ranks of this process, and where lines are said."""

    card: Card
    path: str
    overrides: tuple[str, ...]
    ranks: Ranks
    say: Callable[..., None] = field(repr=False)

    def load(self, *more: str) -> Loaded:
        """The config of the card with further overrides. Raises ValueError as `load_config` does."""
        return load_config(self.card.config, (*self.card.overrides, *self.overrides, *more))

    @property
    def root(self) -> Path:
        """The folder of all runs of the card: its `output.path`."""
        return locate(self.load().config.output.path)

    @property
    def run(self) -> Path:
        """The folder of the run that stage training makes and stage export reads."""
        return self.root / "training"

    def dataset(self, loaded: Loaded, *, is_held_out: bool = False) -> Dataset:
        """The training or the held-out set. Raises ValueError where there is no held-out set."""
        data, model = loaded.config.data, loaded.config.model
        which = data.eval if is_held_out else data.train
        if which is None:
            raise UserError(f"{self.path}: its config has no held-out set; set data.eval, or leave out this stage")
        return open_dataset(data, which, load_model_processor(model.path, data.chat, data.media_settings))

    def model(self) -> str:
        """Which model the card's config names: family, size and folder."""
        section = self.load().config.model
        family, cfg = find_family(section)
        return f"{family.name}, {num_params(family.specs(cfg)):,} parameters, {section.path}"

    def prepare(self) -> None:
        """Run the commands that write models and data. Raises ValueError for one that fails."""
        programs = {"python": (sys.executable,), "mmfn": MMFN}
        for command in self.card.prepare:
            program, *rest = shlex.split(command)
            if program not in programs:
                raise UserError(f"{self.path}: prepare runs {program!r} but may run python or mmfn; correct it")
            self.say(f"$ {command}")
            with start([*programs[program], *rest], f"{self.path}: {command}") as process:
                process.wait()

    def train(self, folder: Path, *more: str, until: int | None = None) -> None:
        """`mmfn train` into `folder`, on as many processes as the layout has ranks.

        `until`: the step behind whose record all of them are killed, once there is a checkpoint of training. Raises
        ValueError when training fails, or is done before it could be killed.
        """
        settings = [*self.card.overrides, *self.overrides, *more, f"output.path={folder}"]
        config = self.load(*more).config
        name = shlex.join(["mmfn", "train", self.card.config, *settings])
        world = config.layout.sizes.world
        if until is not None:
            (folder / RECORDS).unlink(missing_ok=True)  # of an earlier run, whose steps are none of this one
        self.say(f"$ {name}" + (f"   (on {world} ranks)" if world > 1 else ""))
        with start([*MMFN, "train", self.card.config, *settings], "mmfn train", world) as ranks:
            if until is None:
                ranks.wait()
                return
            while ranks.is_running() and (num_steps(folder) < until or not newest(folder)):
                time.sleep(POLL_S)
            ranks.kill()
            if (done := num_steps(folder)) < until:
                raise UserError(f"mmfn train ended behind step {done}, before it could be killed: {ranks.last_words()}")
        if done >= config.train.num_steps:
            raise UserError(f"{self.path}: training was done before it could be killed; raise steps of stage resume")


def records(folder: Path) -> list[dict[str, Any]]:
    """What a run has written of its steps; a last line that is not whole yet is left out."""
    path = folder / RECORDS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    """What a record says of its step that another run of the same config would say too."""
    return {name: value for name, value in record.items() if name not in OF_MACHINE}


def num_steps(folder: Path) -> int:
    """Steps that a run has written."""
    return max((record["step"] for record in records(folder) if "step" in record), default=0)
