"""Records: entries of data files, brought to one form and checked.

Entries of every format (`mmfn.train.data.formats`) become `{"id"?, "messages": [{"role", "content"}], "images"?:
[path], "videos"?: [path or [frame path]], "audios"?: [path], "tools"?}`, which is parsed here. Content is a string in
which `<image>`, `<video>` and `<audio>` mark media in order, or a list of parts, `{"type": "text", "text"}` and
`{"type": "image"}`, the latter optionally with its own path.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, overload

from mmfn.errors import UserError
from mmfn.models.data import SETTINGS
from mmfn.train.data.bad import BadSample
from mmfn.train.data.calls import check_answers, check_loss, read_calls, read_tools
from mmfn.train.data.entries import IGNORE_IT, check_keys, check_text, show, without_nulls
from mmfn.train.data.formats import MEDIA, to_messages
from mmfn.train.data.sources import Source
from mmfn.train.dialect import Dialect

KEYS = {
    "system": ("role", "content", "loss"),
    "user": ("role", "content", "loss"),
    "assistant": ("role", "content", "reasoning_content", "tool_calls", "loss"),
    "tool": ("role", "content", "tool_call_id", "name", "loss"),
}
"""The keys of a message by its role."""
_ALL_KEYS = frozenset(key for keys in KEYS.values() for key in keys)
READING = {"image": (), "video": ("video_start", "video_end", "use_audio_in_video"), "audio": ()}
"""What may be set of a medium beside `SETTINGS`: how its file is read."""
_PART_KEYS = ("text", *MEDIA, *(f"{kind}_url" for kind in MEDIA), *SETTINGS["video"], *READING["video"])
_MOST = 2**31  # of any setting: whatever is worked out of it is exact
_NUMBER = ((int, float), "a number")
_TYPES = {
    "fps": _NUMBER,
    "video_start": _NUMBER,
    "video_end": _NUMBER,
    "use_audio_in_video": ((bool,), "true or false"),
}
_MARKER = re.compile("(<image>|<video>|<audio>)")
_URL = re.compile("(data|file):|[a-z][a-z0-9+.-]*://", re.IGNORECASE)
Message = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One conversation as stored: messages whose content is a string or a list of parts, and media in their order.

    A video is one path, or a tuple of paths of its frames. Paths are relative to the dataset's media root. `settings`:
    of single media, by kind and place, where they have any.
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[str, ...] = ()
    videos: tuple[str | tuple[str, ...], ...] = ()
    audios: tuple[str, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    settings: Mapping[tuple[str, int], Mapping[str, Any]] = field(default_factory=dict)

    @property
    def media(self) -> list[str]:
        """All paths, of the frames of a video too."""
        videos = [(name,) if isinstance(name, str) else name for name in self.videos]
        return [*self.images, *self.audios, *(frame for frames in videos for frame in frames)]


class Records:
    """The entries of a source, or its first `max_samples`, parsed when they are asked for."""

    def __init__(self, source: Source, dialect: Dialect | None = None, max_samples: int | None = None) -> None:
        self.source, self.dialect = source, dialect or Dialect()
        self._num = len(source) if max_samples is None else min(len(source), max_samples)

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, index: int) -> Record:
        """Raises BadSample for an entry that is none of the dialect's."""
        return self.read(index)[1]

    def read(self, index: int) -> tuple[dict[str, Any], Record]:
        """An entry in the one form (see above), and parsed. Raises BadSample."""
        identity = str(index)
        try:
            entry = self.source.entry(index)
            identity = _identity(entry, identity)
            check_text(entry)
            form = to_messages(entry, self.dialect)
            return form, _parse_form(form, identity)
        except UserError as error:
            raise BadSample(identity, self.source.place(index), str(error)) from None


