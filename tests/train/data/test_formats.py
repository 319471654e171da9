"""Every format is the same conversation in other words."""

import json
from pathlib import Path

import pytest

from mmfn.train.dialect import FORMATS
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
    VLM,
    WITH_TOOLS,
    read,
    read_records,
    turns,
)


@pytest.mark.parametrize(
    ("format", "names", "entry"),
    [
        ("llava", {}, {"conversations": turns(SYSTEM_TURN, *ASKED), "image": "a.png"}),
        ("sharegpt", {}, {"conversations": turns(SYSTEM_TURN, *ASKED), "images": ["a.png"]}),
        ("sharegpt", {}, {"conversations": turns(*ASKED), "system": "Be brief.", "images": ["a.png"], "tools": ""}),
        ("sharegpt", VLM, PLAIN),
        (
            "sharegpt",
            {"columns": {"messages": "talk", "system": "frame", "images": "pictures"}, "tags": {"user_tag": "me"}},
            {"talk": turns(("me", "<image>What?"), ("gpt", "A cat.")), "frame": "Be brief.", "pictures": ["a.png"]},
        ),
        ("alpaca", {}, ALPACA),
        (
            "alpaca",
            {"columns": {"prompt": "q"}},
            {"q": ALPACA["instruction"], **{k: ALPACA[k] for k in list(ALPACA)[1:]}},
        ),
        ("openai", {}, PLAIN),
        ("multimodal_tool", {}, PLAIN),
    ],
)
def test_one_conversation_in_every_format(format, names, entry):
    assert read(entry, format, **names) == read(PLAIN)
    if not names:
        assert read(entry) == read(PLAIN)


@pytest.mark.parametrize(
    ("format", "key", "speaker", "words"),
    [
        ("messages", "messages", "role", "content"),
        ("openai", "messages", "role", "content"),
        ("llava", "conversations", "from", "value"),
        ("sharegpt", "conversations", "from", "value"),
        ("multimodal_tool", "messages", "role", "content"),
    ],
)
def test_loss_of_a_turn_in_every_format(format, key, speaker, words):
    """Kept for answers; of others `false` says what is so anyway."""
    human, gpt = ("human", "gpt") if speaker == "from" else ("user", "assistant")
    talk = [(human, "hi", False), (gpt, "WRONG", False), (human, "no", None), (gpt, "right", True), (gpt, "x", None)]
    entry = {key: [{speaker: who, words: text, "loss": loss} for who, text, loss in talk]}
    assert [message.get("loss") for message in read(entry, format).messages] == [False, False, None, True, None]
    assert "loss" not in read(entry, format).messages[2]


def test_loss_of_calls_that_are_one_message():
    """A turn of calls goes on with the answer before it, so both are learned or neither."""
    for loss in ({}, {"loss": False}):
        talk = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "I look.", **loss}]
        calls = [{"from": "function_call", "value": json.dumps(CALL), **loss}] * 2
        message = read({"conversations": [*talk, *calls]}).messages[1]
        assert (len(message["tool_calls"]), message.get("loss")) == (2, loss.get("loss"))
    with pytest.raises(ValueError, match=r"message 2: calls are one message with the turn before; give both the same"):
        read({"conversations": [*talk, {"from": "function_call", "value": json.dumps(CALL), "loss": True}]})


@pytest.mark.parametrize("arguments", [CALL["arguments"], json.dumps(CALL["arguments"])])
@pytest.mark.parametrize("tools", [[TOOL], [json.dumps(TOOL)], json.dumps([TOOL])])
def test_calls_and_tools_in_every_spelling(arguments, tools):
    calls = [{"type": "function", "function": {**CALL, "arguments": arguments}}, {**CALL, "arguments": arguments}]
    spoken = [*WITH_TOOLS["messages"]]
    spoken[1] = {**spoken[1], "tool_calls": calls}
    expected = read(WITH_TOOLS)
    assert expected.tools == (TOOL,)
    assert expected.messages[1]["tool_calls"] == [FULL_CALL, FULL_CALL]
    for format in ("auto", "messages", "openai"):
        assert read({"messages": spoken, "tools": tools}, format) == expected
    for format in ("auto", "sharegpt"):
        assert read({"conversations": SHAREGPT_TOOLS, "tools": tools}, format) == expected
    for format in ("auto", "multimodal_tool"):
        assert read({"messages": ROLE_TOOLS, "tools": tools}, format) == expected
    one = [*ROLE_TOOLS[:2], {"role": "tool_call", "content": [CALL, CALL]}, *ROLE_TOOLS[4:]]
    assert read({"messages": one, "tools": tools}) == expected


