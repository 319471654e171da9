"""What a run that goes on says, takes over, leaves and refuses, and what it does with a folder."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmfn import cli, tree
from mmfn.train.build.run import Run, prepare
from mmfn.train.checkpoint import open_checkpoint, read, write
from mmfn.train.config.changes import FIXED, changes, refuse
from mmfn.train.config.load import describe, known_keys, load_config
from mmfn.train.data.cursor import START, Cursor
from mmfn.train.run.keeper import Keeper
from mmfn.train.run.resume import is_finished, resume_
from tests.train.checkpoint.cases import attempt
from tests.train.checkpoint.test_damage import flip
from tests.train.rank_cases import MakeConfig
from tests.train.resume_cases import STEPS, Stopped, check_same, config_of, metrics, run


@pytest.fixture
def config(make_config: MakeConfig, small_demo: Path, full_demo: Path, tmp_path: Path) -> Path:
    return config_of(make_config, small_demo, full_demo, tmp_path)


def stopped(config: Path, *changes: str, step: int = 5) -> None:
    with pytest.raises(Stopped):
        run(load_config(config, changes), step)


def alone(config: Path, *changes: str) -> Run:
    return prepare(load_config(config, changes), lambda text: None)


def test_a_flipped_byte_is_passed_over_and_set_aside(config: Path, tmp_path: Path) -> None:
    """On two ranks, of which one alone reads it. The run saves those steps again."""
    both = ("layout.dp=2", f"output.path={tmp_path / 'whole'}")
    run(load_config(config, both))
    broken = ("layout.dp=2", f"output.path={tmp_path / 'broken'}")
    stopped(config, *broken, step=7)
    root = tmp_path / "broken" / "state"
    assert read.names(root) == ["iter_0000006", "iter_0000004"]
    flip(root / "iter_0000006" / "rank_00001.safetensors", -1)
    said = run(load_config(config, broken))
    assert "skipped iter_0000006: " in said
    assert "is damaged: its bytes differ from those that were saved" in said
    assert f"resumed from {root / 'iter_0000004'}" in said
    check_same(tmp_path / "broken", tmp_path / "whole")
    assert [path.name[:21] for path in root.iterdir() if "damaged" in path.name] == ["iter_0000006.damaged-"]


def test_all_damaged_is_no_new_beginning(config: Path, tmp_path: Path) -> None:
    """Nothing is overwritten unless that is asked for."""
    stopped(config)
    root = tmp_path / "run" / "state"
    for name in read.names(root):
        flip(root / name / "rank_00000.safetensors", -1)
    before = metrics(tmp_path / "run")
    said = attempt(lambda: run(load_config(config)))
    assert said is not None
    assert said.count("skipped iter_") == 2
    assert "set output.overwrite=true to begin anew" in said
    assert metrics(tmp_path / "run") == before
    assert "resumed" not in run(load_config(config, ["output.overwrite=true"]))


def test_checkpoints_that_go_while_a_run_is_prepared_are_missed(config: Path, tmp_path: Path) -> None:
    """Its parameters have no values then, and no step is taken from them."""
    stopped(config)
    begun = prepare(load_config(config), lambda text: None, is_restored=True)
    (tmp_path / "run" / "state").rename(tmp_path / "elsewhere")
    assert "are gone since the run was begun; begin it again" in str(attempt(lambda: resume_(begun, tmp_path / "run")))


def test_settings_that_changed_are_named(config: Path, tmp_path: Path) -> None:
    stopped(config)
    changed = ("optimizer.lr=0.005", "data.token_buckets=[64, 128, 256]", "data.workers=2", "train.log_every=3")
    said = run(load_config(config, changed))
    (line,) = [line for line in said.splitlines() if line.startswith("settings that changed since: ")]
    assert line.endswith(": data.token_buckets [384] -> [64, 128, 256], optimizer.lr 0.002 -> 0.005")


FIX = {
    "model.dtype": "model.dtype=bfloat16",
    "lora.rank": "lora.rank=2",
    "lora.targets": "lora.targets=['text/layers/.*/attention/query']",
    "optimizer.kind": "optimizer.kind=sgd",
    "optimizer.master": "optimizer.master=false",
    "optimizer.moments_dtype": "optimizer.moments_dtype=bfloat16",
    "freeze.parts": "freeze.parts=[vision_encoder]",
    "freeze.patterns": "freeze.patterns=['text/norm/.*']",
    "lora.keep": "lora.keep=['text/norm/.*']",
    "optimizer.clip_norm": "optimizer.clip_norm=null",
    "optimizer.ema_decay": "optimizer.ema_decay=0.9 output.weights=ema",
    "train.spike_window": "train.spike_window=4",
}


def test_every_fixed_setting_is_refused(config: Path, tmp_path: Path) -> None:
    """One sentence that says what it was and what it is, before anything is read of the state."""
    assert {rule.setting for rule in FIXED} == set(FIX)
    assert set(FIX) <= set(known_keys())
    for setting, change in FIX.items():
        base = ["lora.rank=4"] if setting.startswith("lora.") else []
        base += ["model.dtype=bfloat16"] if setting == "optimizer.master" else []
        text = describe(load_config(config, base))
        changed = changes(text, load_config(config, [*base, *change.split()]))
        assert [one.setting for one in changed] == [setting]
        said = attempt(lambda: refuse(changed, tmp_path / "iter_0000004", has_optimizer=True))  # noqa: B023
        assert f"iter_0000004 cannot be resumed from: {setting} was " in str(said)
        is_optimizer = next(rule.is_optimizer for rule in FIXED if rule.setting == setting)
        left = attempt(lambda: refuse(changed, tmp_path, has_optimizer=False))  # noqa: B023
        assert (left is None) == is_optimizer


def test_other_values_of_what_stays_on_are_no_obstacle(config: Path, tmp_path: Path) -> None:
    text = describe(load_config(config, ["optimizer.ema_decay=0.9", "output.weights=ema"]))
    other = ["optimizer.ema_decay=0.99", "output.weights=ema", "optimizer.clip_norm=2"]
    changed = changes(text, load_config(config, other))
    assert [one.setting for one in changed] == ["optimizer.clip_norm", "optimizer.ema_decay"]
    refuse(changed, tmp_path, has_optimizer=True)


TAKES = {
    (True, True): ("params", "opt", "guard", "step"),
    (False, True): ("params", "step"),
    (True, False): ("params", "opt", "guard"),
    (False, False): ("params",),
}


@pytest.mark.parametrize("choice", TAKES)
def test_what_another_run_takes_over(config: Path, tmp_path: Path, choice: tuple[bool, bool]) -> None:
    optimizer, cursor = choice
    stopped(config)
    folder = tmp_path / "run" / "state" / "iter_0000004"
    reference, fresh = alone(config), alone(config, "output.path=a")
    resume_(reference, tmp_path / "run")
    settings = [f"checkpoint.load_optimizer={optimizer}".lower(), f"checkpoint.load_cursor={cursor}".lower()]
    begun = alone(config, f"checkpoint.resume={folder}", *settings, "output.path=other")
    start = resume_(begun, tmp_path / "other")
    for name in ("params", "opt", "guard", "step"):
        expected = (reference if name in TAKES[choice] else fresh).state[name]
        assert all(map(torch.equal, tree.leaves(begun.state[name]), tree.leaves(expected)))
    assert start.cursor.step == (4 if cursor else 0)
    assert cursor or start.cursor == START
    assert not start.has_run
    assert ("the optimizer begins anew" in start.notes) == (not optimizer)


@pytest.mark.parametrize("setting", ["checkpoint.save_optimizer=false", "checkpoint.load_optimizer=false"])
def test_an_optimizer_that_begins_anew_begins_at_the_parameters_that_were_read(
    config: Path, tmp_path: Path, setting: str
) -> None:
    """Its float32 copies are what the next step is taken from: those of other parameters would undo all steps."""
    wide = ("model.dtype=bfloat16", "optimizer.ema_decay=0.9", "output.weights=ema")
    is_own = "save" in setting
    stopped(config, *wide, *((setting,) if is_own else ()))
    away = () if is_own else (f"checkpoint.resume={tmp_path / 'run' / 'state'}", "output.path=other")
    begun, initial = alone(config, *wide, setting, *away), alone(config, *wide, "output.path=another")
    resume_(begun, tmp_path / ("run" if is_own else "other"))
    params, opt = (dict(tree.items(begun.state[name])) for name in ("params", "opt"))
    assert not all(map(torch.equal, params.values(), tree.leaves(initial.state["params"])))
    for what in ("master/", "ema/"):
        found = {path.rpartition(what)[2]: leaf for path, leaf in opt.items() if what in path}
        assert found.keys() == params.keys()
        assert all(torch.equal(leaf, params[path].to(leaf.dtype)) for path, leaf in found.items()), what
    assert [path for path, leaf in opt.items() if "/m/" in path and leaf.any()] == []


def test_such_a_run_goes_on_in_its_own_folder(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it takes over from another run counts where it begins, not whenever it is started again."""
    monkeypatch.chdir(tmp_path)
    run(load_config(config))
    other = [f"checkpoint.resume={tmp_path / 'run' / 'state'}", "checkpoint.load_cursor=false"]
    other += ["checkpoint.load_optimizer=false"]
    said = run(load_config(config, [*other, "output.path=whole"]))
    assert "iter_0000007" in said
    stopped(config, *other, "output.path=broken")
    said = run(load_config(config, [*other, "output.path=broken"]))
    assert f"resumed from {Path('broken') / 'state' / 'iter_0000004'}" in said
    check_same(tmp_path / "broken", tmp_path / "whole")