class RecordChain(Sequence[Record]):
    """The records of several sources, one after the other."""

    def __init__(self, parts: Sequence[Records]) -> None:
        self.parts = tuple(parts)
        self._ends = list(accumulate(len(part) for part in self.parts))

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        """Raises BadSample for an entry that is none of its source's dialect."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        part, row = self.locate(index)
        return self.parts[part][row]

    def locate(self, index: int) -> tuple[int, int]:
        """(part, row in it) of an index. Raises IndexError for one that is not there."""
        index = range(len(self))[index]
        part = bisect_right(self._ends, index)
        return part, index - (self._ends[part] - len(self.parts[part]))


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


def _identity(entry: Any, default: str) -> str:
    """The id of an entry that may turn out to be none."""
    identity = entry.get("id") if isinstance(entry, dict) else None
    return str(identity) if isinstance(identity, str | int) and not isinstance(identity, bool) else default


def _parse_form(form: Mapping[str, Any], default_id: str) -> Record:
    identity = form.get("id", default_id)
    if not isinstance(identity, str | int) or isinstance(identity, bool):
        raise UserError(f"'id' must be a string or an integer, got {show(identity)}; quote or remove it")
    listed = {kind: [_listed(item, kind) for item in form.get(f"{kind}s", ())] for kind in MEDIA}
    messages = [_parse_message(message, place) for place, message in enumerate(form["messages"])]
    check_answers(messages)
    media: dict[str, list[Any]] = {kind: [] for kind in MEDIA}
    settings: dict[tuple[str, int], Mapping[str, Any]] = {}
    num_marked = dict.fromkeys(MEDIA, 0)
    for part in (part for m in messages if isinstance(m["content"], list) for part in m["content"]):
        kind = part["type"]
        if kind in MEDIA:
            num_marked[kind] += kind not in part
            item = part if kind in part else next(iter(listed[kind][num_marked[kind] - 1 :]), {})
            if values := {key: value for key, value in (item | part).items() if key not in ("type", kind)}:
                settings[kind, len(media[kind])] = values
            media[kind].append(item.get(kind))
    for kind in MEDIA:
        if num_marked[kind] != len(listed[kind]):
            raise UserError(
                f"it has {num_marked[kind]} {kind} placeholders for {len(listed[kind])} {kind}s; write one <{kind}> "
                f"for each, in a turn of the user (where <{kind}> is meant as text, write the content as a list of "
                "parts)"
            )
    return Record(
        id=str(identity),
        messages=tuple(messages),
        images=tuple(media["image"]),
        videos=tuple(media["video"]),
        audios=tuple(media["audio"]),
        tools=read_tools(form.get("tools")),
        settings=settings,
    )


def _parse_message(message: Any, place: int) -> dict[str, Any]:
    try:
        if not isinstance(message, dict):
            raise UserError(f"a message must be an object, got {type(message).__name__}; write a role and content")
        role = message.get("role")
        if not isinstance(role, str) or role not in KEYS:
            check_keys(message, dict.fromkeys(key for keys in KEYS.values() for key in keys), "a message")
            raise UserError(f"'role' must be one of {list(KEYS)}, got {show(role)}; correct it")
        known = without_nulls(message, _ALL_KEYS)
        check_keys(known, KEYS[role], f"a message of the {role}", IGNORE_IT)
        if role == "system" and place > 0:
            raise UserError(
                "the 'system' message must come first; chat templates drop a later one, join it with the first"
            )
        for key in ("reasoning_content", "tool_call_id", "name"):
            if not isinstance(known.get(key, ""), str):
                raise UserError(f"{key!r} must be a string, got {show(known[key])}; quote or remove it")
        check_loss(known.get("loss"), role)
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
    part = without_nulls(part, _PART_KEYS)
    if kind == "text":
        check_keys(part, ("type", kind), f"a part of type {kind}")
        if not isinstance(part.get("text"), str):
            raise UserError(f"a text part needs a string 'text', got {show(part)}; write the text there")
        return {"type": "text", "text": part["text"]}
    path = {} if part.get(kind) is None else {kind: _media_path(part[kind], kind)}
    return {"type": kind, **path, **_read_settings(part, ("type", kind), kind)}


def _listed(item: Any, kind: str) -> dict[str, Any]:
    """An entry of a list of media: a path, or an object of it and its settings."""
    if not isinstance(item, dict) or item.get(kind) is None:
        return {kind: _media_path(item, kind)}
    return {kind: _media_path(item[kind], kind), **_read_settings(item, (kind,), kind)}


def _read_settings(item: Mapping[str, Any], others: Sequence[str], kind: str) -> dict[str, Any]:
    """What is set of one medium. Raises ValueError for an unknown key, and for a value of a wrong type."""
    check_keys(item, (*others, *SETTINGS[kind], *READING[kind]), f"a part of type {kind}")
    values = {key: value for key, value in item.items() if key not in others and value is not None}
    for key, value in values.items():
        types, what = _TYPES.get(key, ((int,), "an integer"))
        least = "of 0 or more" if key in READING[kind] else "above 0"
        if type(value) not in types or not (0 < value < math.inf or (value == 0 and key in READING[kind])):
            what = what if what == "true or false" else f"{what} {least}"
            raise UserError(f"{key!r} of a part of type {kind} must be {what}, got {show(value)}; correct it")
        if value >= _MOST:
            raise UserError(f"{key!r} of a part of type {kind} must be below {_MOST}, got {show(value)}; correct it")
    return values


def _media_path(path: Any, kind: str) -> str | tuple[str, ...]:
    if isinstance(path, dict) and path.keys() == {"bytes", "path"} and path["bytes"] is None:  # as tables write files
        path = path["path"]
    frames = path if kind == "video" and isinstance(path, list) else [path]
    if not frames or not all(isinstance(frame, str) and frame and "\0" not in frame for frame in frames):
        raise UserError(
            f"a path of '{kind}s' must be a non-empty string without null characters, got {show(path)}; name a file"
        )
    for frame in frames:
        if _URL.match(frame):
            fix = "write its path alone" if frame[:5].lower() == "file:" else "save it as a file and write its path"
            raise UserError(f"'{kind}s' hold the URL {show(frame)}; {fix}")
    return tuple(frames) if frames is path else frames[0]
