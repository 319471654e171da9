"""What was measured of a card, where and with what, beside what is expected: the filled card, as YAML and Markdown."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from mmfn.train.evidence.card import Bound, Card, Stage

HEAD = "| stage | layout | figure | measured | expected | |\n|---|---|---|---|---|---|\n"


BEGINNING = "passed: "  # of findings as YAML


@dataclass(frozen=True, kw_only=True)
class Line:
    """One figure of one stage. `layout`: of a stage of which there may be several. `expected`: "" of what informs only.

    `passed`: None where nothing is expected.
    """

    stage: str
    layout: str
    figure: str
    measured: float
    expected: str
    passed: bool | None

    def __str__(self) -> str:
        mark = {True: "pass", False: "FAIL", None: "    "}[self.passed]
        expected = f"   ({self.expected} expected)" if self.expected else ""
        return f"{mark}  {self.name:<42} {show(self.measured)}{expected}"

    @property
    def name(self) -> str:
        """Of the figure among all of the card."""
        return f"{self.stage}{f' ({self.layout})' if self.layout else ''}.{self.figure}"


def lines_of(stage: Stage, name: str, layout: str, figures: Mapping[str, float]) -> list[Line]:
    """The figures of a stage against what is expected; one that is expected and was not measured fails."""
    measured = {
        figure: figures.get(figure, float("nan")) for figure in stage.FIGURES if figure in {*figures, *stage.expect}
    }

    def line(figure: str, value: float, bound: Bound | None) -> Line:
        passed = None if bound is None else bound.holds(value)
        expected = "" if bound is None else str(bound)
        return Line(stage=name, layout=layout, figure=figure, measured=value, expected=expected, passed=passed)

    return [line(figure, value, stage.expect.get(figure)) for figure, value in measured.items()]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """A card and what was measured. `path`, `overrides`, `only`: as `mmfn verify` got them. `model`: which it was."""

    card: Card
    path: str
    overrides: Sequence[str]
    only: Sequence[str]
    lines: Sequence[Line]
    model: str
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    date: str
    durations_s: Mapping[str, float]

    @property
    def failures(self) -> list[Line]:
        """Figures that are not what is expected."""
        return [line for line in self.lines if line.passed is False]

    def to_yaml(self) -> str:
        """For programs, from `BEGINNING` on: the whole card as it was read, then what was measured."""
        values: dict[str, Any] = {
            "passed": not self.failures,
            "path": self.path,
            "overrides": list(self.overrides),
            "only": list(self.only),
            "card": self.card.model_dump(mode="json", exclude_defaults=True),
            "lines": [asdict(line) for line in self.lines],
            "model": self.model,
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "date": self.date,
            "durations_s": dict(self.durations_s),
        }
        return yaml.safe_dump(values, sort_keys=False, width=100, allow_unicode=True)

    def to_markdown(self) -> str:
        """For readers."""
        card, total = self.card, sum(self.durations_s.values())
        rows = [
            f"| {line.stage} | {line.layout} | {line.figure} | {show(line.measured)} | {line.expected} "
            f"| {({True: 'pass', False: '**fail**', None: ''})[line.passed]} |\n"
            for line in self.lines
        ]
        run = shlex.join(["mmfn", "train", card.config, *card.overrides, *self.overrides])
        again = shlex.join(["mmfn", "verify", self.path, *self.overrides, *(f"--only={name}" for name in self.only)])
        passed = sum(line.passed is True for line in self.lines)
        places = {"model": self.model, **self.machine, **self.versions, "date": self.date, "duration": f"{total:.0f} s"}
        return (
            f"# {card.title}\n\n{card.model} {card.data}\n\n"
            f"{passed} of {passed + len(self.failures)} figures are as expected. The run, and all of this again:\n\n"
            + "\n".join(["```bash", *card.prepare, run, again, "```"])
            + f"\n\nWhat each figure is: [README.md](README.md).\n\n{HEAD}{''.join(rows)}"
            + "\n| measured of, on and with | |\n|---|---|\n"
            + "".join(f"| {name} | {value} |\n" for name, value in places.items())
        )


def show(value: float) -> str:
    """A figure in few digits; a whole number as one."""
    return f"{value:.0f}" if value == round(value, 0) and abs(value) < 1e7 else f"{value:.3g}"
