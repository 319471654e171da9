"""What no format knows is refused by name, in one short sentence; nothing is ignored."""

import copy
import json
import random
from typing import Any

import pytest

from mmfn.errors import UserError
from mmfn.train.data.formats import to_messages
from mmfn.train.data.records import Record
from mmfn.train.dialect import FORMATS, Dialect, check_dialect
from tests.train.data.format_cases import (
    ALPACA,
    ASKED,
    CALL,
    FULL_CALL,
    PLAIN,
    ROLE_TOOLS,
    SHAREGPT_TOOLS,
    SYSTEM_TURN,
    TOOL,
    URL_PART,
    WITH_TOOLS,
    read,
    read_records,
    turns,
)

LOSSES = [
    (role, loss, sentence)
    for role in ("system", "user", "assistant", "tool")
    for loss, sentence in (
        (1, "'loss' must be true or false, got 1; correct it"),
        ("no", "'loss' must be true or false, got 'no'"),
        (0.5, "'loss' must be true or false, got 0.5"),
        (
            True,
            f"'loss' of a message of the {role} must be false, only answers are learned one by one; set data.train_",
        ),
    )
    if (role, loss) != ("assistant", True)
]
WRONG_KEYS = [
    ({**PLAIN, "image_path": ["a.png"]}, "unknown key 'image_path' of an entry in format messages, nearest is 'image"),
    ({**PLAIN, "fps": 1.0}, "unknown key 'fps' of an entry in format messages, known are id, messages, "),
    ({**PLAIN, "system": "x"}, "unknown key 'system' of an entry in format messages"),
    ({**PLAIN, "Images": []}, "unknown key 'Images' of an entry in format messages, nearest is 'images'"),
    ({"conversations": turns(*ASKED), "image": "a.png", "sytem": "x"}, "unknown key 'sytem'.*nearest is 'system'"),
    ({"conversations": [{**turns(*ASKED)[1], "los": False}]}, "message 0: unknown key 'los' of a turn, nearest is "),
    ({"conversations": [{**turns(*ASKED)[1], "id": 3}]}, "message 0: unknown key 'id' of a turn"),
    ({**ALPACA, "contents": "x"}, "unknown key 'contents' of an entry in format alpaca"),
    ({"instruction": "a", "ouput": "b"}, "unknown key 'ouput'.*nearest is 'output'"),
    ({"messages": [{"role": "user", "content": "a", "name": "Bo"}]}, "unknown key 'name' of a message of the user"),
    (
        {"messages": [{"role": "user", "content": "a", "tool_calls": []}]},
        "unknown key 'tool_calls' of a message of the u",
    ),
    (
        {"messages": [{"role": "assistant", "content": "a", "weight": 0}]},
        "unknown key 'weight' of a message of the ass",
    ),
    ({"messages": [{"role": "assistant", "content": "a", "refusal": None}]}, "unknown key 'refusal'"),
    ({"messages": [{"role": "assistant", "content": "a", "thinking": "b"}]}, "unknown key 'thinking'"),
    ({"messages": [{"rol": "user", "content": "a"}]}, "unknown key 'rol' of a message, nearest is 'role'"),
    *(
        (
            {"messages": [{"role": "user", "content": [{"type": kind, kind: "a.x", key: 1}]}]},
            f"message 0: unknown key {key!r} of a part of type {kind}, {hint}",
        )
        for kind, key, hint in (
            ("image", "max_pixel", "nearest is 'max_pixels'"),
            ("image", "fps", "known are type, image, min_pixels, max_pixels"),
            ("image", "path", "known are"),
            ("video", "total_pixels", "nearest is 'm.._pixels'"),
            ("video", "num_frames", "nearest is 'nframes'"),
            ("video", "start", "nearest is 'video_start'"),
            ("audio", "sampling_rate", "known are type, audio;"),
            ("text", "cache_control", "known are type, text;"),
        )
    ),
    ({"messages": [{"role": "user", "content": [{**URL_PART, "detail": "low"}]}]}, "unknown key 'detail' of a part of"),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a", "detail": "low"}}]}
            ]
        },
        "unknown key 'detail' of an image_url, known are url",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{**FULL_CALL, "index": 0}]}]},
        "message 0: tool call 0: unknown key 'index' of a tool call",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {**CALL, "args": {}}}]}]},
        "unknown key 'args' of a function, nearest is 'arguments'",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{**CALL, "parameters": {}}]}]},
        "unknown key 'parameters' of a to",
    ),
]


