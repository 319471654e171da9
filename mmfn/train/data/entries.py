"""Entries of JSON and JSONL files, as decoded, and how a wrong one is described."""

import json
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mmfn.errors import UserError

_SHOWN_CHARACTERS = 100
IGNORE_IT = "correct or remove it, or name it in data.ignore"


def read_entries(path: Path) -> Iterator[Any]:
    """The entries of a JSON (one list) or JSONL (one object per line) file, decoded.

    Raises ValueError naming the file, and the line of JSONL, for what is not JSON or has a key twice in one object.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"dataset {str(path)!r} cannot be read ({error}); give a JSON or JSONL file") from error
    if text.lstrip()[:1] == "[":
        try:
            yield from decode(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"dataset {str(path)!r} is not valid JSON ({error}); repair the file") from None
        return
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON strings may hold U+2028
        if line.strip():
            try:
                entry = decode(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"dataset {str(path)!r}, line {number}: not valid JSON ({error}); repair it") from None
            yield entry


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
    """Raises ValueError for a key that is not known, naming the nearest one. `what`: "an entry", "a text part"."""
    known = list(known)
    for key in item:
        if key not in known:
            near = get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise UserError(f"unknown key {key!r} of {what}, nearest is {near!r}; {fix}")


def show(value: Any) -> str:
    """A value as Python writes it, cut where a message would not end."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}... ({len(text)} characters)"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    item = dict(pairs)
    if len(item) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"key {twice!r} stands twice in one object")
    return item


def _refuse_constant(name: str) -> Any:
    raise UserError(f"{name} is no JSON number")
