"""A run that ended anywhere and goes on from its newest checkpoint is, bit for bit, the one that never ended."""

import io
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mmfn.errors import UserError
from mmfn.train.build.run import prepare
from mmfn.train.checkpoint import read
from mmfn.train.checkpoint.format import MANIFEST
from mmfn.train.config.load import load_config
from mmfn.train.data.reader import Reader
from mmfn.train.data.windows import ByTokens
from mmfn.train.run.progress import Progress
from mmfn.train.run.resume import is_restored
from mmfn.train.run.stored import ALONE
from mmfn.train.run.training import run_training
from tests.train.rank_cases import MakeConfig
from tests.train.resume_cases import STEPS, Stopped, Stopping, check_same, config_of, metrics, run

CASES = {
    "adamw": (),
    "muon, spikes": ("optimizer.kind=muon", "train.spike_window=4", "optimizer.ema_decay=0.9", "output.weights=ema"),
    "bfloat16": ("model.dtype=bfloat16", "data.workers=3"),
    "lora": ("lora.rank=2", "lora.dropout=0.2"),
    "tokens": ("data.batch_tokens=768", "data.window_samples=24"),
    "dp": ("layout.dp=2",),
    "cp": ("layout.dp=2", "layout.cp=2", "data.token_buckets=[64, 128]", "data.tower_buckets={vision: [64]}"),
    "dp tokens": ("layout.dp=2", "data.batch_tokens=768", "data.window_samples=24"),
}
MARKS = dict.fromkeys(("bfloat16", "cp", "dp tokens"), pytest.mark.slow)


@pytest.fixture
def config(make_config: MakeConfig, small_demo: Path, full_demo: Path, tmp_path: Path) -> Path:
    return config_of(make_config, small_demo, full_demo, tmp_path)


@pytest.mark.parametrize("case", [pytest.param(name, marks=MARKS.get(name, ())) for name in CASES])
def test_resumed_is_uninterrupted(config: Path, tmp_path: Path, case: str) -> None:
    """Ended in step 4, behind a save, and again in step 7: parameters, optimizer, guard, cursor, metrics, ledger."""
    changes = (*CASES[case], f"output.path={tmp_path / 'whole'}")
    run(load_config(config, changes))
    broken = (*CASES[case], f"output.path={tmp_path / 'broken'}")
    for stop in (4, 7):
        with pytest.raises(Stopped):
            run(load_config(config, broken), stop)
    said = run(load_config(config, (*broken, "data.workers=2")))
    assert f"resumed from {tmp_path / 'broken' / 'state' / 'iter_0000006'}" in said
    check_same(tmp_path / "broken", tmp_path / "whole")
    assert read.names(tmp_path / "broken" / "state") == ["iter_0000007", "iter_0000006"]


