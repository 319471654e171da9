"""Line charts as SVG text. No library: a report must open anywhere, offline. Colours come from the page's CSS."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from mmfn.errors import UserError

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 34  # room for tick labels
MAX_POINTS = 1500  # more cannot be seen; keeps a report of a long run small

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve. `style` is a CSS class of the page: "raw" (faint), "main" or "second". `mark` shows each point."""

    points: Sequence[Point]
    style: str = "main"
    name: str = ""
    mark: bool = False


def line_chart(lines: Sequence[Line], *, x_label: str, y_label: str, is_log: bool = False) -> str:
    """An SVG element with axes, grid and the lines; points that are not finite (if `is_log`: positive) are left out.

    Raises ValueError when no point is left to draw.
    """
    kept = [[p for p in line.points if _drawable(p, is_log)] for line in lines]
    flat = [p for points in kept for p in points]
    if not flat:
        raise UserError(f"chart {y_label!r} has no finite point to draw; give at least one")
    x_range = _widen(min(x for x, _ in flat), max(x for x, _ in flat))
    ys = [math.log10(y) if is_log else y for _, y in flat]
    y_range = _widen(min(ys), max(ys))
    x_ticks, y_ticks = _ticks(*x_range), _log_ticks(*y_range) if is_log else _ticks(*y_range)

    def x_at(x: float) -> float:
        return LEFT + (x - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - LEFT - RIGHT)

    def y_at(y: float) -> float:
        value = math.log10(y) if is_log else y
        return HEIGHT - BOTTOM - (value - y_range[0]) / (y_range[1] - y_range[0]) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label, quote=True)}">'
    ]
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_at(y):.1f}" y2="{y_at(y):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y_at(y) + 4:.1f}" text-anchor="end">{_number(y)}</text>')
    for x in x_ticks:
        parts.append(f'<text class="tick" x="{x_at(x):.1f}" y="{HEIGHT - 16}" text-anchor="middle">{_number(x)}</text>')
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{escape(x_label)}</text>')
    for line, points in zip(lines, kept, strict=True):
        places = [f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in _thin(points)]
        parts.append(
            f'<polyline class="{line.style}" points="{" ".join(places)}"><title>{escape(line.name)}</title></polyline>'
        )
        for (x, y), place in zip(_thin(points) if line.mark else [], places, strict=False):
            cx, cy = place.split(",")
            hint = f"{line.name} {x:g}: {y:.4g}"
            parts.append(
                f'<circle class="{line.style}" cx="{cx}" cy="{cy}" r="3"><title>{escape(hint)}</title></circle>'
            )
    return "".join([*parts, "</svg>"])


def smooth(points: Sequence[Point], share: float = 0.03, is_log: bool = False) -> list[Point]:
    """Exponential moving average over about `share` of the points, without the usual bias towards the first value.

    `is_log` averages logarithms (for a log axis); points that cannot be drawn on such an axis are left out.
    """
    keep = 1 - 1 / max(1.0, share * len(points))
    total, weight, out = 0.0, 0.0, []
    for x, y in points:
        if _drawable((x, y), is_log):
            total, weight = keep * total + (math.log(y) if is_log else y), keep * weight + 1
            mean = total / weight
            out.append((x, math.exp(mean) if is_log else mean))
    return out


def _drawable(point: Point, is_log: bool) -> bool:
    return all(map(math.isfinite, point)) and (point[1] > 0 or not is_log)


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
    """1, 2 and 5 times powers of ten where they fit, otherwise powers of ten only. `low`, `high` are logarithms."""
    mantissas = (1, 2, 5) if high - low < 3 else (1,)
    decades = range(math.floor(low), math.ceil(high) + 1)
    return [m * 10.0**d for d in decades for m in mantissas if low <= math.log10(m * 10.0**d) <= high]


def _number(value: float) -> str:
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e6 else f"{value:.3g}"


def _thin(points: Sequence[Point]) -> Sequence[Point]:
    """At most about MAX_POINTS points, always with the last."""
    stride = math.ceil(len(points) / MAX_POINTS)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]
