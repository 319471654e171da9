"""`mmfn data convert`: the file it writes holds the same records."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmfn import cli
from mmfn.errors import UserError
from mmfn.train.dialect import Dialect
from tests.train.data.format_cases import read_records

CALL = {"name": "add", "arguments": '{"a": 1}'}
TALK = [{"from": "human", "value": "<image>Wäs\u2028?"}, {"from": "gpt", "value": "An <image> tag."}]
ANSWER = {
    "role": "assistant",
    "content": None,
    "reasoning_content": "hm",
    "tool_calls": [{"id": "x", "function": CALL}],
}
FRAMES = [{"type": "video", "video": ["a", "b"]}, {"type": "text", "text": "?"}]
SETS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "llava": ([{"id": 7, "conversations": TALK, "image": "a.png"}, {"conversations": TALK, "image": ["b.png"]}], {}),
    "sharegpt": (
        [
            {
                "talk": [*TALK, {"from": "function_call", "value": json.dumps(CALL)}],
                "images": ["a"],
                "system": "s",
                "n": 1,
            }
        ],
        {"format": "sharegpt", "columns": {"messages": "talk"}, "tags": {"user_tag": "human"}, "ignore": ("n",)},
    ),
    "alpaca": ([{"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]}], {}),
    "multimodal_tool": (
        [
            {
                "messages": [{"role": "user", "content": "a"}, {"role": "tool_call", "content": json.dumps(CALL)}],
                "tools": [json.dumps({"name": "add"})],
            }
        ],
        {},
    ),
    "openai": (
        [
            {
                "messages": [
                    {"role": "developer", "content": "s"},
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]},
                    ANSWER,
                    {"role": "tool", "content": "3", "tool_call_id": "x", "name": None},
                ]
            }
        ],
        {},
    ),
    "messages": ([{"messages": [{"role": "user", "content": FRAMES}, {"role": "assistant", "content": "c"}]}], {}),
}


def options(names: dict[str, Any]) -> list[str]:
    pairs = [("--column", names.get("columns", {})), ("--tag", names.get("tags", {}))]
    spelt = [text for option, items in pairs for name, value in items.items() for text in (option, f"{name}={value}")]
    return [
        *spelt,
        *(["--format", names["format"]] if "format" in names else []),
        *["--ignore", "n"] * ("n" in names.get("ignore", ())),
    ]


@pytest.mark.parametrize("form", ["json", "jsonl"])
@pytest.mark.parametrize("name", SETS)
def test_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, form: str) -> None:
    entries, names = SETS[name]
    source, out, again = tmp_path / f"in.{form}", tmp_path / "out.jsonl", tmp_path / "again.jsonl"
    source.write_text(json.dumps(entries) if form == "json" else "\n".join(map(json.dumps, entries)))
    assert cli.main(["data", "convert", str(source), str(out), "--to", "messages", *options(names)]) == 0
    assert capsys.readouterr().out == f"wrote {len(entries)} entries to {out}\n"
    expected = read_records(source, Dialect(**names))
    assert read_records(out) == expected
    assert read_records(out, Dialect(format="messages")) == expected
    assert cli.main(["data", "convert", str(out), str(again)]) == 0
    assert again.read_bytes() == out.read_bytes()


def test_a_disk_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / ".out.jsonl.x"))

    monkeypatch.setattr("mmfn.train.run.folder.tempfile.NamedTemporaryFile", fail)
    (tmp_path / "in.json").write_text(json.dumps(SETS["llava"][0]))
    assert cli.main(["data", "convert", str(tmp_path / "in.json"), str(tmp_path / "out.jsonl")]) == 2
    assert (
        "out.jsonl' cannot be written (Permission denied); make room or choose another place" in capsys.readouterr().err
    )


@pytest.mark.parametrize("args", [["data", "--debug", "convert"], ["data", "convert", "--debug"]])
def test_debug_shows_the_traceback(tmp_path: Path, args: list[str]) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        cli.main([*args, str(tmp_path / "nowhere.json"), str(tmp_path / "out.jsonl")])


def test_it_says_where_media_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.json").write_text(json.dumps(SETS["llava"][0]))
    (tmp_path / "to").mkdir()
    assert cli.main(["data", "convert", str(tmp_path / "in.json"), str(tmp_path / "to" / "out.jsonl")]) == 0
    assert f"set data.root={tmp_path} to train on it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["in.json", "out.json"], "end its name in .jsonl"),
        (["in.json", "nowhere/out.jsonl"], "does not exist; make it or choose another"),
        (["in.json", "there.jsonl"], "exists; remove it or choose another name"),
        (["nowhere.json", "out.jsonl"], "cannot be read"),
        (["empty.json", "out.jsonl"], "is empty; it must hold at least one conversation"),
        (["bad.json", "out.jsonl"], "sample '1' of 'bad.json', entry 1: unknown key 'n' of an entry"),
        (["in.json", "out.jsonl", "--to", "llava"], "invalid choice: 'llava'"),
        (["in.json", "out.jsonl", "--format", "chat"], "unknown format 'chat'; use auto or one of"),
        (["in.json", "out.jsonl", "--column", "a"], "--column 'a' has no '='; write it as NAME=VALUE"),
        (["in.json", "out.jsonl", "--column", "messages=a"], "columns need a format"),
        (["in.json", "out.jsonl", "--format", "llava", "--tag", "user_tag=a", "--tag", "user_tag=b"], "is given twice"),
    ],
)
def test_what_is_wrong_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    good = SETS["llava"][0]
    files = {"in.json": good, "bad.json": [good[0], {**good[1], "n": 1}], "empty.json": [], "there.jsonl": []}
    for name, entries in files.items():
        (tmp_path / name).write_text(json.dumps(entries))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "convert", *args]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)


def test_any_source_becomes_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = [{**entry, "id": str(i)} for i, entry in enumerate(SETS["alpaca"][0] * 5)]
    pq.write_table(pa.Table.from_pylist(entries), tmp_path / "in.parquet", row_group_size=2)
    for part in range(5):
        (tmp_path / f"{part}.jsonl").write_text(json.dumps(entries[part]))
    expected = [record.messages for record in read_records(tmp_path / "in.parquet")]
    for number, source in enumerate(("in.parquet", "{0..4}.jsonl")):
        out = tmp_path / f"out-{number}.jsonl"
        assert cli.main(["data", "convert", str(tmp_path / source), str(out)]) == 0
        assert capsys.readouterr().out == f"wrote 5 entries to {out}\n"
        assert [record.messages for record in read_records(out)] == expected


def test_media_in_tables_are_not_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = {"instruction": "<image>?", "output": "a", "image": {"bytes": b"x", "path": "a.png"}}
    pq.write_table(pa.Table.from_pylist([entry]), tmp_path / "in.parquet")
    assert cli.main(["data", "convert", str(tmp_path / "in.parquet"), str(tmp_path / "out.jsonl")]) == 2
    sentence = capsys.readouterr().err
    assert "in.parquet', row 0: 'image/a.png' is stored with the entry, for which JSONL has no place" in sentence
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet"]