def test_steps_of_epochs_are_counted_once(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By tokens all samples are measured for that: a run that goes on does not, but one over other epochs does."""
    counted: list[int] = []
    count = ByTokens.count_steps
    monkeypatch.setattr(ByTokens, "count_steps", lambda source, num: counted.append(num) or count(source, num))
    epochs = ("train.steps=null", "train.epochs=1", "data.batch_tokens=768", "data.window_samples=24")
    whole, broken = (f"output.path={tmp_path / name}" for name in ("whole", "broken"))
    run(load_config(config, (*epochs, whole)))
    with pytest.raises(Stopped):
        run(load_config(config, (*epochs, broken)), 4)
    samples = counted[0]
    assert counted == [samples] * 2
    for _ in range(2):
        with suppress(Stopped):
            run(load_config(config, (*epochs, broken)), 6)
    run(load_config(config, (*epochs, broken)))
    assert counted == [samples] * 2
    check_same(tmp_path / "broken", tmp_path / "whole", num_steps=len(metrics(tmp_path / "whole")))
    with pytest.raises(UserError, match=r"batch_tokens 768 but this one has 1536"):
        run(load_config(config, (*epochs, "data.batch_tokens=1536", broken)))
    assert counted == [samples] * 2  # it was refused before
    run(load_config(config, (*epochs, "train.epochs=2", broken)))
    assert counted == [samples, samples, 2 * samples]


def test_what_is_counted_is_said_and_outlives_a_run_by_steps(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measuring all samples may take hours: it is said where it is done, and a run by steps hands on what was found."""
    measured: list[str] = []
    monkeypatch.setattr(ByTokens, "count_steps", lambda source, num: measured.append("measured") or 8)
    tokens = ("data.batch_tokens=768", "data.window_samples=24", f"output.path={tmp_path / 'run'}")

    def begin(*changes: str, stop: int) -> list[str]:
        loaded, said = load_config(config, (*tokens, *changes)), list[str]()
        progress = Stopping(num_steps=STEPS, log_every=100, stream=io.StringIO())
        progress.stop = stop
        measured.clear()
        with pytest.raises(Stopped):
            run_training(prepare(loaded, said.append, is_restored=is_restored(loaded, ALONE)), progress)
        return [*measured, *(line for line in said if line.startswith("measuring"))]

    one, both = (
        ("train.steps=null", "train.epochs=1"),
        ["measured", "measuring 96 samples, to know how many steps train.epochs=2 takes"],
    )
    assert begin(*one, stop=3)[0] == "measured"
    assert begin("train.steps=8", stop=5) == []
    assert begin(*one, stop=7) == []  # the newest checkpoint is of the run by steps
    assert begin("train.steps=null", "train.epochs=2", stop=8) == both


def test_data_are_checked_once(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`data.check: all` prepares every sample: not again where a run goes on, unless other samples are left out."""
    checked: list[int] = []
    check = Reader.check
    monkeypatch.setattr(Reader, "check", lambda reader, index: checked.append(index) or check(reader, index))
    whole, broken = (("data.check=all", f"output.path={tmp_path / name}") for name in ("whole", "broken"))
    run(load_config(config, whole))
    size, checked[:] = len(checked), []
    with pytest.raises(Stopped):
        run(load_config(config, broken), 4)
    assert sorted(checked) == [*range(size)]
    checked.clear()
    with pytest.raises(Stopped):
        run(load_config(config, broken), 6)
    run(load_config(config, broken))
    assert checked == []
    check_same(tmp_path / "broken", tmp_path / "whole")
    said: list[str] = []
    for other in ("data.workers=2", "data.long_samples=cut", "data.image_max_pixels=4096"):
        prepare(load_config(config, (*broken, "train.steps=9", other)), said.append, is_restored=True)
    assert sorted(checked) == sorted([*range(size)] * 2)
    first, *others = (line for line in said if line.startswith("checking "))
    assert first == f"checking 0 held-out samples; the {size} training samples were checked when the run began"
    assert others == [f"checking {size} training and 0 held-out samples"] * 2


def test_a_complete_run_is_completed_again(config: Path, tmp_path: Path) -> None:
    """Started once more it trains what is behind its last save, of step 6 or 7 here, and writes all results again."""
    run(load_config(config, [f"output.path={tmp_path / 'whole'}"]))
    for every in ("2", "7"):
        again = [f"output.path={tmp_path / every}", f"checkpoint.every={every}"]
        run(load_config(config, again))
        (tmp_path / every / "checkpoint" / "config.json").unlink()
        run(load_config(config, again))
        assert (tmp_path / every / "checkpoint" / "config.json").exists()
        assert metrics(tmp_path / every) == metrics(tmp_path / "whole")


def test_of_two_runs_in_one_folder_the_second_is_refused(config: Path, tmp_path: Path) -> None:
    """A job that is started again while its first one still runs; it would cut the log, and set saves aside."""
    loaded, said = load_config(config, ["checkpoint.resume=auto", f"output.path={tmp_path / 'run'}"]), list[str]()

    class Twice(Progress):
        def show(self, record: Any, terms: Any = ()) -> None:
            if record["step"] == 5:
                with pytest.raises(UserError) as caught:
                    run(loaded)
                said.append(str(caught.value))

    progress = Twice(num_steps=7, log_every=100, stream=io.StringIO())
    run_training(prepare(loaded, lambda text: None), progress)
    assert said == [
        f"another run is at work in {str(tmp_path / 'run')!r}; wait until it has ended, or set another output.path"
    ]
    run(load_config(config, [f"output.path={tmp_path / 'whole'}"]))
    check_same(tmp_path / "run", tmp_path / "whole")
    assert "previous" not in os.listdir(tmp_path / "run")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda folder: (folder / "rank_00000.safetensors").write_bytes(b""),
    "deleted": lambda folder: (folder / "rank_00000.safetensors").unlink(),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "an unreadable manifest": lambda folder: (folder / MANIFEST).write_text("{}"),
}


@pytest.mark.parametrize(
    "damage", [pytest.param(name, marks=() if name == "cut" else pytest.mark.slow) for name in DAMAGES]
)
def test_a_damaged_checkpoint_is_skipped_aloud(config: Path, tmp_path: Path, damage: str) -> None:
    run(load_config(config, [f"output.path={tmp_path / 'whole'}"]))
    broken = [f"output.path={tmp_path / 'broken'}"]
    with pytest.raises(Stopped):
        run(load_config(config, broken), 5)
    DAMAGES[damage](tmp_path / "broken" / "state" / "iter_0000004")
    said = run(load_config(config, broken))
    assert "skipped iter_0000004: " in said
    assert "resumed from" in said
    assert "iter_0000002" in said
    check_same(tmp_path / "broken", tmp_path / "whole")


def test_another_mesh_goes_on(config: Path, tmp_path: Path) -> None:
    """With another number of ranks sums have another order: the same steps of the same data, to rounding."""
    run(load_config(config, [f"output.path={tmp_path / 'whole'}"]))
    broken = [f"output.path={tmp_path / 'broken'}"]
    with pytest.raises(Stopped):
        run(load_config(config, [*broken, "layout.dp=2"]), 5)
    said = run(load_config(config, [*broken, "layout.dp=2", "layout.cp=2"]))
    assert "iter_0000004" in said
    records, expected = metrics(tmp_path / "broken"), metrics(tmp_path / "whole")
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    for record, one in zip(records, expected, strict=True):
        assert all(record[name] == one[name] for name in ("samples", "supervised", "bad"))
        assert record["loss"] == pytest.approx(one["loss"], rel=2e-3)


REFUSED: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "another seed": (lambda p: ["train.seed=3"], "the cursor is of a run with"),
    "another optimizer": (
        lambda p: ["optimizer.kind=sgd"],
        "optimizer.kind was adamw and now is sgd",
    ),
    "no steps left": (
        lambda p: [f"checkpoint.resume={p / 'state'}", "train.steps=4", "output.path=other"],
        "raise train.steps",
    ),
    "no steps left, by the run": (
        lambda p: [f"checkpoint.resume={p}", "train.steps=4", "output.path=other"],
        "raise train.steps",
    ),
    "nowhere": (lambda p: ["checkpoint.resume=nowhere", "output.path=other"], "it is no folder"),
    "an empty folder": (lambda p: [f"checkpoint.resume={p.parent / 'empty'}", "output.path=other"], "there are none"),
    "no name": (lambda p: [f"checkpoint.resume={p / 'iter_0000009'}", "output.path=other"], "cannot be read"),
    "not wanted": (lambda p: ["checkpoint.resume=none"], "is not empty; .*, or checkpoint.resume=auto to go on in it"),
    "its own, overwritten": (
        lambda p: [f"checkpoint.resume={p / 'state'}", "output.overwrite=true"],
        "checkpoint.resume .* lies in output.path",
    ),
}


def test_what_cannot_be_resumed(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    (tmp_path / "empty").mkdir()
    with pytest.raises(Stopped):
        run(load_config(config), 5)
    for changes, reason in REFUSED.values():
        with pytest.raises(ValueError, match=reason):
            run(load_config(config, changes(folder)))
    assert not (tmp_path / "other").exists()
    said = run(load_config(config, [f"checkpoint.resume={folder / 'state' / 'iter_0000002'}", "output.path=other"]))
    assert "iter_0000002" in said
    assert [record["step"] for record in metrics(tmp_path / "other")] == [3, 4, 5, 6, 7]
    with pytest.raises(ValueError, match=r"checkpoint.keep_last has no effect without checkpoint.every"):
        load_config(config, ["checkpoint.every=null", "checkpoint.keep_last=5"])
