"""Tools of a conversation and calls of them, brought to one form.

A tool is a JSON schema. A call becomes `{"type": "function", "function": {"name", "arguments"}}` with its arguments as
an object, since some templates write them one by one and others as JSON.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mmfn.errors import UserError
from mmfn.train.data.entries import check_keys, decode, show


def read_tools(raw: Any) -> tuple[Mapping[str, Any], ...]:
    """`tools` as a list of JSON schemas, of strings that hold one each, or as one string that holds the list.

    Raises ValueError for anything else, and for a schema without a name.
    """
    if isinstance(raw, str) and raw.strip():
        raw = _decode(raw, "'tools'", "the list of JSON schemas")
    if raw is None or raw == "" or (isinstance(raw, str) and not raw.strip()):
        return ()
    if not isinstance(raw, list):
        raise UserError(f"'tools' must be a list of JSON schemas, got {show(raw)}; put it in a list")
    tools = [
        _decode(tool, f"tool {i}", "a JSON schema") if isinstance(tool, str) else tool for i, tool in enumerate(raw)
    ]
    for place, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise UserError(f"'tools' must be a list of JSON schemas, got {show(tool)} at {place}; write an object")
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise UserError(f"tool {place} has no 'name'; write {{'type': 'function', 'function': {{'name': ...}}}}")
    return tuple(tools)


def read_calls(raw: Any) -> list[dict[str, Any]]:
    """`tool_calls` of a message in the one form. A call may stand without `function` around it; `id` is retained.

    Null and an empty string are no calls. Raises ValueError for what is no list of calls, and for arguments that are
    neither an object nor JSON of one.
    """
    if isinstance(raw, str):
        raw = _decode(raw, "'tool_calls'", "a list of calls") if raw.strip() else None
    if raw is None:
        return []
    if not isinstance(raw, list):
        raise UserError(f"'tool_calls' must be a list of calls, got {show(raw)}; put it in a list")
    calls = []
    for place, call in enumerate(raw):
        try:
            calls.append(_read_call(call))
        except UserError as error:
            raise UserError(f"tool call {place}: {error}") from None
    return calls


def check_loss(loss: Any, role: str) -> None:
    """`loss` of a message: whether an answer is learned. Raises ValueError for no boolean, and for "true" elsewhere."""
    if loss is not None and not isinstance(loss, bool):
        raise UserError(f"'loss' must be true or false, got {show(loss)}; correct it")
    if loss and role != "assistant":
        raise UserError(
            f"'loss' of a message of the {role} must be false, only answers are learned one by one; set "
            "data.train_on_prompt to learn all, or remove it"
        )


def check_answers(messages: Sequence[Mapping[str, Any]]) -> None:
    """Results stand in the order of the calls they answer: templates write neither `tool_call_id` nor `name` of them.

    Raises ValueError where one of the two says otherwise.
    """
    calls: list[Mapping[str, Any]] = []
    for place, message in enumerate(messages):
        if message["role"] != "tool":
            calls = list(message.get("tool_calls", ()))
            continue
        call = calls.pop(0) if calls else None
        for key, expected in (
            ("tool_call_id", call and call.get("id")),
            ("name", call and call["function"]["name"]),
        ):
            if message.get(key) is not None and message[key] != expected:
                raise UserError(
                    f"message {place}: {key!r} is {show(message[key])} but the call in its place has {show(expected)}; "
                    "order the results as their calls"
                )


def _read_call(call: Any) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise UserError(f"a call must be an object, got {show(call)}; write {{'name': ..., 'arguments': {{...}}}}")
    if "function" in call:
        check_keys(call, ("function", "type", "id"), "a tool call")
        if call.get("type", "function") != "function":
            raise UserError(
                f"'type' of a tool call must be 'function', got {show(call['type'])}; templates write these"
            )
        function = call["function"]
        if not isinstance(function, dict):
            raise UserError(
                f"'function' must be an object with 'name' and 'arguments', got {show(function)}; write one"
            )
        check_keys(function, ("name", "arguments"), "a function")
    else:
        check_keys(call, ("name", "arguments", "id"), "a tool call")
        function = call
    name, arguments, identity = function.get("name"), function.get("arguments"), call.get("id")
    if not isinstance(name, str) or not name:
        raise UserError(f"'name' of a call must be a non-empty string, got {show(name)}; give the name of the tool")
    if identity is not None and not isinstance(identity, str):
        raise UserError(f"'id' of a call must be a string, got {show(identity)}; quote or remove it")
    if isinstance(arguments, str):
        arguments = _decode(arguments, "'arguments'", "an object") if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise UserError(f"'arguments' must be an object or JSON of one, got {show(arguments)}; name every argument")
    one = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return one if identity is None else {"id": identity, **one}


def _decode(text: str, what: str, expected: str) -> Any:
    try:
        return decode(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is a string but not JSON ({error}); write {expected}") from None
