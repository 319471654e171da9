"""A survey as one HTML page without external resources: what the terminal shows, and samples with their pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from mmfn.page import page_head
from mmfn.train.report.chart import bar_chart
from mmfn.train.survey import text
from mmfn.train.survey.counts import histogram, total
from mmfn.train.survey.excerpt import Span
from mmfn.train.survey.survey import Survey

HEAD = page_head("mmfn data check")


@dataclass(frozen=True, kw_only=True)
class Excerpt:
    """A sample on the page. `images`: data URLs of its pictures."""

    id: str
    spans: Sequence[Span]
    images: Sequence[str] = ()


def render_page(survey: Survey, excerpts: Sequence[Excerpt], *, title: str, subtitle: str) -> str:
    """The page as text. All text in it is escaped."""
    counts = survey.counts
    charts = [
        (name, bar_chart([(f"{low:,}", num) for low, _, num in histogram(counter)], label=name))
        for name, counter in text.lengths(survey).items()
        if counter
    ]
    source = resources.files("mmfn.train.survey").joinpath("page.html.jinja").read_text(encoding="utf-8")
    tiles = [
        ("samples", f"{counts.samples:,}"),
        ("skipped", f"{counts.skipped:,}"),
        ("tokens", f"{total(counts.tokens):,}"),
        ("learned", f"{counts.trained / max(1, total(counts.tokens)):.1%}"),
    ]
    return (
        Environment(autoescape=True, undefined=StrictUndefined)
        .from_string(source)
        .render(
            head=HEAD,
            title=title,
            subtitle=subtitle,
            tiles=tiles,
            facts=text.facts(survey),
            charts=[(name, Markup(svg)) for name, svg in charts],  # our own SVG, escaped where it was made
            packing=text.packing(survey),
            settings=text.settings(survey),
            reasons=text.reasons(counts),
            excerpts=excerpts,
        )
    )
