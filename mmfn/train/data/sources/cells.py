"""Cells of tables as JSON values: the nulls a table adds are left out, and bytes become media with a name."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from mmfn.errors import UserError
from mmfn.train.data.entries import show


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without nulls, in which media stored as bytes are their names.

    >>> plain({"id": None, "images": [{"bytes": b"...", "path": "a.png"}, {"bytes": b"...", "path": None}]})
    {'images': ['images/0/a.png', 'images/1']}

    Raises ValueError for a value that JSON does not know, such as a date.
    """
    return {key: _plain(value, key) for key, value in row.items() if value is not None}


def stored_bytes(row: Mapping[str, Any], name: str) -> bytes | None:
    """The bytes of the medium that `plain` names so; None where it stores none."""
    cells = (cell for key, value in row.items() for cell in _media(value, key))
    return next((data for known, data in cells if known == name), None)


def _plain(value: Any, place: str) -> Any:
    if isinstance(value, bytes) or _is_medium(value):
        return _name(value, place)
    if isinstance(value, dict):
        return {key: _plain(item, f"{place}/{key}") for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_plain(item, f"{place}/{number}") for number, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{place!r} holds {value}, which is no JSON number; remove it")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise UserError(f"{place!r} holds {show(value)} of type {type(value).__name__}; store it as text or a number")


def _media(value: Any, place: str) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of all media in a cell, in order."""
    if isinstance(value, bytes):
        yield _name(value, place), value
    elif _is_medium(value):
        if value["bytes"] is not None:
            yield _name(value, place), value["bytes"]
    elif isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _media(item, f"{place}/{key}")


def _is_medium(value: Any) -> bool:
    """What `datasets` stores of an image, a video or a sound."""
    return isinstance(value, dict) and value.keys() == {"bytes", "path"} and isinstance(value["bytes"], bytes | None)


def _name(value: Any, place: str) -> str:
    """The path of a medium, followed by its place where bytes are stored, so that no two of a row have one name."""
    path = value["path"] if isinstance(value, dict) else None
    if isinstance(value, dict) and value["bytes"] is None:
        if not isinstance(path, str):
            raise UserError(f"{place!r} has neither bytes nor a path; store the file in it")
        return path
    return place if path is None else f"{place}/{path}"
