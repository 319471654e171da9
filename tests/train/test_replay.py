"""A step of a run replayed: bit for bit where nothing is wrong, and whatever is injected is named."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mmfn.cli import main
from mmfn.train.run.record import OF_MACHINE
from mmfn.train.run.replay.replay import Replay, Request, replay
from tests.train.replay_cases import bend_adamw, bend_data, bend_op, edit, flip, set_nan, spoil, train
from tests.train.test_processes import finish, start
from tests.train.test_resume import check_same
from tests.train.watch_cases import Bend, nan, scaled

STEPS = 6
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(small_demo: Path, full_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`run("layout.dp=2")` trains a short run in a folder of its own and returns the folder."""
    settings = {
        "model": {"path": str(small_demo / "model"), "init": "random"},
        "data": {
            "train": str(small_demo / "train.json"), "root": str(full_demo), "check": "first", "batch_samples": 4,
            "token_buckets": [192], "tower_buckets": {"vision": [64]},
        },
        "optimizer": {"lr": 2e-3},
        "train": {"steps": STEPS},
        "checkpoint": {"every": 2, "keep_last": 3},
    }  # fmt: skip

    def make(*changes: str) -> Path:
        folder = tmp_path_factory.mktemp("run")
        config = folder.with_suffix(".yaml")
        config.write_text(yaml.safe_dump({**settings, "output": {"path": str(folder)}}))
        train(config, *changes)
        return folder

    return make


@pytest.fixture(scope="module")
def whole(run: Run) -> Path:
    """The run that trials are copies of. Do not change it."""
    return run()


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


