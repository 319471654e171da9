"""Lists of turns, `{speaker, text}`: LLaVA-Instruct, ShareGPT and multimodal_tool, which differ in names alone.

A turn of a function is the calls of it, in JSON; it goes on with what the assistant said right before it, and one call
with the next, as models write them: {gpt: "I look."}, {function_call: A}, {function_call: B} are one message.
"""

from collections.abc import Mapping
from typing import Any

from mmfn.errors import UserError
from mmfn.train.data.calls import read_calls
from mmfn.train.data.entries import IGNORE_IT, check_keys, decode, show
from mmfn.train.dialect import Names

ROLES = {
    "system_tag": "system",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function",
}


def read_turns(entry: Mapping[str, Any], columns: Names, tags: Names) -> list[dict[str, Any]]:
    """The messages of an entry. Raises ValueError naming the message and the key that is wrong."""
    raw, key = entry.get(columns["messages"]), columns["messages"]
    if not isinstance(raw, list) or not raw:
        raise UserError(f"{key!r} must be a list of at least one message, got {show(raw)}; write the turns there")
    messages = system_message(entry, columns)
    roles = {tags[name]: role for name, role in ROLES.items() if name in tags}
    for place, turn in enumerate(raw):
        try:
            message = _read_turn(turn, tags, roles, key)
            if message["role"] == "system" and messages:
                raise UserError("the system turn must come first and stand alone; join it with the first")
        except UserError as error:
            raise UserError(f"message {place}: {error}") from None
        calls = message.get("tool_calls")
        if calls and messages and messages[-1]["role"] == "assistant":
            if message.get("loss") != messages[-1].get("loss"):
                raise UserError(
                    f"message {place}: calls are one message with the turn before; give both the same 'loss'"
                )
            messages[-1] = {**messages[-1], "tool_calls": [*messages[-1].get("tool_calls", ()), *calls]}
        else:
            messages.append(message)
    return messages


def system_message(entry: Mapping[str, Any], columns: Names) -> list[dict[str, Any]]:
    """The message of a `system` column: none where it is missing, null or empty."""
    text = entry.get(columns["system"]) if "system" in columns else None
    if text is not None and not isinstance(text, str):
        raise UserError(f"{columns['system']!r} must be a string, got {show(text)}; quote or remove it")
    return [{"role": "system", "content": text}] if text else []


def _read_turn(turn: Any, tags: Names, roles: Names, column: str) -> dict[str, Any]:
    speaker_key, text_key = tags["role_tag"], tags["content_tag"]
    if not isinstance(turn, dict) or not {speaker_key, text_key} <= turn.keys():
        raise UserError(f"a turn of {column!r} needs {speaker_key!r} and {text_key!r}, got {show(turn)}; write both")
    check_keys(turn, (speaker_key, text_key, "loss"), "a turn", IGNORE_IT)
    loss = {"loss": turn["loss"]} if turn.get("loss") is not None else {}
    speaker, text = turn[speaker_key], turn[text_key]
    if not isinstance(speaker, str) or speaker not in roles:
        raise UserError(
            f"{speaker_key!r} must be one of {sorted(roles)}, got {show(speaker)}; correct it or set data.tags"
        )
    if roles[speaker] != "function":
        return {"role": roles[speaker], "content": text, **loss}
    if isinstance(text, str):
        try:
            text = decode(text)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{text_key!r} of {speaker!r} is not JSON ({error}); write {{'name', 'arguments'}}"
            ) from None
    calls = read_calls(text if isinstance(text, list) else [text])
    if not calls:
        raise UserError(f"{text_key!r} of {speaker!r} holds no call; write {{'name', 'arguments'}} or remove the turn")
    return {"role": "assistant", "content": "", "tool_calls": calls, **loss}
