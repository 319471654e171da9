"""Data sets of a run: a path, or a list of them with what differs between them."""

from collections.abc import Sequence
from typing import Annotated, Any

from annotated_types import Len
from pydantic import BeforeValidator, Field, PositiveInt, ValidationError

from mmfn.errors import UserError
from mmfn.train.config.section import ConfigSection


class SetSection(ConfigSection):
    """One data set of several."""

    path: str = Field(description="file, pattern of files, or folder (docs/data.md)")
    weight: Annotated[float, Field(gt=0)] | None = Field(default=None, description="its share of the samples")
    format: str | None = Field(default=None, description="as data.format, with columns and tags of its own")
    columns: dict[str, str] = Field(default={}, description="as data.columns")
    tags: dict[str, str] = Field(default={}, description="as data.tags")
    root: str | None = Field(default=None, description="as data.root")
    max_samples: PositiveInt | None = Field(default=None, description="how many entries are used; null: all")


def list_sets(value: str | Sequence[SetSection] | None) -> tuple[SetSection, ...]:
    """`data.train` or `data.eval` as a list, empty for null."""
    if value is None:
        return ()
    return (SetSection(path=value),) if isinstance(value, str) else tuple(value)


def _read_sets(value: Any) -> Any:
    """A path, a set or a list of both -> a path or a tuple of sets. Raises ValueError for an item that is neither."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    if not value:
        raise UserError("it names no data set")
    return tuple(_read_set(item, place) for place, item in enumerate(value))


def _read_set(item: Any, place: int) -> SetSection:
    if isinstance(item, str):
        return SetSection(path=item)
    if isinstance(item, SetSection):
        return item
    try:
        return SetSection.model_validate(item)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        known = ", ".join(SetSection.model_fields)
        what = f"unknown key {first['loc'][0]!r}, known are {known}" if first["type"] == "extra_forbidden" else ""
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"item {place}: {what or ': '.join(filter(None, (key, first['msg'])))}") from None


Sets = Annotated[
    str | tuple[SetSection, ...],
    BeforeValidator(_read_sets, json_schema_input_type=str | SetSection | Annotated[list[str | SetSection], Len(1)]),
]
