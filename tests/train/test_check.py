"""`mmfn check`: a line for each thing that is checked, and every one of them can fail."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mmfn import cli

ROOT = Path(__file__).parents[2]
CHECKS = (
    "settings",
    "output",
    "model",
    "training",
    "tokenizer",
    "data.train",
    "data.eval",
    "resume",
    "layout",
    "memory",
)
BROKEN = {
    "settings": ["train.steps=0"],
    "output": ["output.path=/dev/null/run"],
    "model": ["model.path=none"],
    "training": ["freeze.parts=[ears]"],
    "tokenizer": ["data.image_min_pixels=9", "data.image_max_pixels=4"],
    "data.train": ["data.train=none.json"],
    "data.eval": ["data.eval=none.json"],
    "resume": ["checkpoint.resume=nope"],
    "layout": ["layout.ep=2", "layout.dp=2"],
    "memory": ["data.token_buckets=[4194304]"],
}


@pytest.fixture
def call(make_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`call(*arguments)` runs `mmfn check` on a config of the demo."""
    config = make_config()

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["check", str(config), *arguments])
        return code, *capsys.readouterr()

    return run


def states(out: str) -> dict[str, str]:
    """By name of a check, how it went."""
    lines = [line.split(maxsplit=1) for line in out.splitlines() if line.startswith(("ok ", "WRONG "))]
    return {rest.partition(": ")[0]: state for state, rest in lines}


