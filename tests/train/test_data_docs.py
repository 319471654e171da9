"""What docs/data.md shows is so: its entries are read and trained on, its settings and commands exist."""

import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from mmfn.arguments import parse
from mmfn.batch import IGNORE
from mmfn.train.build.run import prepare
from mmfn.train.config.load import known_keys, load_config, load_section
from mmfn.train.config.schema import DataSection
from mmfn.train.config.sets import list_sets
from mmfn.train.data import Dataset, load_processor
from mmfn.train.dialect import FORMATS, Dialect, check_dialect
from mmfn.train.run import loop

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
COMMANDS = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/data.md", "docs/config.md", "docs/replay.md")
}


def blocks(language: str, page: str = PAGE) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def table_entries() -> Iterator[tuple[str, dict[str, Any]]]:
    """(format, entry) of each whole entry in the table of formats."""
    for name, cell in re.findall(r"(?m)^\| `(\w+)` \| (.+?) \| ", PAGE):
        if name in FORMATS:
            for code in re.findall(r"`(\{.+?\})`(?=[ ,:]|$)", cell):
                yield name, json.loads(code)


ENTRIES = [*(("messages", json.loads(block)) for block in blocks("json")), *table_entries()]


@pytest.fixture
def media_root(tmp_path: Path) -> Path:
    for name in ("17.jpg", "images/17.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 32), (200, 90, 10)).save(tmp_path / name)
    return tmp_path


def read(path: Path, entry: dict[str, Any], model: Path, **dialect: Any) -> str:
    """What is learned of an entry."""
    path.write_text(json.dumps(entry) + "\n")
    processor = load_processor(model)
    sample = Dataset(path, processor, dialect=Dialect(**dialect)).sample(0)
    return processor.chat.tokenizer.decode(sample.labels_T[sample.labels_T != IGNORE].tolist())


def test_every_format_has_an_entry() -> None:
    assert {name for name, _ in ENTRIES} == set(FORMATS)


@pytest.mark.parametrize(("name", "entry"), ENTRIES)
def test_entries_are_read(small_demo: Path, media_root: Path, name: str, entry: dict[str, Any]) -> None:
    """By the name of their format and by themselves alike."""
    texts = {read(media_root / "data.jsonl", entry, small_demo / "model", format=key) for key in (name, "auto")}
    assert len(texts) == 1
    assert texts.pop().endswith("<|im_end|>\n")


def test_a_run_trains_on_them(make_config: Callable[..., Path], media_root: Path) -> None:
    file = media_root / "data.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for _, entry in ENTRIES))
    change = {"data.train": str(file), "data.eval": None, "data.root": None, "data.token_buckets": [2048]}
    said: list[str] = []
    records: list[dict[str, Any]] = []
    run = prepare(
        load_config(make_config(change | {"train.steps": 2, "data.batch_samples": len(ENTRIES)})), said.append
    )
    loop.train(run, records.append)
    assert [(record["samples"], record["bad"]) for record in records] == [(len(ENTRIES), 0)] * 2
    assert not any("cannot be used" in line for line in said)


def test_names_of_columns_and_tags_are_read(small_demo: Path, media_root: Path) -> None:
    """The entry of LLaVA's format, spelt as each of the configs says, means the same."""
    entry = next(entry for name, entry in ENTRIES if name == "llava")
    expected = read(media_root / "data.jsonl", entry, small_demo / "model")
    sections = [yaml.safe_load(block)["data"] for block in blocks("yaml")]
    spelt = [data for data in sections if "columns" in data]
    assert len(spelt) == 2
    for data in spelt:
        columns, tags = data["columns"], data["tags"]
        roles = {"human": tags["user_tag"], "gpt": tags["assistant_tag"]}
        keys = tags.get("role_tag", "from"), tags.get("content_tag", "value")
        turns = [dict(zip(keys, (roles[t["from"]], t["value"]), strict=True)) for t in entry["conversations"]]
        other = {columns["messages"]: turns, columns.get("images", "images"): [entry["image"]]}
        assert read(media_root / "data.jsonl", other, small_demo / "model", **data) == expected


@pytest.mark.parametrize("block", blocks("yaml"))
def test_settings_are_those_of_configs(tmp_path: Path, block: str) -> None:
    values = yaml.safe_load(block)
    if "output" in values:
        (tmp_path / "config.yaml").write_text(block)
        assert load_config(tmp_path / "config.yaml").config.data.train == values["data"]["train"]
        return
    assert values.keys() == {"data"}
    required = {"train": "x.json", "token_buckets": [8], "tower_buckets": {}}
    section = load_section("data", required | values["data"], ())
    assert isinstance(section, DataSection)
    for one in list_sets(section.train):
        check_dialect(section.dialect_of(one))


def test_settings_that_are_named_exist() -> None:
    names = set(re.findall(r"`(data\.\w+)", PAGE))
    assert len(names) > 25
    assert names <= set(known_keys())


@pytest.mark.parametrize("page", COMMANDS)
def test_commands_are_understood(page: str) -> None:
    lines = [line for block in blocks("bash", COMMANDS[page]) for line in block.splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("mmfn ")]
    commands += [shlex.split(code)[1:] for code in re.findall(r"`(mmfn \w+ [^`]+ [^`]+)`", COMMANDS[page])]
    assert commands
    for command in commands:
        parse(command)
