"""`report.html`: what a run did, as one file without external resources that opens anywhere, offline, light or dark."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mmfn.errors import UserError
from mmfn.page import page_head
from mmfn.train.report.curves import charts
from mmfn.train.report.log import Curves
from mmfn.train.report.picture import data_url, is_tiny
from mmfn.train.report.template import render
from mmfn.train.run.evaluate import Answer, Evaluation


@dataclass(frozen=True, kw_only=True)
class _Image:
    url: str
    is_tiny: bool


def render_report(
    *,
    title: str,
    subtitle: str,
    tiles: Sequence[tuple[str, str]],
    facts: Sequence[tuple[str, str]],
    curves: Curves,
    evaluation: Evaluation | None,
    config: str,
    num_images: int = 60,
) -> str:
    """The page as text. All text in it is escaped.

    `curves`: of metrics.jsonl; none are shown without one of `loss`. `num_images`: samples shown at most, the wrong
    ones first but never more than half of the places. Raises ValueError when a shown image cannot be read.
    """
    shown = choose(evaluation.answers, num_images) if evaluation else []
    return render(
        "page.html.jinja",
        head=page_head("mmfn train"),
        title=title,
        subtitle=subtitle,
        tiles=tiles,
        facts=facts,
        config=config,
        charts=charts({"run": curves}) if "loss" in curves.values else [],
        samples=[_sample(answer) for answer in shown],
        samples_note=_samples_note(evaluation, len(shown)),
    )


def choose(answers: Sequence[Answer], count: int) -> list[Answer]:
    """At most `count` answers: up to half wrong ones first, then right ones, each in the order of the data."""
    wrong = [a for a in answers if not a.is_correct]
    right = [a for a in answers if a.is_correct]
    num_wrong = min(len(wrong), max(count // 2, count - len(right)))
    return [*wrong[:num_wrong], *right[: count - num_wrong]]


def _sample(answer: Answer) -> dict[str, Any]:
    return {
        "id": answer.id,
        "question": answer.question,
        "prediction": answer.prediction,
        "truth": answer.truth,
        "is_correct": answer.is_correct,
        "images": [_embed(path) for path in answer.images],
    }


def _embed(path: str) -> _Image:
    try:
        with Image.open(path) as image:
            is_small = is_tiny(image)
        return _Image(url=data_url(Path(path)), is_tiny=is_small)
    except OSError as error:
        raise UserError(f"image {str(path)!r} cannot be shown in the report: {error}; restore the file") from error


def _samples_note(evaluation: Evaluation | None, shown: int) -> str:
    if evaluation is None:
        return ""
    total, wrong = len(evaluation.answers), sum(not a.is_correct for a in evaluation.answers)
    return f"{shown} of {total} shown, wrong answers first: {wrong} of {total} are wrong."
