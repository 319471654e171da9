"""Which curves of runs a page shows: one chart for each figure, one line in it for each run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from mmfn.train.report.chart import Line, Points, drawable, line_chart, smooth
from mmfn.train.report.log import Curves


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart: the key of records it is of, its title, what values are divided by, and how it is drawn.

    `is_smoothed`: the moving average of the steps, the steps themselves faint behind it; else every step, or with
    `has_marks` every point.
    """

    key: str
    title: str
    unit: float = 1.0
    is_log: bool = False
    is_smoothed: bool = True
    has_marks: bool = False


FIGURES = (
    Figure(key="loss", title="loss per supervised token", is_log=True),
    Figure(key="grad_norm", title="gradient norm", is_log=True),
    Figure(key="lr", title="learning rate", is_smoothed=False),
    Figure(key="tokens_per_s", title="tokens per second"),
    Figure(key="mfu", title="MFU, %", unit=0.01),
    Figure(key="tflops_per_s", title="model TFLOP/s of a device"),
    Figure(key="wait_s", title="waiting for data, s"),
    Figure(key="step_s", title="step, s"),
    Figure(key="padding", title="padding, % of tokens", unit=0.01),
    Figure(key="encoder_imbalance", title="encoders: most of a rank over the mean"),
    Figure(key="memory_bytes", title="memory, GiB", unit=2**30, is_smoothed=False),
)
MARKED = 40  # points of a line that are marked, at most
NUM_STYLES = 8  # lines the page has colours for; behind them they come again, dashed


def charts(runs: Mapping[str, Curves], cuts: Sequence[float] = ()) -> list[tuple[str, Markup]]:
    """`(title, SVG)` of every figure that a run has a finite value of, and of evaluations. Keys are names of runs.

    A figure goes by logarithms where all its values are positive. `cuts`: steps behind which a run was resumed.
    """
    keys = sorted({key for curves in runs.values() for key in curves.evaluations})
    evaluated = [Figure(key=key, title=key, is_log="loss" in key, is_smoothed=False, has_marks=True) for key in keys]
    figures = [*FIGURES, *evaluated]
    return [chart for figure in figures if (chart := _chart(figure, runs, cuts)) is not None]


def style(i: int) -> str:
    """CSS classes of run i."""
    return f"run{i % NUM_STYLES}" + (" dashed" if i >= NUM_STYLES else "")


def _chart(figure: Figure, runs: Mapping[str, Curves], cuts: Sequence[float]) -> tuple[str, Markup] | None:
    found = {name: _scaled(curves.points(figure.key), figure) for name, curves in runs.items()}
    if not any(map(len, found.values())):
        return None
    is_log = figure.is_log and all((points[:, 1] > 0).all() for points in found.values())
    faint, lines = [], []
    for i, (name, points) in enumerate(found.items()):
        shown = name if len(runs) > 1 else figure.title
        if figure.is_smoothed:
            faint.append(Line(points=points, style=f"{style(i)} raw", name="" if len(runs) > 1 else shown))
            points, shown = smooth(points, is_log=is_log), name if len(runs) > 1 else "moving average"
        lines.append(Line(points=points, style=style(i), name=shown, mark=figure.has_marks and len(points) <= MARKED))
    title = f"{figure.title}{' (log scale)' if is_log else ''}"
    svg = line_chart([*faint, *lines], x_label="step", y_label=figure.title, is_log=is_log, cuts=cuts)
    return title, Markup(svg)  # our own SVG, escaped where it was made


def _scaled(points: Points, figure: Figure) -> Points:
    points = drawable(points)
    return np.stack([points[:, 0], points[:, 1] / figure.unit], 1)