def said(content: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content}]}


def called(calls: Any) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "content": "", "tool_calls": calls}]}


def spoken(*pairs: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"conversations": turns(*pairs), **more}


WRONG_VALUES = [
    ({**PLAIN, **spoken(*ASKED)}, "has the keys of messages and sharegpt; set data.format"),
    ({**PLAIN, **ALPACA}, "has the keys of messages and alpaca"),
    ({"conversation": turns(*ASKED)}, "has the keys .'conversation'., where 'conversation' is almost 'conversations'"),
    ({"question": "a"}, "this one has the keys .'question'.; set data.format"),
    ({"text": "hi"}, r"has the keys \['text'\]; set data.format"),
    ({"conversations": PLAIN["messages"]}, "'conversations' hold 'role' and 'content'; set data.format to sharegpt"),
    ({"messages": turns(*ASKED)}, "'messages' hold 'from' and 'value'; set data.format to sharegpt"),
    ({"messages": [*ROLE_TOOLS, *WITH_TOOLS["messages"]]}, "which are another format; write all in one"),
    ({"messages": {"role": "user"}}, "'messages' must be a list of at least one message, got {'role'"),
    ({"conversations": None}, r"an entry needs exactly one of .* but this one has the keys \[\]; set data.format"),
    (spoken(("human", 3)), "message 0: 'content' must be a string or a list of parts, got 3"),
    (spoken(("user", "a")), r"message 0: 'from' must be one of \['function_call', 'gpt', .*got 'user'; .*data.tags"),
    (spoken(*ASKED, SYSTEM_TURN), "message 2: the system turn must come first"),
    (spoken(SYSTEM_TURN, *ASKED, system="x"), "message 0: the system turn must come first and stand alone"),
    (spoken(*ASKED, system=3), "'system' must be a string, got 3"),
    (spoken(("function_call", "add(1)")), "message 0: 'value' of 'function_call' is not JSON"),
    (spoken(("function_call", "[]")), "message 0: 'value' of 'function_call' holds no call"),
    (spoken(("function_call", "3")), "message 0: tool call 0: a call must be an object, got 3"),
    (spoken(("function_call", "{}")), "tool call 0: 'name' of a call must be a non-empty string, got None"),
    (called({}), "message 0: 'tool_calls' must be a list of calls, got {}"),
    (called("["), "'tool_calls' is a string but not JSON"),
    (called([{**CALL, "arguments": "{"}]), "tool call 0: 'arguments' is a string but not JSON"),
    (called([{**CALL, "arguments": "3"}]), "tool call 0: 'arguments' must be an object or JSON of one, got 3"),
    (called([{**CALL, "arguments": [1]}]), r"tool call 0: 'arguments' must be an object or JSON of one, got \[1\]"),
    (called([{**CALL, "arguments": '{"a": 1, "a": 2}'}]), "'a' stands twice in one object"),
    (called([{**FULL_CALL, "type": "custom"}]), "'type' of a tool call must be 'function', got 'custom'"),
    (called([{"function": "add"}]), "'function' must be an object with 'name' and 'arguments', got 'add'"),
    (called([{**CALL, "name": ""}]), "'name' of a call must be a non-empty string, got ''"),
    (called([{**FULL_CALL, "id": 3}]), "'id' of a call must be a string, got 3"),
    ({**PLAIN, "tools": ["{"]}, "tool 0 is a string but not JSON"),
    ({**PLAIN, "tools": ["3"]}, "'tools' must be a list of JSON schemas, got 3 at 0"),
    ({**PLAIN, "tools": TOOL}, "'tools' must be a list of JSON schemas, got {.*; put it in a list"),
    ({**PLAIN, "tools": [{"type": "function"}]}, "tool 0 has no 'name'"),
    ({**PLAIN, "tools": 3}, "'tools' must be a list of JSON schemas, got 3"),
    ({**PLAIN, "tools": "NaN"}, "NaN is no JSON number"),
    (
        {"messages": [{"role": "assistant", "content": "a", "reasoning_content": 3}]},
        "'reasoning_content' must be a string",
    ),
    ({"messages": [{"role": "tool", "content": "a", "tool_call_id": 3}]}, "'tool_call_id' must be a string, got 3"),
    (
        {"messages": [{"role": "tool", "content": "a", "tool_call_id": "x"}]},
        "is 'x' but the call in its place has None",
    ),
    (said("a", "function"), r"message 0: 'role' must be one of \['system'"),
    (said([{"type": "image_url", "image_url": 3}]), "message 0: 'image_url' must be a path or {'url': path}, got 3"),
    (said([{"type": "input_audio", "input_audio": {}}]), "a part needs a 'type' of text, image, video or audio"),
    (said("<image> is a tag"), "1 image placeholders for 0 images; .*write the content as a list of parts"),
    (
        {**PLAIN, "images": ["data:image/png;base64," + "A" * 200_000]},
        r"'images' hold the URL 'data:.{80,100}\.\.\. .200024 characters.; save it as",
    ),
    ({**PLAIN, "images": ["https://x.org/a.png"]}, "'images' hold the URL 'https://x.org/a.png'; save it as a file"),
    ({**PLAIN, "images": ["file:///a.png"]}, "'images' hold the URL 'file:///a.png'"),
    ({"instruction": "", "output": "a"}, "'instruction' is empty; write what is asked"),
    ({"instruction": 3, "output": "a"}, "'instruction' must be a string, got 3"),
    ({"instruction": "a"}, "'output' must be a string, got None"),
    ({"instruction": "a", "input": 3, "output": "b"}, "'input' must be a string, got 3"),
    (
        {"instruction": "a", "output": "b", "history": "c"},
        "'history' must be a list of pairs .question, answer., got 'c'",
    ),
    ({"instruction": "a", "output": "b", "history": [["c"]]}, "must hold pairs .question, answer., got .'c'. at 0"),
    ({"instruction": "a", "output": "b", "history": [["c", 1]]}, "must hold pairs .question, answer., got .*1. at 0"),
]


