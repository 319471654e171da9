"""Runs on data with faults, by a budget of tokens, with workers of both kinds: what they record and when they end."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.launch import Place
from mmfn.parallel.mesh.layout import Mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.train.build import data as build_data
from mmfn.train.build.run import Run, prepare
from mmfn.train.config.load import load_config
from mmfn.train.data import Dataset, load_processor
from mmfn.train.data.agree import gather_skips
from mmfn.train.data.skips import SHOWN, Skip
from mmfn.train.run.progress import Progress
from mmfn.train.run.training import run_training
from tests.train.rank_cases import MakeConfig, train

TOKENS = {"data.batch_samples": 8, "data.batch_tokens": 768, "data.token_buckets": [384]}
NUMBERS = ("samples", "tokens", "supervised", "media_tokens", "padding", "bad", "too_long", "cut")


@pytest.fixture
def faulty(small_demo: Path, full_demo: Path, tmp_path: Path) -> Path:
    """The small demo with an image that ends early, one that is missing, and an entry without an answer."""
    folder = tmp_path / "data"
    shutil.copytree(full_demo / "images", folder / "images")
    entries = json.loads((small_demo / "train.json").read_text())
    (folder / entries[5]["images"][0]).write_bytes((folder / entries[5]["images"][0]).read_bytes()[:60])
    (folder / entries[17]["images"][0]).unlink()
    entries[40]["messages"] = entries[40]["messages"][:-1]
    (folder / "train.json").write_text(json.dumps(entries))
    return folder / "train.json"


def settings(faulty: Path, **change: Any) -> dict[str, Any]:
    return {
        "data.train": str(faulty), "data.root": str(faulty.parent), "data.eval": None, "data.check": "first",
        "data.max_bad_share": 0.05, "train.steps": 12, **{name.replace("__", "."): x for name, x in change.items()},
    }  # fmt: skip


def whole(run: Run) -> list[dict[str, Any]]:
    progress = Progress(num_steps=run.loaded.config.train.steps, log_every=100, stream=io.StringIO())
    return list(run_training(run, progress).tally.last)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


def test_a_run_skips_what_is_bad_and_says_so(make_config: MakeConfig, faulty: Path, tmp_path: Path) -> None:
    """In 12 steps of 8 samples every entry comes once. Two ranks write what one does."""
    path = make_config(settings(faulty))
    records = whole(prepare(load_config(path), lambda text: None))
    ledger = lines(tmp_path / "run")
    assert len(ledger) == sum(record["bad"] for record in records) == 3
    assert [(entry["step"], entry["place"]) for entry in ledger] == sorted((e["step"], e["place"]) for e in ledger)
    assert all((entry["step"] - 1) * 8 <= entry["place"] < entry["step"] * 8 for entry in ledger)
    assert {entry["kind"] for entry in ledger} == {"bad"}
    assert sum(record["samples"] for record in records) == 93
    page = (tmp_path / "run" / "report.html").read_text()
    assert "3 bad, 0 too_long, 0 cut" in page
    assert "% of the time of steps" in page

    def work(mesh: Mesh) -> list[dict[str, Any]]:
        return whole(prepare(loaded, lambda text: None, Place(device=torch.device("cpu"), mesh=mesh, host=mesh)))

    loaded = load_config(path, ("layout.dp=2", f"output.path={tmp_path / 'ranks'}"))
    for found in virtual(loaded.config.layout.sizes, work):
        assert [{k: r[k] for k in NUMBERS if k != "padding"} for r in found] == [
            {k: r[k] for k in NUMBERS if k != "padding"} for r in records
        ]
    assert lines(tmp_path / "ranks") == ledger


def test_too_much_that_is_bad_ends_the_run(make_config: MakeConfig, faulty: Path, tmp_path: Path) -> None:
    path = make_config(settings(faulty, data__max_bad_share=0.0))
    with pytest.raises(
        ValueError, match=r"1 of \d+ samples cannot be used, more than data.max_bad_share 0 allows: sample"
    ):
        whole(prepare(load_config(path), lambda text: None))
    assert len(lines(tmp_path / "run")) == 1


def test_a_check_of_all_names_what_is_bad_at_once(make_config: MakeConfig, faulty: Path) -> None:
    said: list[str] = []
    prepare(load_config(make_config(settings(faulty, data__check="all"))), said.append)
    text = "\n".join(said)
    assert "3 of 96 training samples cannot be used (3 bad):" in text
    for fragment in ("it has nothing to learn", "train.json", "names no file in the media root"):
        assert fragment in text, text
    with pytest.raises(ValueError, match=r"3 of 96 samples cannot be used, more than data.max_bad_share 0.02 allows"):
        prepare(load_config(make_config(settings(faulty, data__check="all", data__max_bad_share=0.02))), said.append)


def test_no_rank_of_a_check_holds_what_all_of_them_leave_out(
    make_config: MakeConfig, faulty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a data set that is bad throughout each names as many samples as are shown, and says what one rank says."""
    entries = json.loads(faulty.read_text())
    for entry in entries[10:]:
        entry["messages"] = entry["messages"][:1]
    faulty.write_text(json.dumps(entries))
    path = make_config(settings(faulty, data__check="all", data__max_bad_share=1.0))
    named: list[int] = []

    def gather(skips: list[Skip], axis: Axis) -> tuple[Skip, ...]:
        named.append(len(skips))
        return gather_skips(skips, axis)

    monkeypatch.setattr(build_data, "gather_skips", gather)

    def work(mesh: Mesh) -> list[str]:
        said: list[str] = []
        prepare(loaded, said.append, Place(device=torch.device("cpu"), mesh=mesh, host=mesh))
        return [line for line in said if "sample" in line and "checking" not in line]

    loaded = load_config(path)
    (alone,) = virtual(loaded.config.layout.sizes, work)
    assert len(alone) == 4
    assert " of 96 training samples cannot be used" in alone[0]
    loaded = load_config(path, ("layout.dp=2",))
    assert virtual(loaded.config.layout.sizes, work) == [alone] * 2
    assert named == [SHOWN] * 3


