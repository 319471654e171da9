"""Records: entries of dataset files, checked whole and brought to one form.

Entries of every format (`mmfn.train.data.formats`) become `{"id"?, "messages": [{"role", "content"}], "images"?:
[path], "videos"?: [path or [frame path]], "audios"?: [path], "tools"?}`, which is parsed here. Content is a string in
which `<image>`, `<video>` and `<audio>` mark media in order, or a list of parts, `{"type": "text", "text"}` and
`{"type": "image"}`, the latter optionally with its own path.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mmfn.errors import UserError
from mmfn.train.data.calls import check_answers, read_calls, read_tools
from mmfn.train.data.entries import IGNORE_IT, check_keys, check_text, read_entries, show
from mmfn.train.data.formats import MEDIA, to_messages
from mmfn.train.dialect import Dialect

KEYS = {
    "system": ("role", "content"),
    "user": ("role", "content"),
    "assistant": ("role", "content", "reasoning_content", "tool_calls"),
    "tool": ("role", "content", "tool_call_id", "name"),
}
"""The keys of a message by its role."""
_MARKER = re.compile("(<image>|<video>|<audio>)")
_URL = re.compile("(data|file):|[a-z][a-z0-9+.-]*://", re.IGNORECASE)
Message = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One conversation as stored: messages whose content is a string or a list of parts, and media in their order.

    A video is one path, or a tuple of paths of its frames. Paths are relative to the dataset's media root.
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[str, ...] = ()
    videos: tuple[str | tuple[str, ...], ...] = ()
    audios: tuple[str, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()


def read_records(path: Path, dialect: Dialect | None = None, max_samples: int | None = None) -> list[Record]:
    """All entries of a JSON (one list) or JSONL (one object per line) file, or its first `max_samples`.

    Raises ValueError, naming the file and the entry's index (from 0), for anything not in the format.
    """
    records = [record for _, record in islice(read_forms(path, dialect), max_samples)]
    if not records:
        raise UserError(f"dataset {str(path)!r} is empty; it must hold at least one conversation")
    return records


def read_forms(path: Path, dialect: Dialect | None = None) -> Iterator[tuple[dict[str, Any], Record]]:
    """Every entry in the one form (see above), and parsed. Raises as `read_records` does."""
    for index, entry in enumerate(read_entries(path)):
        try:
            check_text(entry)
            form = to_messages(entry, dialect or Dialect())
            record = _parse_form(form, str(index))
        except UserError as error:
            raise UserError(f"dataset {str(path)!r}, entry {index}: {error}") from None
        yield form, record


def parse_record(entry: Any, default_id: str, dialect: Dialect | None = None) -> Record:
    """One decoded entry -> `Record`. Raises ValueError with one sentence (the caller adds the file and index)."""
    check_text(entry)
    return _parse_form(to_messages(entry, dialect or Dialect()), default_id)


def count_media(messages: Sequence[Message], kind: str) -> int:
    """Number of parts of a kind ("image", "video" or "audio") in parsed messages."""
    contents = [m["content"] for m in messages if isinstance(m["content"], list)]
    return sum(part["type"] == kind for content in contents for part in content)


def plain_text(message: Message) -> str:
    """The text of a parsed message, parts joined."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _parse_form(form: Mapping[str, Any], default_id: str) -> Record:
    identity = form.get("id", default_id)
    if not isinstance(identity, str | int) or isinstance(identity, bool):
        raise UserError(f"'id' must be a string or an integer, got {show(identity)}; quote or remove it")
    listed = {kind: [_media_path(path, kind) for path in form.get(f"{kind}s", ())] for kind in MEDIA}
    messages = [_parse_message(message, place) for place, message in enumerate(form["messages"])]
    check_answers(messages)
    media: dict[str, list[Any]] = {kind: [] for kind in MEDIA}
    num_marked = dict.fromkeys(MEDIA, 0)
    for part in (part for m in messages if isinstance(m["content"], list) for part in m["content"]):
        kind = part["type"]
        if kind in MEDIA:
            num_marked[kind] += kind not in part
            media[kind].append(part.get(kind) or next(iter(listed[kind][num_marked[kind] - 1 :]), None))
    for kind in MEDIA:
        if num_marked[kind] != len(listed[kind]):
            raise UserError(
                f"sample {str(identity)!r} has {num_marked[kind]} {kind} placeholders for {len(listed[kind])} {kind}s; "
                f"write one <{kind}> for each, in a turn of the user (where <{kind}> is meant as text, write the "
                "content as a list of parts)"
            )
    return Record(
        id=str(identity),
        messages=tuple(messages),
        images=tuple(media["image"]),
        videos=tuple(media["video"]),
        audios=tuple(media["audio"]),
        tools=read_tools(form.get("tools")),
    )


