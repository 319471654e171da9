"""Training on a file of each format is training on the same samples."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmfn.train.build.run import prepare
from mmfn.train.config.load import load_config
from mmfn.train.run import loop

MakeConfig = Callable[..., Path]
Entry = dict[str, Any]


def turns(
    entry: Entry, *, role: str = "from", content: str = "value", user: str = "human", gpt: str = "gpt"
) -> list[Entry]:
    names = {"user": user, "assistant": gpt, "system": "system"}
    return [{role: names[m["role"]], content: m["content"]} for m in entry["messages"]]


def parts(entry: Entry) -> list[Entry]:
    """The messages with their images as parts with URLs, as chat APIs take them."""
    urls = iter(entry["images"])
    return [
        {
            **message,
            "content": [
                {"type": "image_url", "image_url": {"url": next(urls)}}
                if text == "\0"
                else {"type": "text", "text": text}
                for text in message["content"].replace("<image>", "\1\0\1").split("\1")
                if text
            ],
        }
        for message in entry["messages"]
    ]


def alpaca(entry: Entry) -> Entry:
    user, answer = entry["messages"]
    return {"ask": user["content"], "output": answer["content"], "images": entry["images"]}


SPELLINGS: dict[str, tuple[Callable[[Entry], Entry], dict[str, Any]]] = {
    "messages": (lambda e: e, {}),
    "llava": (lambda e: {"conversations": turns(e), "image": e["images"]}, {}),
    "sharegpt": (
        lambda e: {"talk": turns(e, role="by", content="says", user="me"), "pictures": e["images"]},
        {
            "data.columns": {"messages": "talk", "images": "pictures"},
            "data.tags": {"role_tag": "by", "content_tag": "says", "user_tag": "me"},
        },
    ),
    "openai": (lambda e: {"messages": parts(e)}, {}),
    "multimodal_tool": (lambda e: e, {}),
    "alpaca": (alpaca, {"data.columns": {"prompt": "ask"}}),
}


def losses(config: Path) -> tuple[list[float], list[str]]:
    said: list[str] = []
    records: list[Entry] = []
    loop.train(prepare(load_config(config), said.append), records.append)
    return [record["loss"] for record in records], said


def test_every_format_trains_alike(make_config: MakeConfig, small_demo: Path, tmp_path: Path) -> None:
    """Two steps on the first twelve entries. Only these are read: behind them stands an entry nobody can read."""
    entries = [e for e in json.loads((small_demo / "train.json").read_text()) if len(e["messages"]) == 2][:12]
    assert len(entries) == 12
    seen = {}
    for name, (spell, settings) in SPELLINGS.items():
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps([*map(spell, entries), {"what": "is this?"}]))
        more = {
            "data.train": str(file),
            "data.format": name,
            "data.max_samples": 12,
            "data.eval": None,
            "train.steps": 2,
        }
        seen[name], said = losses(make_config(settings | more))
        assert "checking 12 training and 0 held-out samples" in said
    assert len(set(seen["messages"])) == 2
    assert all(values == seen["messages"] for values in seen.values()), seen


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data.format": "llama"}, "data.format is 'llama' but input should be 'auto', 'messages', 'openai', 'llava'"),
        ({"data.columns": {"messages": "x"}}, "data.columns, data.tags, data.ignore: columns need a format"),
        ({"data.columns": {"messages": 3}}, "data.columns is {'messages': 3} but input should be a valid string"),
        (
            {"data.format": "alpaca", "data.tags": {"user_tag": "x"}},
            "format 'alpaca' has no tag 'user_tag'; it has no tags",
        ),
        ({"data.ignore": ["a", "a"]}, "data.ignore is .* but it names one thing twice"),
        ({"data.max_samples": 0}, "data.max_samples is 0 but input should be greater than 0"),
    ],
)
def test_wrong_settings(make_config: MakeConfig, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(make_config(settings))