@pytest.mark.parametrize(("entry", "message"), WRONG_KEYS + WRONG_VALUES)
def test_what_is_wrong_is_said_in_one_short_sentence(tmp_path, entry, message):
    path = tmp_path / "d.jsonl"
    path.write_text(f"{json.dumps(PLAIN)}\n{json.dumps(entry)}\n")
    with pytest.raises(ValueError, match=rf"sample '1' of '.*d\.jsonl', line 2: .*{message}") as error:
        read_records(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500 + len(str(path))
    assert ";" in str(error.value)  # the fix


WHOLE = [
    PLAIN,
    WITH_TOOLS,
    read_records,
    {"conversations": SHAREGPT_TOOLS, "tools": [json.dumps(TOOL)], "system": "x", "image": []},
    {"messages": ROLE_TOOLS, "tools": json.dumps([TOOL])},
    {**ALPACA, "history": [["a", "b"]]},
    {"messages": [{"role": "developer", "content": "x"}, {"role": "user", "content": [URL_PART]}]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "video", "video": ["a", "b"]}, {"type": "text", "text": "c"}]}
        ]
    },
]
ODD = [
    None,
    True,
    0,
    -1,
    1.5,
    "",
    "x",
    "[]",
    "{",
    "<image>",
    [],
    {},
    [[]],
    [None],
    ["x"],
    [{}],
    {"type": []},
    {"x": "y"},
]


def mutated(value: Any, rand: random.Random) -> Any:
    """A value in which one place, at any depth, is something else, is missing, or stands under another name."""
    if isinstance(value, dict | list) and value and rand.random() < 0.8:
        items = value if isinstance(value, list) else [*value.items()]
        place = rand.randrange(len(items))
        if isinstance(value, list):
            return [*value[:place], mutated(value[place], rand), *value[place + 1 :]]
        key, inner = items[place]
        if rand.random() < 0.2:
            return {name: item for name, item in value.items() if name != key} | (
                {"kex": inner} if rand.random() < 0.5 else {}
            )
        return {**value, key: mutated(inner, rand)}
    return copy.deepcopy(rand.choice(ODD))


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_wrong_is_a_sentence(seed):
    """Read as any format, a broken entry either is a record or is refused; nothing else comes of it."""
    rand = random.Random(seed)
    sentences = []
    for _ in range(500):
        entry = rand.choice(WHOLE)
        for _ in range(rand.randint(1, 3)):
            entry = mutated(entry, rand)
        try:
            assert isinstance(read(entry, rand.choice(["auto", "auto", *FORMATS])), Record)
        except UserError as error:
            sentences.append(str(error))
    assert 250 < len(sentences) < 500
    assert not any("\n" in sentence for sentence in sentences)


