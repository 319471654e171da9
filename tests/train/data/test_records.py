import json
import os

import pytest

from mmfn.train.data.records import count_media, parse_record, plain_text
from tests.train.data.format_cases import read_records

QUESTION = {"role": "user", "content": "<image>Which digit is this?"}
ANSWER = {"role": "assistant", "content": "7"}
GOOD = {"id": 3, "messages": [QUESTION, ANSWER], "images": ["a.png"]}
IMAGE_PART = {"type": "image"}


def test_markers_become_parts():
    record = parse_record(GOOD, "0")
    assert record.id == "3"
    assert record.images == ("a.png",)
    assert record.messages[0]["content"] == [IMAGE_PART, {"type": "text", "text": "Which digit is this?"}]
    assert record.messages[1]["content"] == "7"
    assert count_media(record.messages, "image") == 1
    assert plain_text(record.messages[0]) == "Which digit is this?"


def test_three_spellings_of_one_conversation():
    parts = [IMAGE_PART, {"type": "text", "text": "What?"}]
    messages = parse_record({"messages": [{"role": "user", "content": "<image>What?"}, ANSWER], "images": ["a"]}, "0")
    listed = parse_record({"messages": [{"role": "user", "content": parts}, ANSWER], "images": ["a"]}, "0")
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "7"}]
    assert messages == listed == parse_record({"conversations": turns, "image": "a"}, "0")
    assert parse_record({"conversations": turns, "images": ["a"]}, "0") == messages


def test_media_in_order_with_own_paths():
    content = [
        {"type": "image", "image": "own.png"},
        IMAGE_PART,
        {"type": "video"},
        {"type": "video", "video": ["f", "g"]},
    ]
    entry = {"messages": [{"role": "user", "content": content}], "images": ["listed.png"], "videos": [["h", "i"]]}
    record = parse_record(entry, "0")
    assert record.images == ("own.png", "listed.png")
    assert record.videos == (("h", "i"), ("f", "g"))


def test_markers_in_order_across_turns():
    messages = [{"role": "user", "content": "<image>a<video>b<image>"}, ANSWER, {"role": "tool", "content": "<image>"}]
    record = parse_record({"messages": messages, "images": ["1", "2", "3"], "videos": ["v"]}, "0")
    assert [p["type"] for p in record.messages[0]["content"]] == ["image", "text", "video", "text", "image"]
    assert (record.images, record.videos) == (("1", "2", "3"), ("v",))


