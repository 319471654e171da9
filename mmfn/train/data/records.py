"""Dataset files: JSON or JSONL in the messages/images format, checked whole and brought to one form.

One entry: `{"id"?, "messages": [{"role", "content"}], "images"?: [path], "videos"?: [path or [frame path]],
"audios"?: [path], "tools"?}`. Content is a string in which `<image>`, `<video>` and `<audio>` mark media in order, or a
list of parts, `{"type": "text", "text"}` and `{"type": "image"}`, the latter optionally with its own path. LLaVA's
`{"conversations": [{"from", "value"}], "image"}` is read too.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mmfn.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
LLAVA_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
MESSAGE_KEYS = ("role", "content", "tool_calls", "tool_call_id", "name")
MEDIA = ("image", "video", "audio")
_MARKER = re.compile("(<image>|<video>|<audio>)")
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


def read_records(path: Path) -> list[Record]:
    """All entries of a JSON (one list) or JSONL (one object per line) file.

    Raises ValueError, naming the file and the entry's index (from 0), for anything not in the format.
    """
    records = []
    for index, entry in enumerate(_entries(path)):
        try:
            records.append(parse_record(entry, str(index)))
        except UserError as error:
            raise UserError(f"dataset {str(path)!r}, entry {index}: {error}") from None
    if not records:
        raise UserError(f"dataset {str(path)!r} is empty; it must hold at least one conversation")
    return records


def parse_record(entry: Any, default_id: str) -> Record:
    """One decoded entry -> `Record`. Raises ValueError with one sentence (the caller adds the file and index)."""
    if not isinstance(entry, dict):
        raise UserError(f"an entry must be an object, got {type(entry).__name__}")
    _check_text(entry)
    if ("messages" in entry) == ("conversations" in entry):
        raise UserError("an entry needs exactly one of 'messages' and 'conversations'")
    identity = entry.get("id", default_id)
    if not isinstance(identity, str | int) or isinstance(identity, bool):
        raise UserError(f"'id' must be a string or an integer, got {identity!r}")
    listed: dict[str, list[Any]] = {kind: _media_list(entry, kind) for kind in MEDIA}
    media: dict[str, list[Any]] = {kind: [] for kind in MEDIA}
    num_marked = dict.fromkeys(MEDIA, 0)
    messages = []
    for place, message in enumerate(_raw_messages(entry)):
        try:
            parsed = _parse_message(message, place)
        except UserError as error:
            raise UserError(f"message {place}: {error}") from None
        messages.append(parsed)
        for part in parsed["content"] if isinstance(parsed["content"], list) else ():
            kind = part["type"]
            if kind in MEDIA:
                num_marked[kind] += kind not in part
                media[kind].append(part.get(kind) or next(iter(listed[kind][num_marked[kind] - 1 :]), None))
    for kind in MEDIA:
        if num_marked[kind] != len(listed[kind]):
            raise UserError(
                f"sample {str(identity)!r} has {num_marked[kind]} {kind} placeholders for {len(listed[kind])} {kind}s; "
                f"write one <{kind}> for each"
            )
    return Record(
        id=str(identity),
        messages=tuple(messages),
        images=tuple(media["image"]),
        videos=tuple(media["video"]),
        audios=tuple(media["audio"]),
        tools=_tools(entry.get("tools")),
    )


def count_media(messages: Sequence[Message], kind: str) -> int:
    """Number of parts of a kind ("image", "video" or "audio") in parsed messages."""
    contents = [m["content"] for m in messages if isinstance(m["content"], list)]
    return sum(part["type"] == kind for content in contents for part in content)


def plain_text(message: Message) -> str:
    """The text of a parsed message, parts joined."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _entries(path: Path) -> Iterator[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"dataset {str(path)!r} cannot be read ({error}); give a JSON or JSONL file") from error
    if text.lstrip()[:1] == "[":
        try:
            yield from json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"dataset {str(path)!r} is not valid JSON ({error}); repair the file") from None
        return
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON strings may hold U+2028
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"dataset {str(path)!r}, line {number}: not valid JSON ({error}); repair it") from None