Inject = Callable[[Path, pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Trial:
    """What is injected, the step that is asked for, and what is said of it, line by line, in this order."""

    inject: Inject
    step: int
    says: Sequence[str]
    asks: dict[str, Any] = field(default_factory=dict)


WEIGHT = "params/text/layers/1/mlp/down/weight"
MOMENT = "/m/text/layers/0/attention/q/weight"
NOT_STORED = r"iter_0000004 is not the state that the steps from .*iter_0000002 give:"
SOUND = r"iter_0000004 is the state that the steps from .*iter_0000002 give, bit for bit"
REFERENCE = {"kernels": "reference"}


def of_op(name: str, bend: Bend, where: str, *, is_forward: bool = True, **asks: Any) -> Trial:
    """A wrong op, at a replay of a run whose ops were right: the log says that something is, the watch what."""
    return Trial(
        lambda folder, patch: bend_op(name, bend, patch, is_forward=is_forward),
        5,
        [r"step 5 is not what the log says \(from iter_0000004", "first: " + where],
        asks,
    )


TRIALS = {
    "a flipped bit of a parameter": Trial(
        lambda folder, patch: spoil(folder, 4, WEIGHT, partial(flip, place=5, bit=25)),
        5,
        ["step 5 is not what", "loss .* where the log has", NOT_STORED,
         re.escape(f"{WEIGHT}[0, 5] is ") + r".*, bit 25 flipped \(1 of \d+ elements differ\)"],
    ),
    "a flipped bit of a moment": Trial(
        lambda folder, patch: spoil(folder, 4, MOMENT, partial(flip, place=0, bit=28)),
        6,
        ["step 6 is not what", NOT_STORED, re.escape(f"{MOMENT}[0, 0] is ") + r".*, bit 28 flipped \(1 of "],
    ),
    "a parameter that is no number": Trial(
        lambda folder, patch: spoil(folder, 4, WEIGHT, set_nan),
        5,
        [NOT_STORED, WEIGHT, f"the state before it: {WEIGHT} holds 1 numbers that are not finite",
         "first: text/layers/1 / linear / mlp/down/weight, forward, input 1 "],
    ),
    "a flipped bit of the data": Trial(
        lambda folder, patch: bend_data(partial(flip, place=9, bit=26), patch),
        5,
        ["the data are others when they are read again:",
         r"micro-batch 0: towers/vision/inputs_UF\[0, 9\] is .*, bit 26 flipped", SOUND],
    ),
    "data that are no numbers": Trial(
        lambda folder, patch: bend_data(set_nan, patch),
        5,
        ["its data: 0/towers/vision/inputs_UF holds 1 numbers", "first: linear / vision/patch_embed/weight, "],
    ),
    "another learning rate": Trial(
        lambda folder, patch: edit(folder, "optimizer.lr", 1e-3),
        5,
        ["iter_0000004 was saved with other settings: optimizer.lr 0.002 -> 0.001", "step 5 is not what",
         "lr .* where the log has .*: the learning rate is another"],
    ),
    "other samples": Trial(
        lambda folder, patch: (shutil.rmtree(folder / "state"), edit(folder, "data.batch_samples", 5))[1],
        1,
        ["step 1 is not what the log says .from its first step", "samples 5 where the log has 4: the data are others"],
    ),
    "an activation that is no number": of_op(
        "swiglu", nan, r"text/layers/0 / swiglu / call 1, forward, output float32.* is not finite at "
    ),
    "a gradient that is no number": of_op(
        "attention", nan, "text/layers/1 / attention / call 1, backward, gradient of input 0 ", is_forward=False
    ),
    "a wrong norm": of_op(
        "rms_norm", scaled, "text/layers/0 / rms_norm / attention_norm/weight, forward, output ", **REFERENCE
    ),
    "a wrong optimizer": Trial(
        bend_adamw, 3, ["step 3 from iter_0000002", "the update of .*: largest error .* where float32 explains "],
        REFERENCE,
    ),
    "a wrong backward": of_op(
        "swiglu", scaled, "text/layers/1 / swiglu / call 1, backward, gradient of input 0 ", is_forward=False,
        **REFERENCE,
    ),
}  # fmt: skip


def said(found: Replay, *expected: str) -> None:
    """Each of the patterns is in a line of its own or of the one before, in this order."""
    lines = found.lines()
    rest = iter(lines)
    for pattern in expected:
        assert any(re.search(pattern, line) for line in rest), f"{pattern!r} is not in\n" + "\n".join(lines)


@pytest.mark.parametrize("name", TRIALS)
def test_what_was_injected_is_named(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = TRIALS[name]
    trial.inject(folder, monkeypatch)
    found = replay(Request(folder=folder, step=trial.step, **trial.asks))
    said(found, *trial.says)
    assert not found.is_same


@pytest.mark.parametrize("step", [1, 5])
def test_another_order_of_the_data_is_refused(step: int, folder: Path) -> None:
    edit(folder, "train.seed", 3)
    with pytest.raises(ValueError, match="the cursor is of a run with seed 0 but this one has 3"):
        replay(Request(folder=folder, step=step))


# ---- nothing is wrong


def test_a_run_replays_bit_for_bit(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a checkpoint and from the start, to steps with a checkpoint behind them and without; nothing is written."""
    before = sorted(path.relative_to(whole) for path in whole.rglob("*"))
    out = tmp_path / "found.json"
    assert main(["replay", str(whole), "--step", "5", "--json", str(out)]) == 0
    assert capsys.readouterr().out == "step 5 from iter_0000004 (one device): replays bit for bit\n"
    assert json.loads(out.read_text())["same"] is True
    for step, text in (
        (2, "steps 1 to 2 from its first step (one device): replay bit for bit, and so does the state behind step 2"),
        (4, "steps 3 to 4 from iter_0000002 (one device): replay bit for bit, and so does the state behind step 4"),
    ):
        found = replay(Request(folder=whole, step=step))
        assert found.lines() == [text]
        assert found.is_same
    assert sorted(path.relative_to(whole) for path in whole.rglob("*")) == before


def test_every_op_agrees_with_the_reference(whole: Path) -> None:
    found = replay(Request(folder=whole, step=5, kernels="reference"))
    assert found.is_same
    said(
        found,
        "replays bit for bit",
        r"\d+ calls of ops agree with reference in float64, forward and backward; the farthest, at ",
        "as the run took it and by reference ops: loss .* and ",
        "gradients agree; the farthest: ",
    )


def test_runs_of_other_dtypes_and_ranks(run: Run) -> None:
    """A run in bfloat16 whose blocks are computed again, and one of two ranks, beside float64 and one device."""
    narrow = run("model.dtype=bfloat16", "layout.remat=full", "train.steps=2", "checkpoint.every=null",
                 "checkpoint.keep_last=2")  # fmt: skip
    found = replay(Request(folder=narrow, step=2, dtype=torch.float64))
    assert found.is_same, found.lines()
    said(found, "steps 1 to 2 from its first step", "agree with portable in float64", "by float64: loss")
    sharded = run("layout.dp=2", "data.token_buckets=[96, 192]")
    found = replay(Request(folder=sharded, step=3, layout={"dp": 1}))
    assert found.is_same, found.lines()
    said(found, r"step 3 from iter_0000002 \(dp 2\): replays bit for bit", "and by one device: loss", "gradients agree")


def test_ranks_that_are_threads_load_what_they_need_at_once(small_demo: Path) -> None:
    """In a process that has imported nothing yet, as the command line is."""
    program = (
        "import sys, pathlib\n"
        "from mmfn.parallel.mesh.layout import Layout\n"
        "from mmfn.train.data.tokenizer import load_tokenizer\n"
        "from mmfn.train.run.replay.walk import on_ranks\n"
        "assert 'transformers' not in sys.modules\n"
        "print(len(on_ranks(Layout(dp=4), lambda mesh: load_tokenizer(pathlib.Path(sys.argv[1])))))\n"
    )
    command = [sys.executable, "-c", program, str(small_demo / "model")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.stdout == "4\n", found.stderr


def test_another_run_beside_it(run: Run, whole: Path, folder: Path) -> None:
    """A copy is the same to the last bit, as is a run at another time on a slower machine; one with another learning
    rate is apart from its second step on."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    slower = [{**line, **{name: 2 * line[name] + 1 for name in OF_MACHINE if name in line}} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in slower))
    found = replay(Request(folder=whole, step=3, against=folder))
    assert found.is_same, found.lines()
    said(found, "beside .*: settings, logs, parameters, data and gradients are the same, bit for bit")
    other = run("optimizer.lr=1e-3", "train.steps=6")
    found = replay(Request(folder=whole, step=3, against=other))
    assert not found.is_same
    said(
        found, "step 3 from iter_0000002 .*: replays bit for bit", "beside .*:",
        "settings: optimizer.lr 0.001 -> 0.002", "logs: apart from step 1 on: lr 0.002 and 0.001",
        "data: the same", "parameters before it: params|text/", "gradients: .* by .* of its norm at most",
    )  # fmt: skip


@pytest.mark.parametrize("change", ["optimizer.lr=1e-3", "layout.dp=2"])
def test_a_run_that_went_on_with_other_settings(change: str, run: Run) -> None:
    """Each step is taken with the settings that it was taken with; steps of two settings are not mixed."""
    folder = run("train.steps=4", "data.token_buckets=[96, 192]")
    train(folder / "config.yaml", "train.steps=8", change, "checkpoint.keep_last=9")
    assert [path.name for path in (folder / "earlier").iterdir()] == ["until_0000004.yaml"]
    layout = "dp 2" if change.startswith("layout") else "one device"
    for step, notes, verdict in (
        (3, [], "step 3 from iter_0000002 (one device): replays bit for bit"),
        (
            5,
            ["iter_0000004 was saved with other settings: "],
            f"step 5 from iter_0000004 ({layout}): replays bit for bit",
        ),
        (7, [], f"step 7 from iter_0000006 ({layout}): replays bit for bit"),
    ):
        found = replay(Request(folder=folder, step=step))
        assert found.lines()[-1] == verdict
        assert [line.startswith(note) for line, note in zip(found.lines(), notes, strict=False)] == [True] * len(notes)
    for step in (2, 4):
        shutil.rmtree(folder / "state" / f"iter_{step:07d}")
    assert replay(Request(folder=folder, step=3)).is_same
    with pytest.raises(
        ValueError, match="step 5 cannot be taken again: steps 1 to 4, which lead to it, were taken with"
    ):
        replay(Request(folder=folder, step=5))


def test_a_run_that_began_behind_a_checkpoint_of_another(run: Run, whole: Path) -> None:
    other = run(f"checkpoint.resume={whole / 'state' / 'iter_0000004'}", "optimizer.lr=1e-3", "checkpoint.keep_last=1")
    shutil.rmtree(other / "state")
    found = replay(Request(folder=other, step=6))
    assert found.is_same
    said(found, "settings that changed since: optimizer.lr", "resumed from .*iter_0000004",
         r"steps 5 to 6 from its first step \(one device\): replay bit for bit")  # fmt: skip


REFUSED = {
    "no run": (["nowhere", "--step", "1"], "has no config.yaml, so it is no run's folder"),
    "no such step": (["RUN", "--step", "9"], "--step is 9 but the run has steps 1 to 6; choose one of them"),
    "no place": (
        ["RUN", "--step", "5", "--json", "nowhere/found.json"],
        "--json 'nowhere/found.json' lies in a folder",
    ),
    "no layout": (["RUN", "--step", "5", "--layout", "dp=0"], "--layout is 'dp=0' but must be sizes such as dp=2,cp=2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_replayed(name: str, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args, sentence = REFUSED[name]
    assert main(["replay", *(str(whole) if arg == "RUN" else arg for arg in args)]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.dist
@pytest.mark.parametrize("num", [1, 2])
def test_two_runs_of_one_seed_are_the_same(num: int, whole: Path, tmp_path: Path) -> None:
    """Two times the same command in new processes: metrics, state and checkpoint to the last bit; and replayed here."""
    common = ["train", str(whole / "config.yaml"), f"layout.dp={num}", "data.max_bad_share=0.02"]
    runs = [start(num, *common, f"output.path={tmp_path / name}") for name in ("one", "two")]
    for ranks in runs:
        assert [code for code, _, _ in finish(ranks)] == [0] * num
    for name in ("one", "two"):
        (tmp_path / name / "skipped.jsonl").touch()  # nothing was
    check_same(tmp_path / "one", tmp_path / "two", STEPS)
    found = replay(Request(folder=tmp_path / "one", step=5))
    assert found.is_same, found.lines()
    said(found, "replays bit for bit")
