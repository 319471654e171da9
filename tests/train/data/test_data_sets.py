"""Several data sets in a config: read each in its own words, mixed by weight, the same on all ranks."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from mmfn import cli
from mmfn.errors import UserError
from mmfn.train.build.agreement import files_in_common, settings_in_common
from mmfn.train.build.data import open_dataset
from mmfn.train.build.processor import load_model_processor
from mmfn.train.config.load import describe, load_config
from mmfn.train.run.folder import input_paths


@pytest.fixture
def two(tmp_path: Path, make_config: Callable[..., Path]) -> dict[str, Any]:
    talk = [{"from": "me", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    lines = [json.dumps({"id": f"b{i}", "talk": talk}) for i in range(5)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    lines = [json.dumps({"id": f"a{i}", "instruction": "hi", "output": "ho"}) for i in range(7)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    own = {"format": "sharegpt", "columns": {"messages": "talk"}, "tags": {"user_tag": "me"}, "max_samples": 4}
    return {
        "a": {"path": str(tmp_path / "a.jsonl"), "weight": 1},
        "b": {"path": str(tmp_path / "b.jsonl"), "weight": 3, **own},
    }


def test_two_data_sets_in_words_of_their_own(two: dict[str, Any], make_config: Callable[..., Path]) -> None:
    loaded = load_config(make_config({"data.train": [two["a"], two["b"]], "data.root": None, "data.eval": None}))
    data = open_dataset(loaded.config.data, loaded.config.data.train, load_model_processor(loaded.config.model.path))
    assert [data.sample(i).id for i in range(len(data))] == [*(f"a{i}" for i in range(7)), *(f"b{i}" for i in range(4))]
    assert torch.equal(data.sample(0).tokens_T, data.sample(7).tokens_T)
    rows = data.order(0).rows(torch.arange(28 * 4)).view(-1, 4)
    assert ((rows >= 7).sum(1) == 3).all()
    assert (rows.flatten().bincount() == torch.tensor([4] * 7 + [21] * 4)).all()
    assert data.place(8).endswith("b.jsonl', line 2")
    assert list(input_paths(loaded)).count("data.train[0]") == 1
    assert input_paths(loaded)["data.train[1]"] == two["b"]["path"]
    again = yaml.safe_load(describe(loaded))
    assert [one["weight"] for one in again["data"]["train"]] == [1, 3]


def test_without_weights_all_rows_come_once(two: dict[str, Any], make_config: Callable[..., Path]) -> None:
    del two["a"]["weight"], two["b"]["weight"]
    loaded = load_config(make_config({"data.train": [two["a"], two["b"]], "data.eval": None}))
    data = open_dataset(loaded.config.data, loaded.config.data.train, load_model_processor(loaded.config.model.path))
    assert sorted(data.order(0).rows(torch.arange(11)).tolist()) == list(range(11))


def test_ranks_must_have_the_same_data_and_weights(
    two: dict[str, Any], make_config: Callable[..., Path], tmp_path: Path
) -> None:
    def facts(path: str, **change: Any) -> dict[str, Any]:
        sets = [{**two["a"], "path": path, **change}, two["b"]]
        config = load_config(make_config({"data.train": sets, "data.eval": None})).config
        data = open_dataset(config.data, config.data.train, load_model_processor(config.model.path))
        return settings_in_common(config) | files_in_common(config, {"data.train": data, "data.eval": None})

    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((tmp_path / "a.jsonl").read_bytes())
    os.utime(copy, (1, 1))
    first = facts(two["a"]["path"])
    assert facts(str(copy)) == first
    assert facts(str(copy), weight=2) != first
    copy.write_text(copy.read_text().replace("ho", "hu"))
    assert facts(str(copy)) != first


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ([], "data.train is [] but it names no data set; correct the value"),
        ([{"weight": 1}], "but item 0: path: Field required"),
        (["a", {"path": "b", "wieght": 1}], "item 1: unknown key 'wieght', known are path, weight, format"),
        ([3], "item 0: Input should be a valid dictionary"),
        ([{"path": "a", "weight": 0}], "item 0: weight: Input should be greater than 0"),
        ([{"path": "a", "max_samples": "3"}], "item 0: max_samples: Input should be a valid integer"),
        (3, "input should be a valid string"),
    ],
)
def test_wrong_lists(make_config: Callable[..., Path], value: Any, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(make_config({"data.train": value}))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_on_a_mixture(
    two: dict[str, Any], make_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_config({"data.train": [two["a"], two["b"]], "data.eval": [two["a"]["path"]], "train.steps": 2})
    assert cli.main(["train", str(path)]) == 0
    assert "checking 11 training and 7 held-out samples" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tar", "saved"])
def test_a_run_on_each_kind_of_file_is_the_same(
    make_config: Callable[..., Path], small_demo: Path, full_demo: Path, tmp_path: Path, kind: str
) -> None:
    """From images in files, in cells and in members; evaluated too."""
    entries = json.loads((small_demo / "train.json").read_text(encoding="utf-8"))[:12]
    pictures = [(small_demo / entry["images"][0]).read_bytes() for entry in entries]
    (tmp_path / "plain.json").write_text(json.dumps(entries))
    path = tmp_path / f"data.{kind}"
    pairs = list(zip(entries, pictures, strict=True))
    rows = [{**entry, "images": [{"bytes": data, "path": "a.png"}]} for entry, data in pairs]
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, entries)))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    elif kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    else:
        with tarfile.open(path, "w") as archive:
            for number, (entry, data) in enumerate(pairs):
                for name, part in (("json", json.dumps({**entry, "images": ["png"]}).encode()), ("png", data)):
                    info = tarfile.TarInfo(f"{number:03d}.{name}")
                    info.size = len(part)
                    archive.addfile(info, io.BytesIO(part))
    lines = []
    for number, source in enumerate((tmp_path / "plain.json", path)):
        root = str(full_demo) if source.suffix in (".json", ".jsonl") else None
        settings = {"data.train": str(source), "data.eval": str(source), "data.root": root, "train.steps": 2}
        config = make_config({**settings, "output.path": str(tmp_path / f"run{number}")})
        assert cli.main(["train", str(config)]) == 0
        metrics = (tmp_path / f"run{number}" / "metrics.jsonl").read_text().splitlines()
        lines.append([(step["loss"], step["grad_norm"], step["tokens"]) for step in map(json.loads, metrics)])
    assert lines[0] == lines[1]
    assert len(lines[0]) == 2