def test_all_is_well(call: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = call("--world", "1")
    assert (code, err) == (0, "")
    assert states(out) == dict.fromkeys(CHECKS, "ok")
    assert out.splitlines()[-1] == f"{len(CHECKS)} checks, nothing is wrong"
    assert "ok     layout: one device\n" in out
    assert "it fits cpu" in out


@pytest.mark.parametrize("name", CHECKS)
def test_each_check_can_fail(call: Callable[..., tuple[int, str, str]], name: str) -> None:
    """Those that do not need it go on."""
    code, out, err = call(*BROKEN[name])
    assert code == 2
    assert [check for check, state in states(out).items() if state == "WRONG"] == [name]
    assert err.startswith("mmfn: error: 1 of ")
    assert f"checks failed, the first: {name}: " in err
    assert err.count("\n") == 1
    if name not in ("settings", "model"):
        assert states(out).keys() >= {"settings", "model", "training", "layout"}


def test_the_ranks_that_will_be_started(call: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = call("--world", "4")
    assert code == 2
    assert "WRONG  layout: layout one device: replicate * dp * cp = 1 but there are 4 ranks; change the layout" in out
    assert call("--world", "4", "layout.dp=2", "layout.cp=2")[0] == 0


def test_epochs_in_place_of_steps(call: Callable[..., tuple[int, str, str]]) -> None:
    """Schedules of their own included, whose steps only the data say."""
    groups = "schedule.groups={'vision/.*': {lr: 1e-3, warmup_steps: 9}}"
    assert call("train.steps=null", "train.epochs=2", "schedule.warmup_steps=7", groups)[0] == 0


def test_several_things_are_wrong(call: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = call("data.train=none.json", "freeze.parts=[ears]", "layout.kind=ring")
    assert code == 2
    assert [name for name, state in states(out).items() if state == "WRONG"] == ["training", "data.train"]
    assert "note   settings: layout.kind has no effect with cp 1" in out
    assert "2 of 9 checks failed, the first: training: " in err


def test_weights_are_checked_where_they_are(
    call: Callable[..., tuple[int, str, str]], full_demo: Path, tmp_path: Path
) -> None:
    """By their headers alone; a tensor that the model does not have is found."""
    folder = tmp_path / "model"
    shutil.copytree(full_demo / "model", folder)
    chosen = [f"model.path={folder}", "model.init=load"]
    code, out, _ = call(*chosen)
    assert code == 0
    assert "ok     weights: not here, so not checked" in out
    header = json.dumps({"strange": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    code, out, _ = call(*chosen)
    assert code == 2
    assert states(out)["weights"] == "WRONG"
    assert "strange" in out


def test_without_files(call: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = call("--no-files", "data.train=none.json", "model.device=mps")
    assert code == 0
    assert "left   tokenizer, data and resume: --no-files" in out
    assert "left   memory: no plan knows 'mps'; name one by --device" in out
    assert "it fits h200" in call("--no-files", "model.device=mps", "--device", "h200")[1]


@pytest.mark.parametrize(("kind", "device"), [("cpu", "cpu"), ("cuda", "h100"), ("npu", "910b")])
def test_a_plan_is_for_the_device_of_the_run(
    make_config: Callable[..., Path], capsys: pytest.CaptureFixture[str], kind: str, device: str
) -> None:
    """As the memory of a check; none is taken for another kind."""
    assert cli.main(["plan", str(make_config({"model.device": kind, "model.kernels": "portable"}))]) == 0
    assert f"predicted step on {device}" in capsys.readouterr().out
    assert cli.main(["plan", str(make_config({"model.device": "mps"}))]) == 2
    assert capsys.readouterr().err == "mmfn: error: no plan knows 'mps'; name one by --device\n"


def test_buckets_of_towers_are_of_whole_features(
    call: Callable[..., tuple[int, str, str]], make_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """As training refuses them; a plan as well."""
    sentence = "tower_buckets of 'vision' must be multiples of 4, what makes a feature, got 126; use 128"
    chosen = "data.tower_buckets={vision: [126]}"
    assert f"WRONG  training: {sentence}\n" in call(chosen)[1]
    assert cli.main(["plan", str(make_config()), chosen, "--device", "h200"]) == 2
    assert capsys.readouterr().err == f"mmfn: error: {sentence}\n"


def test_what_a_run_goes_on_from(
    call: Callable[..., tuple[int, str, str]],
    make_config: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    full_demo: Path,
    tmp_path: Path,
) -> None:
    """It is refused as training refuses it, and nothing is written."""
    assert "ok     resume: the run begins at its first step\n" in call()[1]
    saved = ["checkpoint.every=1", "train.steps=2", "data.batch_samples=2", "data.max_samples=9"]
    config, run = str(make_config({"data.eval": None})), tmp_path / "run"
    assert cli.main(["train", config, *saved]) == 0
    capsys.readouterr()
    newest, before = run / "state" / "iter_0000002", {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    code, out, _ = call(*saved, "output.overwrite=false")
    assert code == cli.main(["train", config, *saved, "output.overwrite=false"]) == 0
    assert f"ok     output: {str(run)!r} holds this run, finished\n" in out
    capsys.readouterr()
    assert f"ok     resume: the run in {str(run)!r} has taken its 2 steps: nothing is left to train" in call(*saved)[1]
    on = [*saved, "train.steps=3"]
    assert f"ok     resume: goes on from {newest}; settings that changed since: train.steps 2 -> 3\n" in call(*on)[1]
    for changes in (
        [*on, "optimizer.kind=sgd"],
        [*on, "train.seed=5"],
        [*on, "data.batch_samples=3"],
        [*on, "data.max_samples=8"],
        [*saved, "optimizer.lr=1"],
        [*saved, "train.steps=1"],
        [*saved, f"checkpoint.resume={newest}", f"output.path={tmp_path / 'other'}"],
        [*on, f"checkpoint.resume={tmp_path}", f"output.path={tmp_path / 'other'}"],
    ):
        code, out, err = call(*changes)
        assert code == 2
        assert [name for name, state in states(out).items() if state == "WRONG"] == ["resume"], out
        assert cli.main(["train", config, *changes]) == 2
        assert capsys.readouterr().err == f"mmfn: error: {err.partition('resume: ')[2]}"
    wider = tmp_path / "wider"
    shutil.copytree(full_demo / "model", wider)
    facts = json.loads((wider / "config.json").read_text())
    facts["text_config"]["intermediate_size"] *= 2
    (wider / "config.json").write_text(json.dumps(facts))
    code, out, _ = call(*on, f"model.path={wider}")
    assert code == cli.main(["train", config, *on, f"model.path={wider}"]) == 2
    assert f"WRONG  resume: {newest} cannot be resumed from: its params/text/layers/" in out
    assert "cannot be resumed from: its " in capsys.readouterr().err
    other = [*saved, f"checkpoint.resume={run}", f"output.path={tmp_path / 'other'}"]
    assert f"ok     resume: goes on from {newest}" in call(*other, "checkpoint.load_cursor=false", "train.seed=5")[1]
    assert call(*other, "train.epochs=2", "train.steps=null")[0] == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
