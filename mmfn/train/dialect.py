"""Formats of data files: what each calls its keys (columns) and the speakers of its turns (tags), in one table.

The names of columns and tags are those of LLaMA-Factory's `dataset_info.json` and MindSpeed-MM's `attr`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType

from mmfn.errors import UserError

Names = Mapping[str, str]
_MEDIA = {"images": "images", "videos": "videos", "audios": "audios"}
_LLAVA_TAGS = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}
_TURNS = {"messages": "conversations", "system": "system", "tools": "tools", **_MEDIA}
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system"}


@dataclass(frozen=True, kw_only=True)
class Format:
    """One row of the table. `columns`, `tags`: their names and what they stand for unless a user says otherwise."""

    columns: Names
    tags: Names = field(default_factory=dict)


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "messages": Format(columns={"messages": "messages", "tools": "tools", **_MEDIA}),
        "openai": Format(columns={"messages": "messages", "tools": "tools", **_MEDIA}),
        "llava": Format(
            columns={"messages": "conversations", **_MEDIA},
            tags={**_LLAVA_TAGS, "system_tag": "system"},
        ),
        "sharegpt": Format(
            columns=_TURNS,
            tags={
                **_LLAVA_TAGS,
                "system_tag": "system",
                "observation_tag": "observation",
                "function_tag": "function_call",
            },
        ),
        "multimodal_tool": Format(
            columns={**_TURNS, "messages": "messages"},
            tags={
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
                "system_tag": "system",
                "observation_tag": "tool_response",
                "function_tag": "tool_call",
            },
        ),
        "alpaca": Format(columns={**_ALPACA, "tools": "tools", **_MEDIA}),
    }
)


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How the entries of a file are to be read.

    `format`: a row of `FORMATS`, or "auto", which finds it out for each entry. `columns`, `tags`: by name, those that
    are called otherwise than in that row. `ignore`: keys of entries and turns that are left out.
    """

    format: str = "auto"
    columns: Names = field(default_factory=dict)
    tags: Names = field(default_factory=dict)
    ignore: tuple[str, ...] = ()


def check_dialect(dialect: Dialect) -> None:
    """Raises ValueError for an unknown format, column or tag, and for names that stand for one key or speaker twice."""
    if dialect.format == "auto":
        for kind, names in (("columns", dialect.columns), ("tags", dialect.tags)):
            if names:
                raise UserError(f"{kind} need a format; set one of {', '.join(FORMATS)} instead of 'auto'")
        for key in dialect.ignore:
            read = {name for row in FORMATS.values() for name in (*row.columns.values(), *row.tags.values())}
            if key in (*read, *map(singular, _MEDIA)):
                raise UserError(f"{key!r} is to be ignored but some format reads it; set the format, or remove it")
        return
    if dialect.format not in FORMATS:
        raise UserError(f"unknown format {dialect.format!r}; use auto or one of {', '.join(FORMATS)}")
    row = FORMATS[dialect.format]
    for kind, names, known in (("column", dialect.columns, row.columns), ("tag", dialect.tags, row.tags)):
        for name, key in names.items():
            if name not in known:
                near = get_close_matches(name, known, n=1, cutoff=0.0)
                hint = f"; the nearest is {near[0]!r}" if near else f"; it has no {kind}s, remove it"
                raise UserError(f"format {dialect.format!r} has no {kind} {name!r}{hint}")
            if not key:
                raise UserError(f"{kind} {name!r} is empty; give it the name that the file uses")
    columns, tags = resolve(dialect)
    one_medium = {
        f"one of {name}": singular(columns[name]) for name in _MEDIA if singular(columns[name]) != columns[name]
    }
    speakers = {name: tag for name, tag in tags.items() if name not in ("role_tag", "content_tag")}
    parts = {name: tag for name, tag in tags.items() if name not in speakers}
    for kind, names in (("columns", {**columns, **one_medium}), ("tags", speakers), ("tags", parts)):
        seen: dict[str, str] = {}
        for name, key in names.items():
            if key in seen:
                raise UserError(f"{kind} {seen[key]!r} and {name!r} both stand for {key!r}; give them different names")
            seen[key] = name
    for key in dialect.ignore:
        if key in (*columns.values(), *one_medium.values(), *parts.values()):
            raise UserError(f"{key!r} is to be ignored but format {dialect.format!r} reads it; remove it from the list")


def singular(column: str) -> str:
    """What the key of a list of media is called where there is one of them: images -> image."""
    return column.removesuffix("s")


def resolve(dialect: Dialect) -> tuple[Names, Names]:
    """(columns, tags) of a dialect with a format: the table's, and over them the user's."""
    row = FORMATS[dialect.format]
    return {**row.columns, **dialect.columns}, {**row.tags, **dialect.tags}
