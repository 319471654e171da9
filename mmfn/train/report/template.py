"""Pages from templates of this folder, which share a style; everything that is put into them is escaped."""

from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined


def render(name: str, **values: Any) -> str:
    """The page of a template."""
    folder = resources.files("mmfn.train.report")
    loader = FunctionLoader(lambda part: folder.joinpath(part).read_text(encoding="utf-8"))
    page = Environment(autoescape=True, undefined=StrictUndefined, loader=loader).get_template(name)
    return page.render(**values)
