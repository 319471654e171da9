"""Charts as SVG text. No library: a report must open anywhere, offline. Colours come from the page's CSS.

A line chart is drawn for the width of a phone, so that its text can be read there; wider screens show more of them side
by side. Pointing at it, or touching it, shows the values there: groups of class "at" that CSS makes visible.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmfn.errors import UserError

WIDTH, HEIGHT = 360, 216
LEFT, RIGHT, TOP, BOTTOM = 56, 18, 8, 38  # room for tick labels
COLUMNS = 300  # of a line, each with its least and its largest value: more cannot be seen
POINTERS = 90  # places where values are shown
BAR_WIDTH, BAR_HEIGHT = 640, 260

Point = tuple[float, float]
Points = NDArray[np.float64]  # [N, 2], by x


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve: `points`, [N, 2] by increasing x.

    `style` are CSS classes of the page: "raw" (faint), "main", "second", "run0" ... `mark` shows each point. One
    without a name has no values shown.
    """

    points: ArrayLike
    style: str = "main"
    name: str = ""
    mark: bool = False


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """Where numbers lie in a chart."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]  # logarithms if is_log
    is_log: bool

    def x(self, x: float) -> float:
        low, high = self.x_range
        return LEFT + (x - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, y: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - ((math.log10(y) if self.is_log else y) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def line_chart(
    lines: Sequence[Line], *, x_label: str, y_label: str, is_log: bool = False, cuts: Sequence[float] = ()
) -> str:
    """An SVG element with axes, grid and the lines; points that are not finite (if `is_log`: positive) are left out.

    `cuts`: places on the x axis that get a vertical line. Its size does not grow with the points. Raises ValueError
    when no point is left to draw.
    """
    drawn = [drawable(line.points, is_log) for line in lines]
    if not any(len(points) for points in drawn):
        raise UserError(f"chart {y_label!r} has no finite point to draw; give at least one")
    x_N, y_N = np.concatenate(drawn).T
    y_N = np.log10(y_N) if is_log else y_N
    scale = _Scale(x_range=_widen(x_N.min(), x_N.max()), y_range=_widen(y_N.min(), y_N.max()), is_log=is_log)
    label = escape(y_label, quote=True)
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">']
    parts += _axes(scale, x_label)
    for x in cuts:
        parts.append(f'<path class="cut" d="M{scale.x(x):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
    for line, points in zip(lines, drawn, strict=True):
        parts += _curve(line, thin(points), scale)
    named = [(line, points) for line, points in zip(lines, drawn, strict=True) if line.name and len(points)]
    return "".join([*parts, *_pointers(named, scale, x_label), "</svg>"])


def _axes(scale: _Scale, x_label: str) -> list[str]:
    parts = []
    for y in _log_ticks(*scale.y_range) if scale.is_log else _ticks(*scale.y_range):
        at = scale.y(y)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 5}" y="{at + 4:.1f}" text-anchor="end">{_number(y)}</text>')
    for x in _ticks(*scale.x_range, count=4):
        place = f"{scale.x(x):.1f}"
        parts.append(f'<text class="tick" x="{place}" y="{HEIGHT - 22}" text-anchor="middle">{_number(x)}</text>')
    end = WIDTH - RIGHT
    return [*parts, f'<text class="tick" x="{end}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>']


def _curve(line: Line, points: Points, scale: _Scale) -> list[str]:
    places = [f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in points.tolist()]
    parts = [f'<polyline class="{line.style}" points="{" ".join(places)}"/>']
    for place in places if line.mark else []:
        cx, cy = place.split(",")
        parts.append(f'<circle class="{line.style}" cx="{cx}" cy="{cy}" r="3"/>')
    return parts


def _pointers(lines: Sequence[tuple[Line, Points]], scale: _Scale, x_label: str) -> list[str]:
    """Stretches of the x axis with the value of each line next to their middle."""
    every_N = np.unique(np.concatenate([np.zeros(0), *(points[:, 0] for _, points in lines)]))
    if len(every_N) > POINTERS:
        every_N = np.linspace(*scale.x_range, POINTERS)
    width = (WIDTH - LEFT - RIGHT) / max(1, len(every_N) - 1)
    parts = []
    for middle in every_N.tolist():
        at = scale.x(middle)
        found = [min(_around(points, middle), key=lambda p: abs(p[0] - middle)) for _, points in lines]
        nearest = min((x for x, _ in found), key=lambda x: abs(x - middle))
        values = (f"{line.name} {y:.4g}" for (line, _), (_, y) in zip(lines, found, strict=True))
        rows = [f"{x_label} {nearest:g}", *values]
        texts = "".join(f'<tspan x="{LEFT + 4}" dy="14">{escape(row)}</tspan>' for row in rows)
        parts.append(
            f'<g class="at"><rect x="{at - width / 2:.1f}" y="0" width="{width:.1f}" height="{HEIGHT}"/>'
            f'<path d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}"/><text y="{TOP}">{texts}</text></g>'
        )
    return parts


def _around(points: Points, x: float) -> list[Point]:
    """The last point before x and the first that is not, where there are."""
    place = int(np.searchsorted(points[:, 0], x))
    return [(float(near), float(y)) for near, y in points[max(0, place - 1) : place + 1]]


def bar_chart(bars: Sequence[tuple[str, int]], *, label: str) -> str:
    """An SVG element with one bar for each `(name, count)`, its name below and its count above it."""
    most, step = max([1, *(count for _, count in bars)]), (BAR_WIDTH - 2 * RIGHT) / max(1, len(bars))
    box, named = f'viewBox="0 0 {BAR_WIDTH} {BAR_HEIGHT}"', f'aria-label="{escape(label, quote=True)}"'
    parts = [f'<svg class="chart" {box} role="img" {named}>']
    for i, (name, count) in enumerate(bars):
        height = count / most * (BAR_HEIGHT - BOTTOM - 24)
        x, y = RIGHT + i * step, BAR_HEIGHT - BOTTOM - height
        middle = f'x="{x + step / 2:.1f}" text-anchor="middle"'
        parts.append(f'<rect x="{x + 1:.1f}" y="{y:.1f}" width="{max(1.0, step - 2):.1f}" height="{height:.1f}"/>')
        parts.append(f'<text class="tick" {middle} y="{BAR_HEIGHT - 16}">{escape(name)}</text>')
        parts.append(f'<text class="tick" {middle} y="{y - 4:.1f}">{count:,}</text>' if count else "")
    return "".join([*parts, "</svg>"])


def drawable(points: ArrayLike, is_log: bool = False) -> Points:
    """The points that are finite and, for a log axis, positive."""
    points_N2 = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    is_drawn_N = np.isfinite(points_N2).all(1) & ((points_N2[:, 1] > 0) | (not is_log))
    return points_N2[is_drawn_N]


def thin(points: Points, columns: int = COLUMNS) -> Points:
    """Of `columns` equal stretches of x the points with the least and the largest y, and the first and the last of all.

    So a spike of one step in a million stays.
    """
    x_N, y_N = points.T
    if len(points) <= 2 * columns or x_N[-1] <= x_N[0]:
        return points[: 2 * columns]
    column_N = np.minimum((x_N - x_N[0]) / (x_N[-1] - x_N[0]) * columns, columns - 1).astype(np.int64)
    order_N = np.lexsort((y_N, column_N))
    ends_N = np.flatnonzero(np.diff(column_N[order_N], append=columns))
    starts_N = np.concatenate([[0], ends_N[:-1] + 1])
    places_K = np.unique(np.concatenate([order_N[starts_N], order_N[ends_N], [0, len(points) - 1]]))
    thinned: Points = points[places_K]
    return thinned


def smooth(points: ArrayLike, share: float = 0.03, is_log: bool = False) -> Points:
    """Exponential moving average over about `share` of the points, without the usual bias towards the first value.

    `is_log` averages logarithms (for a log axis); points that cannot be drawn on such an axis are left out.
    """
    points_N2 = drawable(points, is_log).copy()
    keep = 1 - 1 / max(1.0, share * len(points_N2))
    total, weight, means = 0.0, 0.0, []
    for y in (np.log(points_N2[:, 1]) if is_log else points_N2[:, 1]).tolist():
        total, weight = keep * total + y, keep * weight + 1
        means.append(total / weight)
    points_N2[:, 1] = np.exp(means) if is_log else means
    return points_N2


def _widen(low: float, high: float) -> tuple[float, float]:
    """A range of positive width: a flat line gets room around it."""
    if high > low:
        return low, high
    room = abs(low) * 0.5 or 1.0
    return low - room, high + room


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) inside a range."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten where they fit, otherwise powers of ten; round numbers where these are too few.

    `low`, `high` are logarithms.
    """
    mantissas = (1, 2, 5) if high - low < 3 else (1,)
    decades = range(math.floor(low), math.ceil(high) + 1)
    found = [m * 10.0**d for d in decades for m in mantissas if low <= math.log10(m * 10.0**d) <= high]
    return found if len(found) > 1 else _ticks(10.0**low, 10.0**high)


def _number(value: float) -> str:
    if abs(value) >= 10_000:
        exponent = 6 if abs(value) >= 1e6 else 3
        return f"{value / 10**exponent:.4g}{'M' if exponent == 6 else 'k'}" if abs(value) < 1e9 else f"{value:.3g}"
    return f"{value:.0f}" if value == round(value) else f"{value:.3g}"