def test_messages_of_chat_apis():
    content = [URL_PART, {"type": "text", "text": "What?"}]
    spoken = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": content}]
    answer = {"role": "assistant", "content": "A cat.", "reasoning_content": "Fur.", "tool_calls": None, "name": None}
    del answer["name"]
    record = read({"messages": [*spoken, answer]})
    assert record.messages[:1] == read(PLAIN).messages[:1]
    assert record.images == ("a.png",)
    assert record.messages[2] == {"role": "assistant", "content": "A cat.", "reasoning_content": "Fur."}
    short = [{**URL_PART, "image_url": "a.png"}, {"type": "text", "text": "What?"}]
    assert read({"messages": [spoken[0], {"role": "user", "content": short}, answer]}, "openai") == record


def test_alpaca_with_input_and_history():
    entry = {"instruction": "Add", "input": "1 2", "output": "3", "history": [["hi", "yo"]]}
    messages = read(entry).messages
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert [m["content"] for m in messages] == ["hi", "yo", "Add\n1 2", "3"]
    assert read({**entry, "history": None, "input": None}).messages[0]["content"] == "Add"


def test_results_stand_in_the_order_of_their_calls():
    calls = [{"id": "x", **FULL_CALL}, {"id": "y", **FULL_CALL}]
    asked = [{"role": "user", "content": "Add"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    results = [{"role": "tool", "content": "3", "tool_call_id": name, "name": "add"} for name in "xy"]
    assert [m.get("tool_call_id") for m in read({"messages": asked + results}).messages[2:]] == ["x", "y"]
    with pytest.raises(ValueError, match="message 2: 'tool_call_id' is 'y' but the call in its place has 'x'; order"):
        read({"messages": asked + results[::-1]})
    with pytest.raises(ValueError, match="message 2: 'name' is 'sub' but the call in its place has 'add'"):
        read({"messages": [*asked, {"role": "tool", "content": "3", "name": "sub"}]})


def test_markers_are_text_where_no_media_stand():
    spoken = [
        {"role": "system", "content": "<image>"},
        {"role": "user", "content": [{"type": "text", "text": "<video>"}]},
    ]
    record = read({"messages": [*spoken, {"role": "assistant", "content": "<video><source></video>"}]})
    assert [m["content"] for m in record.messages] == [
        "<image>",
        [{"type": "text", "text": "<video>"}],
        "<video><source></video>",
    ]


def test_only_named_keys_are_ignored():
    entry = {
        "conversations": [{**turn, "weight": 1} for turn in turns(SYSTEM_TURN, *ASKED)],
        "image": "a.png",
        "model": "",
    }
    assert read(entry, ignore=("model", "weight")) == read(PLAIN)
    assert read(entry, "llava", ignore=("model", "weight")) == read(PLAIN)
    for left, found in (("model", "weight"), ("weight", "model")):
        with pytest.raises(ValueError, match=f"unknown key {found!r}"):
            read(entry, ignore=(left,))


def test_first_entries_of_a_file(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join([*([json.dumps(PLAIN)] * 3), "{"]))
    assert len(read_records(path, max_samples=2)) == 2
    with pytest.raises(ValueError, match="line 4: not valid JSON"):
        read_records(path)


def test_the_page_shows_what_is_read():
    """The examples of docs/data.md, and the columns and tags it lists."""
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.split("## Templates")[0].splitlines() if line.startswith("| `")]
    table = {row[0].strip("| `"): row[1:] for row in rows[1:]}
    assert list(table) == list(FORMATS)
    assert read(json.loads(table["llava"][0].strip("`"))).images == ("17.jpg",)
    assert len(read(json.loads(table["alpaca"][0].strip("`"))).messages) == 5
    assert [m["role"] for m in read(json.loads(table["multimodal_tool"][0].strip("`"))).messages][1:] == [
        "assistant",
        "tool",
    ]
    for name in ("sharegpt", "llava", "alpaca"):
        listed = table[name][1].replace("`", "").split()
        assert set(listed) | {"images", "videos", "audios"} == set(FORMATS[name].columns)
    assert set(table["llava"][2].replace("`", " ").split()) - {"|"} == set(FORMATS["llava"].tags)