def _parse_message(message: Any, place: int) -> dict[str, Any]:
    try:
        if not isinstance(message, dict):
            raise UserError(f"a message must be an object, got {type(message).__name__}; write a role and content")
        role = message.get("role")
        if not isinstance(role, str) or role not in KEYS:
            check_keys(message, {key: None for keys in KEYS.values() for key in keys}, "a message")
            raise UserError(f"'role' must be one of {list(KEYS)}, got {show(role)}; correct it")
        check_keys(message, KEYS[role], f"a message of the {role}", IGNORE_IT)
        if role == "system" and place > 0:
            raise UserError(
                "the 'system' message must come first; chat templates drop a later one, join it with the first"
            )
        known = {key: value for key, value in message.items() if value is not None}
        for key in ("reasoning_content", "tool_call_id", "name"):
            if not isinstance(known.get(key, ""), str):
                raise UserError(f"{key!r} must be a string, got {show(known[key])}; quote or remove it")
        calls = read_calls(known.pop("tool_calls", []))
        content = _parse_content(known.get("content", "" if calls else None), role)
    except UserError as error:
        raise UserError(f"message {place}: {error}") from None
    return {**known, "content": content, **({"tool_calls": calls} if calls else {})}


def _parse_content(content: Any, role: str) -> str | list[dict[str, Any]]:
    takes_media = role in ("user", "tool")
    if isinstance(content, str):
        parts = [_from_marker(piece) for piece in _MARKER.split(content) if piece] if takes_media else []
        return parts if any(part["type"] in MEDIA for part in parts) else content
    if not isinstance(content, list):
        raise UserError(f"'content' must be a string or a list of parts, got {show(content)}; write the text there")
    parts = [_parse_part(part) for part in content]
    if not takes_media and any(part["type"] in MEDIA for part in parts):
        raise UserError(f"media cannot stand in a message of the {role}; move them to the user's")
    return parts


def _from_marker(piece: str) -> dict[str, Any]:
    return {"type": piece[1:-1]} if _MARKER.fullmatch(piece) else {"type": "text", "text": piece}


def _parse_part(part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", *MEDIA):
        raise UserError(f"a part needs a 'type' of text, image, video or audio, got {show(part)}; correct it")
    check_keys(part, ("type", kind), f"a part of type {kind}")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise UserError(f"a text part needs a string 'text', got {show(part)}; write the text there")
        return {"type": "text", "text": part["text"]}
    path = part.get(kind)
    return {"type": kind} if path is None else {"type": kind, kind: _media_path(path, kind)}


def _media_path(path: Any, kind: str) -> str | tuple[str, ...]:
    frames = path if kind == "video" and isinstance(path, list) else [path]
    if not frames or not all(isinstance(frame, str) and frame and "\0" not in frame for frame in frames):
        raise UserError(
            f"a path of '{kind}s' must be a non-empty string without null characters, got {show(path)}; name a file"
        )
    for frame in frames:
        if _URL.match(frame):
            raise UserError(f"'{kind}s' hold the URL {show(frame)}; save it as a file and write its path")
    return tuple(frames) if frames is path else frames[0]