def test_parameters_alone(config: Path, tmp_path: Path) -> None:
    alone_ = "checkpoint.save_optimizer=false"
    stopped(config, alone_)
    folder = tmp_path / "run" / "state" / "iter_0000004"
    leaves = open_checkpoint(folder).manifest.leaves
    assert all(path == "step" or path.startswith("params/") for path in leaves)
    other = [f"checkpoint.resume={folder}", f"output.path={tmp_path / 'other'}"]
    said = attempt(lambda: run(load_config(config, other)))
    assert "holds no state of the optimizer (checkpoint.save_optimizer=false); set checkpoint.load" in str(said)
    assert "the optimizer begins anew" in run(load_config(config, [*other, "checkpoint.load_optimizer=false"]))
    assert "the optimizer begins anew" in run(load_config(config, [alone_]))
    assert [record["step"] for record in metrics(tmp_path / "run")] == list(range(1, STEPS + 1))


def test_a_finished_run_says_so(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command does nothing, and ends well; a change that needs more steps is refused without them."""

    def finished(*changes: str) -> bool:
        loaded = load_config(config, changes)
        return is_finished(loaded, alone(config, "output.path=nowhere").place.host["world"])

    stopped(config)
    assert not finished()
    run(load_config(config))
    assert finished()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert cli.main(["train", str(config), "checkpoint.keep_last=1"]) == 0
    assert "is finished: it has taken its 7 steps with these settings; raise train.steps" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    assert finished("data.workers=2", "checkpoint.keep_last=1")
    for change in ("train.steps=9", "optimizer.lr=0.5", "data.max_bad_share=0.2", "output.overwrite=true"):
        assert not finished(change), change
    assert cli.main(["train", str(config), "optimizer.lr=0.5"]) == 2
    late = "has taken its 7 steps, which optimizer.lr 0.002 -> 0.5 comes too late for; raise train.steps or train.ep"
    assert late in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    said = run(load_config(config, ["train.steps=9"]))
    assert "settings that changed since: train.steps 7 -> 9" in said
    assert [record["step"] for record in metrics(tmp_path / "run")] == list(range(1, 10))


def test_a_run_that_has_saved_nothing_begins_again(config: Path, tmp_path: Path) -> None:
    stopped(config, step=1)
    assert not read.names(tmp_path / "run" / "state")
    assert "the earlier run left no checkpoint; it begins at its first step again" in run(load_config(config))
    assert [record["step"] for record in metrics(tmp_path / "run")] == list(range(1, STEPS + 1))
    unsaved = ["checkpoint.every=null", f"output.path={tmp_path / 'unsaved'}"]
    stopped(config, *unsaved)
    assert "is not empty; choose another or set output.overwrite=true" in str(attempt(lambda: alone(config, *unsaved)))


def test_the_last_step_and_the_best_are_due(config: Path, tmp_path: Path, small_demo: Path) -> None:
    """And any step may be saved: by a signal, say, and at most once."""
    begun = alone(config, "checkpoint.keep_best=1", "eval.every=2", f"data.eval={small_demo / 'eval.json'}")
    root = tmp_path / "run" / "state"
    with Keeper.of(begun, tmp_path / "run") as keep:
        assert [step for step in range(1, STEPS + 1) if keep.is_due(step)] == [2, 4, 6, 7]
        for step, loss in ((1, 2.0), (3, 3.0), (3, 3.0), (5, 1.0), (6, None), (7, None)):
            assert keep.is_due(step, loss) == (step != 3)
            keep(begun.state, Cursor(step=step), loss)
    assert read.names(root) == ["iter_0000007", "iter_0000006", "iter_0000005"]
    assert open_checkpoint(root / "iter_0000005").manifest.facts.loss == 1.0
    with Keeper.of(begun, tmp_path / "run", last_step=7) as keep:
        assert keep.losses == {7: None, 6: None, 5: 1.0}
        assert keep.is_due(9, 0.5)
        assert not keep.is_due(9, 1.5)
        keep(begun.state, Cursor(step=7))


@pytest.mark.parametrize("number", [errno.ENOSPC, pytest.param(errno.EROFS, marks=pytest.mark.slow)])
def test_a_save_that_fails_ends_the_run(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """In one sentence, at the latest behind the last step, and what was saved before is gone on from."""
    run(load_config(config, [f"output.path={tmp_path / 'whole'}"]))
    real: Callable[..., None] = write.write_file

    def fail(path: Path, *rest: object) -> None:
        if "iter_0000006" in str(path):
            raise OSError(number, os.strerror(number), str(path))
        real(path, *rest)

    monkeypatch.setattr(write, "write_file", fail)
    said = attempt(lambda: run(load_config(config)))
    monkeypatch.undo()
    assert f"saving checkpoint iter_0000006 failed on rank 0: {os.strerror(number)} (" in str(said)
    assert "iter_0000004" in run(load_config(config))
    check_same(tmp_path / "run", tmp_path / "whole")
