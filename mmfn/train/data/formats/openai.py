"""Messages as chat APIs take them: `developer`, parts with `image_url`, calls with their arguments as a string."""

from collections.abc import Mapping
from typing import Any

from mmfn.errors import UserError
from mmfn.train.data.entries import check_keys, show, without_nulls
from mmfn.train.dialect import Names

_URLS = {"image_url": "image", "video_url": "video", "audio_url": "audio"}


def read_openai(entry: Mapping[str, Any], columns: Names, tags: Names) -> list[Any]:
    """The messages of an entry, in our names. Raises ValueError for a part that has none."""
    return [_read_message(place, message) for place, message in enumerate(list_messages(entry, columns, tags))]


def list_messages(entry: Mapping[str, Any], columns: Names, tags: Names) -> list[Any]:
    """The messages as they stand. Raises ValueError where there are none."""
    key = columns["messages"]
    raw = entry.get(key)
    if not isinstance(raw, list) or not raw:
        raise UserError(f"{key!r} must be a list of at least one message, got {show(raw)}; write the messages there")
    return raw


def _read_message(place: int, message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    role, content = message.get("role"), message.get("content")
    changes: dict[str, Any] = {"role": "system"} if role == "developer" else {}
    if isinstance(content, list):
        try:
            changes["content"] = [_read_part(part) for part in content]
        except UserError as error:
            raise UserError(f"message {place}: {error}") from None
    return {**message, **changes}


def _read_part(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in _URLS:
        return part
    check_keys(without_nulls(part, ("text", *_URLS)), ("type", kind), f"a part of type {kind}")
    url = part.get(kind)
    if isinstance(url, dict):
        check_keys(url, ("url",), f"an {kind}")
        url = url.get("url")
    if not isinstance(url, str):
        raise UserError(f"{kind!r} must be a path or {{'url': path}}, got {show(part.get(kind))}; write the path there")
    return {"type": _URLS[kind], _URLS[kind]: url}