def _check_text(entry: Mapping[str, Any]) -> None:
    """JSON can spell half of a surrogate pair, which no tokenizer and no file takes."""
    try:
        json.dumps(entry, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end]
        raise UserError(f"the text holds {half!r}, which is half a character; remove it or write it whole") from None
    except RecursionError:
        raise UserError("the entry is nested too deeply; flatten it") from None


def _raw_messages(entry: Mapping[str, Any]) -> list[Any]:
    name = "messages" if "messages" in entry else "conversations"
    raw = entry[name]
    if not isinstance(raw, list) or not raw:
        raise UserError(f"{name!r} must be a list of at least one message, got {raw!r}")
    return raw if name == "messages" else [_from_llava(place, turn) for place, turn in enumerate(raw)]


def _from_llava(place: int, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        raise UserError(f"message {place}: a turn of 'conversations' needs 'from' and 'value', got {turn!r}")
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in LLAVA_ROLES:
        raise UserError(f"message {place}: 'from' must be one of {sorted(LLAVA_ROLES)}, got {speaker!r}")
    return {"role": LLAVA_ROLES[speaker], "content": turn["value"]}


def _parse_message(message: Any, place: int) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise UserError(f"a message must be an object, got {type(message).__name__}")
    for key in message:
        if key not in MESSAGE_KEYS:
            near = get_close_matches(key, MESSAGE_KEYS, n=1, cutoff=0.0)[0]
            raise UserError(f"unknown key {key!r}, nearest is {near!r}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise UserError(f"'role' must be one of {list(ROLES)}, got {role!r}")
    if role == "system" and place > 0:
        raise UserError("the 'system' message must come first; chat templates drop a later one")
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, str):
        parts = [_from_marker(piece) for piece in _MARKER.split(content) if piece]
        content = parts if any(part["type"] in MEDIA for part in parts) else content
    elif isinstance(content, list):
        content = [_parse_part(part) for part in content]
    else:
        raise UserError(f"'content' must be a string or a list of parts, got {content!r}")
    if role in ("system", "assistant") and isinstance(content, list) and any(p["type"] in MEDIA for p in content):
        raise UserError(f"media cannot stand in a message of the {role}; move them to the user's")
    return {**message, "content": content}


def _from_marker(piece: str) -> dict[str, Any]:
    return {"type": piece[1:-1]} if _MARKER.fullmatch(piece) else {"type": "text", "text": piece}


def _parse_part(part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", *MEDIA):
        raise UserError(f"a part needs a 'type' of text, image, video or audio, got {part!r}")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise UserError(f"a text part needs a string 'text', got {part!r}")
        return {"type": "text", "text": part["text"]}
    path = part.get(kind)
    return {"type": kind} if path is None else {"type": kind, kind: _media_path(path, kind)}


def _media_list(entry: Mapping[str, Any], kind: str) -> list[Any]:
    """`images` (or LLaVA's `image`, one path or a list) as a checked list."""
    if entry.get(kind) is not None and entry.get(f"{kind}s") is not None:
        raise UserError(f"an entry needs one of '{kind}' and '{kind}s', not both")
    raw = entry.get(f"{kind}s", entry.get(kind))
    raw = [] if raw is None else [raw] if isinstance(raw, str) else raw
    if not isinstance(raw, list):
        raise UserError(f"'{kind}s' must be a list of paths, got {raw!r}")
    return [_media_path(path, kind) for path in raw]


def _media_path(path: Any, kind: str) -> str | tuple[str, ...]:
    frames = path if kind == "video" and isinstance(path, list) else [path]
    if frames and all(isinstance(frame, str) and frame and "\0" not in frame for frame in frames):
        return tuple(frames) if frames is path else frames[0]
    raise UserError(f"a path of '{kind}s' must be a non-empty string without null characters, got {path!r}")


def _tools(raw: Any) -> tuple[Mapping[str, Any], ...]:
    if isinstance(raw, str) and raw.strip():
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise UserError(f"'tools' is a string but not JSON ({error})") from None
    if not raw:
        return ()
    if not isinstance(raw, list) or not all(isinstance(tool, dict) for tool in raw):
        raise UserError(f"'tools' must be a list of JSON schemas, got {raw!r}")
    return tuple(raw)
