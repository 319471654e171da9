"""`report.html`: what a run did, as one file without external resources that opens anywhere, offline, light or dark."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from mmfn.errors import UserError
from mmfn.train.report.chart import Line, line_chart, smooth
from mmfn.train.run.evaluate import Answer, Evaluation

THUMBNAIL_PIXELS = 256  # longest side of an embedded image
TINY_PIXELS = 64  # images below this are shown as crisp pixels


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
    metrics: Sequence[Mapping[str, Any]],
    evaluation: Evaluation | None,
    config: str,
    num_images: int = 60,
) -> str:
    """The page as text. All text in it is escaped.

    `metrics`: the records of metrics.jsonl (keys `step`, `loss`, `lr`). `num_images`: samples shown at most, the wrong
    ones first but never more than half of the places. Raises ValueError when a shown image cannot be read.
    """
    shown = choose(evaluation.answers, num_images) if evaluation else []
    template = resources.files("mmfn.train.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(template)
    return page.render(
        title=title,
        subtitle=subtitle,
        tiles=tiles,
        facts=facts,
        config=config,
        charts=[(name, Markup(svg)) for name, svg in _charts(metrics)],  # our own SVG, escaped where it was made
        samples=[_sample(answer) for answer in shown],
        samples_note=_samples_note(evaluation, len(shown)),
    )


def choose(answers: Sequence[Answer], count: int) -> list[Answer]:
    """At most `count` answers: up to half wrong ones first, then right ones, each in the order of the data."""
    wrong = [a for a in answers if not a.is_correct]
    right = [a for a in answers if a.is_correct]
    num_wrong = min(len(wrong), max(count // 2, count - len(right)))
    return [*wrong[:num_wrong], *right[: count - num_wrong]]


def _charts(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    loss = [(m["step"], m["loss"]) for m in metrics if math.isfinite(m["loss"])]
    if not loss:
        return []
    rate = [(m["step"], m["lr"]) for m in metrics]
    is_log = all(y > 0 for _, y in loss)
    curves = [
        Line(points=loss, style="raw", name="loss of each step"),
        Line(points=smooth(loss, is_log=is_log), style="main", name="moving average"),
    ]
    return [
        (
            f"loss per supervised token{' (log scale)' if is_log else ''}",
            line_chart(curves, x_label="step", y_label="loss", is_log=is_log),
        ),
        ("learning rate", line_chart([Line(points=rate, style="second")], x_label="step", y_label="learning rate")),
    ]


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
    """A data URL. Small PNG files are embedded as they are, anything else as a PNG thumbnail."""
    try:
        with Image.open(path) as image:
            is_tiny = max(image.size) <= TINY_PIXELS
            data = Path(path).read_bytes() if is_tiny and image.format == "PNG" else _thumbnail(image)
    except OSError as error:
        raise UserError(f"image {str(path)!r} cannot be shown in the report: {error}; restore the file") from error
    return _Image(url="data:image/png;base64," + base64.b64encode(data).decode("ascii"), is_tiny=is_tiny)


def _thumbnail(image: Image.Image) -> bytes:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _samples_note(evaluation: Evaluation | None, shown: int) -> str:
    if evaluation is None:
        return ""
    total, wrong = len(evaluation.answers), sum(not a.is_correct for a in evaluation.answers)
    return f"{shown} of {total} shown, wrong answers first: {wrong} of {total} are wrong."