def test_tools_and_calls():
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    record = parse_record({"messages": [{"role": "user", "content": "x"}, call], "tools": json.dumps(tools)}, "0")
    assert record.tools == tuple(tools)
    assert record.messages[1]["content"] == ""
    assert parse_record({"messages": [QUESTION], "images": ["a"], "tools": ""}, "0").tools == ()


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_both_file_forms(tmp_path, form):
    entries = [GOOD, {"messages": [{"role": "user", "content": "line\u2028sep"}, ANSWER]}]
    path = tmp_path / "data.any"
    lines = "\n\n".join(json.dumps(e, ensure_ascii=False) for e in entries)
    path.write_text(json.dumps(entries) if form == "json" else f"\ufeff{lines}\n", encoding="utf-8")
    records = read_records(path)
    assert [r.id for r in records] == ["3", "1"]
    assert records[1].messages[0]["content"] == "line\u2028sep"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": None}, r"an entry needs exactly one of 'messages' and"),
        ({"messages": []}, "must be a list of at least one"),
        ({"messages": ["x"]}, "message 0: a message must be an object, got str"),
        ({"messages": [{"role": "bot", "content": "x"}]}, r"message 0: 'role' must be one of \['system', .*got 'bot'"),
        ({"messages": [{"content": "x"}]}, "message 0: 'role' must be one of .*got None"),
        (
            {"messages": [QUESTION, {"role": "assistant"}]},
            "message 1: 'content' must be a string or a list of parts, got None",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "'content' must be a string"),
        (
            {"messages": [{"role": "user", "contents": "x"}]},
            "unknown key 'contents' of a message of the user, nearest is 'content'",
        ),
        (
            {"messages": [QUESTION, {"role": "system", "content": "x"}]},
            "message 1: the 'system' message must come first",
        ),
        (
            {"messages": [QUESTION, {"role": "assistant", "content": [IMAGE_PART]}]},
            "cannot stand in a message of the assistant",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, "'type' of text, image, video or audio"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "'type' of text, image, video or audio, got 'x'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "needs a string 'text'"),
        ({"conversations": []}, "exactly one of 'messages' and 'conversations'"),
        ({"id": True}, "'id' must be a string or an integer, got True"),
        ({"id": "\ud800"}, "half a character"),
        ({"tools": [{"a": ["\udc00"]}]}, "half a character"),
        ({"images": ["a\0.png"]}, "without null characters"),
        ({"videos": [["a", "b\0"]]}, "without null characters"),
        ({"tools": "[" * 100_000}, "'tools' is a string but not JSON"),
        ({"id": [1]}, r"'id' must be a string or an integer, got \[1\]"),
        ({"images": "a.png", "image": "a.png"}, "one of 'image' and 'images', not both"),
        ({"images": {}}, "'images' must be a list of paths"),
        ({"images": [3]}, "a path of 'images' must be a non-empty string .*got 3"),
        ({"images": [""]}, "a path of 'images' must be a non-empty string"),
        ({"images": []}, "it has 1 image placeholders for 0 images; write one <image> for each"),
        ({"images": ["a", "b"]}, "it has 1 image placeholders for 2 images"),
        ({"videos": ["a"]}, "it has 0 video placeholders for 1 videos"),
        ({"videos": [[]]}, "a path of 'videos' must be"),
        ({"audios": ["a"]}, "it has 0 audio placeholders for 1 audios"),
        ({"tools": "{"}, "'tools' is a string but not JSON"),
        ({"tools": [1]}, "'tools' must be a list of JSON schemas"),
    ],
)
def test_every_fault_is_one_sentence_with_file_and_entry(tmp_path, change, message):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([GOOD, {**GOOD, **change}]))
    with pytest.raises(ValueError, match=rf"sample '.*' of '.*data\.json', entry 1: .*{message}") as error:
        read_records(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"from": "human"}, "needs 'from' and 'value'"),
        ({"from": "bot", "value": ""}, "'from' must be one of .*got 'bot'"),
        ({"from": ["human"], "value": ""}, r"'from' must be one of .*got \['human'\]"),
    ],
)
def test_bad_llava_turns(turn, message):
    with pytest.raises(ValueError, match=f"message 0: .*{message}"):
        parse_record({"conversations": [turn]}, "0")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; it must hold"),
        ("[]", "is empty; it must hold"),
        ("[{]", "is not valid JSON .the list does not end"),
        ("[{}] 3", "is not valid JSON .something stands behind the end of the list, byte 3"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"messages": ' + "[" * 100_000, "line 1: not valid JSON"),
        (json.dumps(GOOD) + "\n{", "line 2: not valid JSON"),
        ("{}", "line 1: an entry needs exactly one"),
        ("[3]", "entry 0: an entry must be an object, got int"),
        (json.dumps(GOOD) + "\n3", "line 2: an entry must be an object, got int"),
        (json.dumps(GOOD).encode() + b"\n\xff\xfe", "line 2: not UTF-8 .invalid start byte at byte 0"),
        ("3", "holds no JSON, it begins with '3'; write a JSON object in each line"),
        ("question,answer\nWhat?,A cat.\n", "holds no JSON, it begins with 'question,answer"),
        (json.dumps(GOOD).encode("utf-16"), "holds no JSON, it begins with '.*'; write"),
        (b"\x89PNG\r\n\x1a\n\0\0", "holds no JSON, it begins with '.*'; write"),
        (json.dumps({"data": [GOOD]}, indent=1), "is one JSON object of several lines; write a list of entries"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_records(path)


def test_pipes_are_refused(tmp_path):
    """To open one would wait for its other end."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (tmp_path / "pipe.jsonl", "/dev/null"):
        with pytest.raises(ValueError, match="is no regular file; write what it holds to one"):
            read_records(path)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.json' cannot be read"):
        read_records(tmp_path / "nowhere.json")