def test_a_budget_of_tokens_trains_alike_on_ranks(make_config: MakeConfig, faulty: Path) -> None:
    path = make_config(settings(faulty, **{k.replace(".", "__"): v for k, v in TOKENS.items()}, train__steps=5))
    one = train(prepare(load_config(path), lambda text: None))
    assert {record["microbatches"] for record in one} == {2}
    assert sum(record["padding"] for record in one) / len(one) < 0.2  # samples of 20 tokens and more, bins of 384

    def work(mesh: Mesh) -> list[dict[str, Any]]:
        return train(prepare(loaded, lambda text: None, Place(device=torch.device("cpu"), mesh=mesh, host=mesh)))

    loaded = load_config(path, ("layout.dp=2",))
    for records in virtual(loaded.config.layout.sizes, work):
        assert [{k: r[k] for k in NUMBERS} for r in records] == [{k: r[k] for k in NUMBERS} for r in one]
        assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in one], rel=2e-3)
        assert {record["microbatches"] for record in records} == {1}


def test_worker_processes_train_alike(make_config: MakeConfig, faulty: Path) -> None:
    change = ("data.workers=2", "data.worker_kind=processes", "train.steps=4")
    path = make_config(settings(faulty))
    threads, processes = (
        train(prepare(load_config(path, some), lambda text: None)) for some in (("train.steps=4",), change)
    )
    assert [r["loss"] for r in threads] == [r["loss"] for r in processes]
    assert [r["bad"] for r in threads] == [r["bad"] for r in processes]


def test_long_conversations_are_cut_behind_an_answer(small_demo: Path, full_demo: Path, tmp_path: Path) -> None:
    """Their beginnings are the samples of shorter conversations, with the images that stand in them."""
    entries = json.loads((small_demo / "train.json").read_text())[:3]
    turns = [entry["messages"] for entry in entries]
    long = {"messages": [m for part in turns for m in part], "images": [p for e in entries for p in e["images"]]}
    shorter = [
        {"messages": [m for part in turns[:n] for m in part], "images": [p for e in entries[:n] for p in e["images"]]}
        for n in (2, 1)
    ]
    path = tmp_path / "long.json"
    path.write_text(json.dumps([long, *shorter]))
    dataset = Dataset(path, load_processor(small_demo / "model"), media_root=full_demo)
    for is_measured in (False, True):
        found = list(dataset.beginnings(0, is_measured=is_measured))
        assert len(found) == 2
        for sample, index in zip(found, (1, 2), strict=True):
            whole_sample = dataset.sample(index)
            assert torch.equal(sample.tokens_T, whole_sample.tokens_T)
            assert torch.equal(sample.labels_T, whole_sample.labels_T)
            shapes = [[image.inputs_UF.shape for image in s.images] for s in (sample, whole_sample)]
            assert shapes[0] == shapes[1]
