"""Formats of entries: a table of readers that bring each to messages and media, the one form that is parsed.

`{"id"?, "messages": [{"role", "content"}], "images"?, "videos"?, "audios"?, "tools"?}`
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from mmfn.errors import UserError
from mmfn.train.data.entries import IGNORE_IT, check_keys, show, without_nulls
from mmfn.train.data.formats.alpaca import read_alpaca
from mmfn.train.data.formats.openai import list_messages, read_openai
from mmfn.train.data.formats.turns import read_turns
from mmfn.train.dialect import FORMATS, Dialect, Names, resolve, singular

MISSPELT = 0.8  # keys as alike as this are
MEDIA = ("image", "video", "audio")
COLUMNS = frozenset(("id", *MEDIA, *(name for row in FORMATS.values() for name in row.columns.values())))
Reader = Callable[[Mapping[str, Any], Names, Names], list[Any]]
READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "messages": list_messages,
        "openai": read_openai,
        "llava": read_turns,
        "sharegpt": read_turns,
        "multimodal_tool": read_turns,
        "alpaca": read_alpaca,
    }
)


def to_messages(entry: Any, dialect: Dialect) -> dict[str, Any]:
    """An entry of any format in the one form; what it says is checked only as far as the form needs it.

    Raises ValueError for an unknown key, for a format that "auto" cannot tell, and for what a reader refuses.
    """
    if not isinstance(entry, dict):
        raise UserError(f"an entry must be an object, got {type(entry).__name__}; write one conversation in each")
    entry = without_nulls(_without(entry, dialect.ignore), COLUMNS)
    if dialect.format == "auto":
        dialect = replace(dialect, format=detect(entry))
    columns, tags = resolve(dialect)
    turns = entry.get(columns["messages"]) if "messages" in columns else None
    if dialect.ignore and isinstance(turns, list):
        entry = {**entry, columns["messages"]: [_without(turn, dialect.ignore) for turn in turns]}
    key = dialect.columns.get("messages")
    if key is not None and key not in entry:
        raise UserError(
            f"data.columns calls the messages {key!r} but the entry has the keys {show(sorted(entry))}; correct it"
        )
    single = [singular(columns[f"{kind}s"]) for kind in MEDIA]
    check_keys(entry, ("id", *columns.values(), *single), f"an entry in format {dialect.format}", IGNORE_IT)
    form: dict[str, Any] = {"id": entry["id"]} if "id" in entry else {}
    form["messages"] = READERS[dialect.format](entry, columns, tags)
    for kind in MEDIA:
        listed = _media(entry, columns[f"{kind}s"])
        form |= {} if listed is None else {f"{kind}s": listed}
    tools = entry.get(columns["tools"]) if "tools" in columns else None
    return form | ({} if tools is None else {"tools": tools})


def detect(entry: Mapping[str, Any]) -> str:
    """The format of an entry by its keys and speakers. Raises ValueError where several fit or none does.

    `conversations` are ShareGPT (LLaVA's are read alike), `instruction` or `output` alpaca, `messages` ours; these with
    a tool_call or tool_response multimodal_tool, with a developer or parts of URLs those of chat APIs.
    """
    marks = {
        "messages": ("messages",),
        "sharegpt": ("conversations",),
        "alpaca": ("instruction", "output"),
    }
    fits = [name for name, keys in marks.items() if any(key in entry for key in keys)]
    if len(fits) != 1:
        found = f"has the keys of {' and '.join(fits)}" if fits else f"has the keys {show(sorted(entry))}"
        known = [key for keys in marks.values() for key in keys]
        near = [(key, like[0]) for key in entry if (like := get_close_matches(key, known, n=1, cutoff=MISSPELT))]
        if near and not fits:
            found += f", where {near[0][0]!r} is almost {near[0][1]!r}"
        raise UserError(
            "an entry needs exactly one of 'messages' and 'conversations', or 'instruction' and 'output', but this one "
            f"{found}; set data.format and data.columns"
        )
    turns = entry.get("conversations" if fits == ["sharegpt"] else "messages")
    turns = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    if fits == ["sharegpt"] and any({"role", "content"} <= turn.keys() for turn in turns):
        raise UserError("'conversations' hold 'role' and 'content'; set data.format to sharegpt and data.tags to them")
    if fits != ["messages"]:
        return fits[0]
    if any({"from", "value"} <= turn.keys() for turn in turns):
        raise UserError("'messages' hold 'from' and 'value'; set data.format to sharegpt and data.columns to messages")
    is_tool = any(turn.get("role") in ("tool_call", "tool_response") for turn in turns)
    is_api = any(turn.get("role") == "developer" or _has_url(turn.get("content")) for turn in turns)
    has_calls = any(turn.get("tool_calls") is not None or turn.get("role") == "tool" for turn in turns)
    if is_tool and (is_api or has_calls):
        raise UserError(
            "turns of a tool_call or tool_response stand beside 'tool_calls', 'tool' or 'developer', which are another "
            "format; write all in one"
        )
    return "multimodal_tool" if is_tool else "openai" if is_api else "messages"


def _has_url(content: Any) -> bool:
    parts = content if isinstance(content, list) else ()
    return any(isinstance(part, dict) and str(part.get("type")).endswith("_url") for part in parts)


def _without(item: Any, ignore: tuple[str, ...]) -> Any:
    return {key: value for key, value in item.items() if key not in ignore} if isinstance(item, dict) else item


def _media(entry: Mapping[str, Any], key: str) -> list[Any] | None:
    """`images` (or LLaVA's `image`), a path or a list of paths, as a list; None where there are none."""
    single = singular(key)
    values = {name: entry[name] for name in (key, single) if entry.get(name) is not None}
    if len(values) > 1:
        raise UserError(f"an entry needs one of {single!r} and {key!r}, not both; join them in {key!r}")
    raw = next(iter(values.values()), None)
    if raw is None or isinstance(raw, list):
        return raw
    if not isinstance(raw, str):
        raise UserError(f"{key!r} must be a list of paths, got {show(raw)}; put the path in a list")
    return [raw]
