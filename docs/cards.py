"""Draws the index of docs/evidence from its cards and from what they were filled with: `make evidence` runs them first.

A card joins by its file in `docs/evidence/cards`; tests/train/evidence/test_cards.py holds the page, the cards and what
was measured against each other.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import PydanticUndefined

from mmfn.train.config.section import ConfigSection
from mmfn.train.evidence.card import (
    Bound,
    Card,
    EqualityStage,
    ExportStage,
    ImportStage,
    ResumeStage,
    Stage,
    TrainingStage,
)
from mmfn.train.evidence.findings import show

FOLDER = Path(__file__).parent / "evidence"
PAGE, BEGIN, END = FOLDER / "README.md", "<!-- drawn by make evidence -->", "<!-- end of the drawing -->"
CARDS = {path.stem: path for path in sorted((FOLDER / "cards").glob("*.yaml"))}
STAGES: Mapping[str, type[Stage]] = {
    "import": ImportStage,
    "equality": EqualityStage,
    "training": TrainingStage,
    "resume": ResumeStage,
    "export": ExportStage,
}
COLUMNS = (
    "card",
    "logits against transformers, imported / exported",
    "layouts: largest difference from one device",
    "loss: first, last",
    "held-out accuracy",
    "killed and resumed: tensors, steps apart",
    "figures as expected",
)


def findings_of(name: str) -> dict[str, Any]:
    """What a card was filled with."""
    values: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return values


def page() -> str:
    """The page as it should be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{_table()}\n{_measured_on()}\n## What a card says\n\n{_keys()}\n{END}{after}"


def _table() -> str:
    head = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|\n"
    return head + "".join(_row(name, findings_of(name)) for name in CARDS)


def _row(name: str, values: Mapping[str, Any]) -> str:
    lines = values["lines"]

    def figure(stage: str, figure: str) -> str:
        return next((show(one["measured"]) for one in lines if (one["stage"], one["figure"]) == (stage, figure)), "-")

    worst: dict[str, float] = {}
    for one in lines:
        if one["stage"] == "equality":
            worst[one["layout"]] = max(worst.get(one["layout"], 0.0), one["measured"])
    checked = [one["passed"] for one in lines if one["passed"] is not None]
    apart = sum(one["measured"] for one in lines if one["figure"] in ("weights_apart", "state_apart"))
    cells = [
        f"[{values['card']['title']}]({name}.md)",
        f"{figure('import', 'logits')} / {figure('export', 'logits')}",
        "; ".join(f"{layout}: {show(value)}" for layout, value in worst.items()),
        f"{figure('training', 'first_loss')}, {figure('training', 'loss')}",
        figure("training", "accuracy"),
        f"{show(apart)}, {figure('resume', 'steps_apart')}",
        f"{sum(checked)} of {len(checked)}",
    ]
    return f"| {' | '.join(cells)} |\n"


def _measured_on() -> str:
    every = [findings_of(name) for name in CARDS]
    places = sorted({f"{one['machine']['cores']} cores of {one['machine']['processor']}" for one in every})
    tools = sorted(
        {f"torch {one['versions']['torch']}, transformers {one['versions']['transformers']}" for one in every}
    )
    seconds = [sum(one["durations_s"].values()) for one in every]
    duration = f"{min(seconds):.0f} to {max(seconds):.0f} s"
    return f"Measured on {'; '.join(places)}, with {'; '.join(tools)}, in {duration} each by the clock.\n"


def _keys() -> str:
    parts: dict[str, type[ConfigSection]] = {"": Card, "`expect`: of a figure": Bound}
    text = ""
    for title, section in parts.items():
        text += f"{title}\n\n" if title else ""
        text += _settings(section, {*STAGES, *(["import_"] if title == "" else [])}) + "\n"
    for name, stage in STAGES.items():
        text += f"### `{name}`\n\n{(stage.__doc__ or '').strip()}\n\n"
        text += _settings(stage, {"expect"}) + "\n" if stage.model_fields.keys() - {"expect"} else ""
        text += "| figure | |\n|---|---|\n"
        text += "".join(f"| `{figure}` | {meaning} |\n" for figure, meaning in stage.FIGURES.items()) + "\n"
    return text


def _settings(section: type[ConfigSection], without: set[str]) -> str:
    rows = "| key | default | |\n|---|---|---|\n"
    for name, field in section.model_fields.items():
        if name not in without:
            default = (
                "required"
                if field.default is PydanticUndefined
                else ""
                if field.default in (None, ())
                else field.default
            )
            rows += f"| `{name}` | {default} | {field.description} |\n"
    return rows


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{len(CARDS)} cards")
