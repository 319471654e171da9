"""Entries of data files, as decoded, and how a wrong one is described."""

import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from mmfn.errors import UserError

_SHOWN_CHARACTERS = 100
ALIKE = 0.5  # keys less alike than this are not taken for misspelt
IGNORE_IT = "correct or remove it, or name it in data.ignore"


def decode(text: str) -> Any:
    """JSON text as Python values. Raises ValueError also for a key that stands twice in an object, NaN and Infinity."""
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)


def check_text(entry: Any) -> None:
    """JSON can spell half of a surrogate pair, which no tokenizer and no file takes."""
    try:
        json.dumps(entry, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end]
        raise UserError(f"the text holds {half!r}, which is half a character; remove it or write it whole") from None
    except RecursionError:
        raise UserError("the entry is nested too deeply; flatten it") from None


def check_keys(item: Mapping[str, Any], known: Iterable[str], what: str, fix: str = "correct or remove it") -> None:
    """Raises ValueError for a key that is not known, naming the nearest or all. `what`: "an entry", "a text part"."""
    known = list(known)
    for key in item:
        if key not in known:
            near = get_close_matches(key[:_SHOWN_CHARACTERS], known, n=1, cutoff=ALIKE)
            hint = f"nearest is {near[0]!r}" if near else f"known are {', '.join(known)}"
            raise UserError(f"unknown key {show(key)} of {what}, {hint}; {fix}")


def without_nulls(item: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """An item without the nulls under `keys`, those of its neighbours: a table writes them where a key is missing.

    >>> without_nulls({"type": "text", "text": "hi", "image": None, "detail": None}, ("text", "image"))
    {'type': 'text', 'text': 'hi', 'detail': None}
    """
    keys = frozenset(keys)
    return {key: value for key, value in item.items() if value is not None or key not in keys}


def show(value: Any) -> str:
    """A value as Python writes it, cut where a message would not end."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}... ({len(text)} characters)"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    item = dict(pairs)
    if len(item) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"key {show(twice)} stands twice in one object")
    return item


def _refuse_constant(name: str) -> Any:
    raise UserError(f"{name} is no JSON number")
