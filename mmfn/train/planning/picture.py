"""Plans as a picture: one HTML file without external resources, for one plan or for many beside each other."""

from collections import Counter
from collections.abc import Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from mmfn.errors import UserError
from mmfn.page import page_head
from mmfn.parallel.mesh.layout import Layout
from mmfn.parallel.planning.plan import Plan, size
from mmfn.parallel.planning.time_model import MODEL
from mmfn.parallel.planning.trace import CATEGORIES

WIDTH, HEIGHT, MARGIN = 640, 320, 48
HEAD = page_head("mmfn plan")


def render(plans: Sequence[Plan]) -> str:
    """The page as text; everything in it is escaped. Raises ValueError when there is no plan."""
    if not plans:
        raise UserError("a report needs at least one plan; plan a layout that the model can take")
    template = resources.files("mmfn.train.planning").joinpath("picture.html.jinja").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(template)
    first = plans[0]
    limit = first.memory_bytes
    return page.render(
        head=HEAD,
        title=first.title,
        device=first.device,
        limit=size(limit),
        model=MODEL,
        categories=CATEGORIES,
        rows=[_row(p, max(limit, *(q.peak_bytes for q in plans))) for p in plans],
        wires=_bars([_wires(p) for p in plans]),
        dots=_dots(plans),
        width=WIDTH,
        height=HEIGHT,
        text=str(first),
    )


def _row(plan: Plan, scale: float) -> dict[str, Any]:
    """One plan's memory bar: its categories as shares of the widest bar."""
    parts = [
        {"index": CATEGORIES.index(name), "name": name, "size": size(n), "percent": f"{100 * n / scale:.2f}"}
        for name, n in plan.peak_parts.items()
    ]
    return {
        "name": _name(plan),
        "peak": size(plan.peak_bytes),
        "fits": plan.fits,
        "seconds": f"{plan.time.total_s:.3g}",
        "hfu": f"{plan.time.hfu:.1%}",
        "parts": parts,
    }


def _wires(plan: Plan) -> tuple[str, dict[str, int]]:
    bytes_by_axis: Counter[str] = Counter()
    for c in plan.collectives:
        bytes_by_axis[f"{c.axis} ({'node' if c.is_inside_node else 'network'})"] += c.wire_bytes
    return _name(plan), dict(bytes_by_axis)


def _bars(tables: Sequence[tuple[str, dict[str, int]]]) -> list[dict[str, Any]]:
    """One bar per plan and axis."""
    most = max((n for _, table in tables for n in table.values()), default=0) or 1
    return [
        {"plan": name, "axis": axis, "size": size(n), "percent": f"{100 * n / most:.2f}"}
        for name, table in tables
        for axis, n in table.items()
    ]


def _dots(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """Memory to the right, time upwards, both from 0."""
    memory, time = max(p.peak_bytes for p in plans) or 1, max(p.time.total_s for p in plans) or 1
    return [
        {
            "x": f"{MARGIN + p.peak_bytes / memory * (WIDTH - 2 * MARGIN):.1f}",
            "y": f"{HEIGHT - MARGIN - p.time.total_s / time * (HEIGHT - 2 * MARGIN):.1f}",
            "fits": p.fits,
            "hint": f"{_name(p)}: {size(p.peak_bytes)}, {p.time.total_s:.3g} s",
        }
        for p in plans
    ]


def _name(plan: Plan) -> str:
    return " · ".join([str(Layout(**plan.layout)), *(n for n in plan.notes if n.startswith(("remat", "context")))])
