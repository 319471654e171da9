"""What a run has written on its way, read for a page: its curves, its settings, what it skipped, when it was resumed.

A run that is still going can be read: the last line of a file may be half of one.
"""

import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mmfn.errors import UserError
from mmfn.train.data.skips import KINDS
from mmfn.train.data.step_lines import parse_line
from mmfn.train.report.chart import Points

CURVES = (
    *("loss", "grad_norm", "lr", "tokens_per_s", "mfu", "tflops_per_s", "wait_s", "step_s", "padding"),
    *("encoder_imbalance", "memory_bytes"),
)
EVAL = "eval_"  # what the keys of evaluations begin with
SUMS = (
    *("tokens", "flops", "step_s", "wait_s", "skipped"),
    *("media_tokens", "supervised", "samples", "padding", "cut", *KINDS),
)


class Curves:
    """Numbers of records by key, over steps: those of `CURVES`, and of evaluations. 16 bytes a number."""

    def __init__(self) -> None:
        self.values: dict[str, tuple[array[float], array[float]]] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        """The next record; what is not finite in it (null) is left out."""
        step = record["step"]
        for name, value in record.items():
            if (name in CURVES or name.startswith(EVAL)) and isinstance(value, int | float):
                steps, numbers = self.values.setdefault(name, (array("d"), array("d")))
                steps.append(step)
                numbers.append(value)

    def points(self, name: str) -> Points:
        """[N, 2]: steps and values."""
        steps, numbers = self.values.get(name, (array("d"), array("d")))
        return np.stack([np.asarray(steps, dtype=np.float64), np.asarray(numbers, dtype=np.float64)], 1)

    @property
    def evaluations(self) -> list[str]:
        """Keys of evaluations."""
        return sorted(name for name in self.values if name.startswith(EVAL))


@dataclass(kw_only=True)
class RunLog:
    """A run as its folder tells it.

    `last`: the newest value of every key; `sums`: over `num_steps` records. `resumed`: the last step before, and when,
    for each time. `config`: settings by dotted name. `skips`: samples left out, by kind and reason, in which names and
    numbers are blanks. `num_unreadable`: lines of metrics.jsonl that hold no record.
    """

    folder: Path
    curves: Curves = field(default_factory=Curves)
    last: dict[str, Any] = field(default_factory=dict)
    num_steps: int = 0
    sums: Counter[str] = field(default_factory=Counter)
    resumed: list[tuple[int, float]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    skips: Counter[tuple[str, str]] = field(default_factory=Counter)
    num_unreadable: int = 0

    def add(self, record: Mapping[str, Any]) -> None:
        """The next record."""
        began, before = record.get("began_at"), self.last.get("began_at")
        if began is not None and before is not None and began != before:
            self.resumed.append((self.last["step"], began))
        self.num_steps += "loss" in record
        self.sums.update({name: record[name] for name in SUMS if record.get(name)})
        self.curves.add(record)
        self.last = {**self.last, **record}


def read_log(folder: Path) -> RunLog:
    """The run of a folder. Raises ValueError where there is none."""
    log = read_steps(folder)
    log.config = _settings(folder / "config.yaml")
    for skip in _lines(folder / "skipped.jsonl"):
        if skip is not None:
            log.skips[skip["kind"], _kind_of(skip["reason"])] += 1
    return log


def read_steps(folder: Path) -> RunLog:
    """What the metrics.jsonl of a run says of it. Raises ValueError where there is none."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{str(folder)!r} holds no metrics.jsonl, so it is no run; give the folder of one")
    log = RunLog(folder=folder)
    for record in _lines(path):
        if record is None:
            log.num_unreadable += 1
        else:
            log.add(record)
    return log


def _lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """The objects of a file, None for a line that holds none; one that is being written is left out."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for line in file:
            found = parse_line(line)
            if found is not None or line.endswith(b"\n"):
                yield found


def _settings(path: Path) -> dict[str, Any]:
    """Values of a config file by dotted name; none where it cannot be read."""
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    sections = sections if isinstance(sections, dict) else {}
    return {
        f"{name}.{key}": value
        for name, section in sections.items()
        if isinstance(section, dict)
        for key, value in section.items()
    }


def _kind_of(reason: str) -> str:
    """A reason without what is quoted or counted in it, so that those alike are one."""
    return re.sub(r"\d+", "N", re.sub(r"'[^']*'|\"[^\"]*\"", "…", reason))