def test_a_column_that_is_not_there_is_named() -> None:
    dialect = Dialect(format="messages", columns={"messages": "talk"})
    with pytest.raises(
        ValueError, match=r"data.columns calls the messages 'talk' but the entry has the keys .'images', 'messages'"
    ):
        to_messages(PLAIN, dialect)


def test_it_says_what_can_be_ignored():
    """Keys of entries, turns and messages; those of parts and calls are no business of a data set's maker."""
    for entry, _ in WRONG_KEYS:
        with pytest.raises(ValueError, match="unknown key") as error:
            read(entry)
        is_inner = any(
            f" of {what}" in str(error.value) for what in ("a part", "a tool", "a function", "an image", "a message,")
        )
        assert ("or name it in data.ignore" in str(error.value)) != is_inner


def test_a_key_that_stands_twice(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}')
    with pytest.raises(ValueError, match=r"line 1: not valid JSON .key 'role' stands twice in one object.; repair it"):
        read_records(path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"format": "shareGPT"}, "unknown format 'shareGPT'; use auto or one of messages, "),
        ({"columns": {"messages": "x"}}, "columns need a format; set one of messages, openai"),
        ({"tags": {"user_tag": "x"}}, "tags need a format"),
        ({"ignore": ("images",)}, "'images' is to be ignored but some format reads it"),
        ({"format": "sharegpt", "columns": {"message": "x"}}, "has no column 'message'; the nearest is 'messages'"),
        (
            {"format": "sharegpt", "columns": {"prompt": "x"}},
            "format 'sharegpt' has no column 'prompt'; the nearest is",
        ),
        ({"format": "sharegpt", "tags": {"role": "x"}}, "has no tag 'role'; the nearest is 'role_tag'"),
        ({"format": "llava", "tags": {"function_tag": "x"}}, "format 'llava' has no tag 'function_tag'"),
        (
            {"format": "messages", "tags": {"user_tag": "x"}},
            "format 'messages' has no tag 'user_tag'; it has no tags, rem",
        ),
        ({"format": "alpaca", "columns": {"query": ""}}, "column 'query' is empty"),
        (
            {"format": "alpaca", "columns": {"query": "output"}},
            "columns 'query' and 'response' both stand for 'output'",
        ),
        (
            {"format": "sharegpt", "tags": {"user_tag": "gpt"}},
            "tags 'user_tag' and 'assistant_tag' both stand for 'gpt'",
        ),
        (
            {"format": "sharegpt", "tags": {"role_tag": "value"}},
            "tags 'role_tag' and 'content_tag' both stand for 'value'",
        ),
        (
            {"format": "llava", "columns": {"videos": "image"}},
            "columns 'videos' and 'one of images' both stand for 'image'",
        ),
        ({"format": "llava", "ignore": ("image",)}, "'image' is to be ignored but format 'llava' reads it"),
        ({"ignore": ("video",)}, "'video' is to be ignored but some format reads it"),
        ({"format": "sharegpt", "ignore": ("from",)}, "'from' is to be ignored but format 'sharegpt' reads it"),
    ],
)
def test_wrong_names(names, message):
    with pytest.raises(ValueError, match=message):
        check_dialect(Dialect(**names))


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_stands_as_it_is(format):
    check_dialect(Dialect(format=format, ignore=("model",)))


@pytest.mark.parametrize(("role", "loss", "sentence"), LOSSES)
def test_loss_that_is_none(role, loss, sentence):
    asked = [] if role in ("system", "user") else [{"role": "user", "content": "hi"}]
    with pytest.raises(ValueError, match=f"message {len(asked)}: {sentence}"):
        read({"messages": [*asked, {"role": role, "content": "x", "loss": loss}]})
