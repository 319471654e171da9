"""The command line end to end: a short run, its checkpoint in transformers, and how commands end."""

import errno
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mmfn import arguments, cli
from mmfn.errors import UserError
from mmfn.ops import TABLES, portable
from mmfn.train.commands import train as train_command

ROOT = Path(__file__).parents[1]
SLOW_SECONDS = 300
pytestmark = pytest.mark.xdist_group("cli")  # one process, so that the run is made once


def call(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd or ROOT, env=env, capture_output=True, text=True, timeout=SLOW_SECONDS
    )


@pytest.fixture(scope="module")
def demo(small_demo: Path, full_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out like build/demo, with a run of 30 steps made by `python -m mmfn train`."""
    folder = tmp_path_factory.mktemp("cli")
    for name in ("images", "model", "train.json", "eval.json"):
        (folder / name).symlink_to(small_demo / name)
    config = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    config["model"]["path"] = str(folder / "model")
    config["data"] |= {"train": str(folder / "train.json"), "eval": str(folder / "eval.json"), "root": str(full_demo)}
    config["schedule"]["warmup_steps"] = 5
    config["output"]["path"] = str(folder / "run")
    (folder / "demo.yaml").write_text(yaml.safe_dump(config))
    done = call("-m", "mmfn", "train", str(folder / "demo.yaml"), "train.steps=30", "train.log_every=10")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


def test_train_prints_lines_and_where_things_are(demo: Path) -> None:
    lines = (demo / "stdout.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines if line.startswith("step=")] == ["step=10/30", "step=20/30", "step=30/30"]
    evaluation = json.loads((demo / "run" / "eval.json").read_text())
    right = f"{evaluation['num_correct']} of 24"
    assert lines[-2] == f"held-out accuracy: {evaluation['accuracy']:.4f} ({right}), loss {evaluation['loss']:.4f}"
    assert lines[-1] == f"report: {demo / 'run' / 'report.html'}"
    assert (demo / "run" / "report.html").is_file()


def test_training_learns(demo: Path) -> None:
    records = [json.loads(line) for line in (demo / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["loss"] > 5
    assert records[-1]["loss"] < 1.5


def test_exported_checkpoint_answers_the_same_in_transformers(demo: Path) -> None:
    done = call(str(ROOT / "examples" / "verify_export.py"), str(demo))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "transformers loads the checkpoint; 24 of 24 of its greedy answers are the same as mmfn's"
    assert lines[-1] == f"report: {demo / 'run' / 'report.html'}"


def test_eval_of_the_checkpoint_repeats_the_evaluation(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = demo / "again.json"
    changes = [f"model.path={demo / 'run' / 'checkpoint'}", "model.init=load"]
    assert cli.main(["eval", str(demo / "demo.yaml"), *changes, "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    first, second = (json.loads(p.read_text()) for p in (demo / "run" / "eval.json", out))
    assert second["answers"] == first["answers"]
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert printed == [(demo / "stdout.txt").read_text().splitlines()[-2]]


def test_generate_answers_like_the_evaluation(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = json.loads((demo / "run" / "eval.json").read_text())["answers"][0]
    checkpoint = str(demo / "run" / "checkpoint")
    args = ["generate", checkpoint, "Which digit is this?", "--image", expected["images"][0], "--max-new-tokens", "4"]
    assert cli.main(args) == 0
    assert capsys.readouterr().out == expected["prediction"].strip() + "\n"


def test_print_config_writes_nothing(make_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = make_config()
    settings = ["train.seed=2", "train.seed=3"]
    orders = (
        [*settings, "--print-config"],
        ["--print-config", *settings],
        [settings[0], "--print-config", settings[1]],
    )
    for order in orders:
        assert cli.main(["train", str(path), *order]) == 0
        printed = capsys.readouterr().out
        assert yaml.safe_load(printed)["train"]["seed"] == 3
    assert "# command line" in printed
    assert list(path.parent.iterdir()) == [path]


def test_interrupt_ends_with_130(
    make_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_command, "prepare", interrupted)
    assert cli.main(["train", str(make_config())]) == 130
    assert capsys.readouterr().err == "mmfn: error: interrupted\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at alloc_cpu.cpp]\nDefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("CUDA out of memory."),
        RuntimeError("can't start new thread"),
    ],
    ids=str,
)
def test_limits_of_the_machine_are_one_sentence(
    error: Exception,
    make_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(train_command, "prepare", fail)
    assert cli.main(["train", str(make_config())]) == 2
    assert re.fullmatch(r"mmfn: error: the machine is at its limit \(.+\); use .+\n", capsys.readouterr().err)
    with pytest.raises(type(error)):
        cli.main(["train", str(make_config()), "--debug"])


@pytest.mark.parametrize("command", ["replay RUN --step 1", "replay OTHER --step 1 --against RUN", "report OTHER RUN"])
def test_a_file_of_a_run_that_cannot_be_read_is_one_sentence(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever argument has named the run."""
    words = [str(tmp_path / word.lower()) if word.isupper() else word for word in command.split()]

    def fail(*args: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "run" / "metrics.jsonl"))

    name = words[0]
    module = import_module(f"mmfn.train.commands.{name}")
    monkeypatch.setattr(module, {"replay": "replay", "report": "read_log"}[name], fail)
    assert cli.main(words) == 2
    assert re.fullmatch(r"mmfn: error: .*Permission denied: '.*metrics.jsonl'\n", capsys.readouterr().err)


def test_other_errors_of_the_program_keep_their_traceback(
    make_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(train_command, "prepare", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["train", str(make_config())])


BUGS = {
    "zip": lambda: dict(zip([1, 2], [1], strict=True)),
    "unpack": lambda: [a for a, b in [(1, 2, 3)]],
    "int": lambda: int("x"),
    "torch": lambda: torch.zeros(2).view(3),
    "kernel": lambda: portable().rms_norm(torch.zeros(2, 3), torch.zeros(4), 1e-6),
    "file": lambda: Path("no such file of ours").read_text(),
    "connection": lambda: (_ for _ in ()).throw(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")),
}


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("command", ["train", "eval", "generate", "plan"])
def test_a_fault_of_the_program_keeps_its_traceback(
    make_config: Callable[..., Path],
    small_demo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    bug: str,
) -> None:
    """Whatever type its exception has: none of these is a sentence for a user."""
    place = {
        "train": "mmfn.train.commands.train.prepare",
        "eval": "mmfn.train.commands.evaluate.load_model_processor",
        "generate": "mmfn.train.commands.generate.load_model_processor",
        "plan": "mmfn.train.planning.request.find_family",
    }[command]
    monkeypatch.setattr(place, lambda *args, **kwargs: BUGS[bug]())
    arguments = [str(small_demo / "model"), "hello"] if command == "generate" else [str(make_config())]
    with pytest.raises((ValueError, RuntimeError, OSError)) as error:
        cli.main([command, *arguments])
    assert not isinstance(error.value, UserError)
    assert capsys.readouterr().err == ""


def test_a_fault_exits_with_1_and_a_mistake_with_2(small_demo: Path) -> None:
    """As the operating system sees it."""
    broken = (
        "import mmfn.train.commands.generate as g\ng.load_model_processor = lambda *a: dict(zip([1], [], strict=True))"
    )
    code = f"{broken}\nfrom mmfn.cli import main\nraise SystemExit(main(['generate', 'x', 'hello']))"
    done = call("-c", code)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert done.stderr.endswith("ValueError: zip() argument 2 is shorter than argument 1\n")
    done = call("-m", "mmfn", "generate", "nowhere", "hello")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("mmfn: error: model.path 'nowhere' is no folder")


@pytest.mark.parametrize(
    "key", ["model.path", "data.train", "output.path", "config", "an image", "a checkpoint's file", "elsewhere"]
)
def test_errors_of_files_that_are_named_are_one_sentence(
    make_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    key: str,
) -> None:
    """Others are files of the program's own."""
    config = make_config()
    values = yaml.safe_load(config.read_text())
    paths = {
        "config": config,
        "model.path": values["model"]["path"],
        "data.train": values["data"]["train"],
        "output.path": tmp_path / "run" / "checkpoint" / "model.safetensors",
        "an image": Path(values["data"]["train"]).parent / "images" / "1.png",
        "a checkpoint's file": Path(values["model"]["path"]) / "model.safetensors",
        "elsewhere": ROOT / "mmfn" / "train" / "report" / "report.html.jinja",
    }

    def fail(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(paths[key]))

    monkeypatch.setattr(train_command, "prepare", fail)
    if key == "elsewhere":
        with pytest.raises(PermissionError):
            cli.main(["train", str(config)])
        return
    assert cli.main(["train", str(config)]) == 2
    assert capsys.readouterr().err == f"mmfn: error: [Errno 13] Permission denied: '{paths[key]}'\n"


def test_warnings_about_images_are_not_shown(
    make_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warn(*args: Any, **kwargs: Any) -> None:
        warnings.warn_explicit("Corrupt EXIF data", UserWarning, "TiffImagePlugin.py", 1, module="PIL.TiffImagePlugin")
        raise UserError("stop here")

    monkeypatch.setattr(train_command, "prepare", warn)
    assert cli.main(["train", str(make_config())]) == 2
    assert capsys.readouterr().err == "mmfn: error: stop here\n"


def test_debug_keeps_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read config"):
        cli.main(["train", str(tmp_path / "none.yaml"), "--debug"])


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "the following arguments are required: COMMAND; see mmfn --help"),
        (["fit"], "invalid choice: 'fit'"),
        (["train"], "the following arguments are required: CONFIG"),
        (["train", "a.yaml", "--fast"], "unrecognized arguments: --fast"),
        (["train", "a.yaml", "--print-config", "a=b", "--fast"], "unrecognized arguments: a=b --fast"),
        (["generate", "c", "p", "--dtype", "float32", "q"], "unrecognized arguments: q"),
        (["generate", "c", "p", "--max-new-tokens", "many"], "invalid int value: 'many'"),
    ],
)
def test_wrong_arguments_are_one_sentence(args: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(args) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("mmfn: error: ")
    assert captured.err.count("\n") == 1
    assert expected in captured.err


def test_the_tables_of_the_command_line_are_those_of_ops() -> None:
    assert tuple(TABLES) == arguments.KERNELS


@pytest.mark.parametrize("command", [[], ["train"], ["eval"], ["generate"], ["data"], ["data", "convert"]])
def test_help_needs_no_torch(command: list[str]) -> None:
    code = (
        f"import sys\nfrom mmfn import cli\ntry: cli.main({[*command, '--help']!r})\n"
        "except SystemExit as stop: assert stop.code == 0\nassert 'torch' not in sys.modules"
    )
    done = call("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: mmfn")


def test_loading_a_command_leaves_the_collector_of_cycles_as_it_was() -> None:
    code = (
        "import gc; from mmfn import cli; cli._load('plan'); print(gc.isenabled(), gc.get_freeze_count() > 100_000); "
        "gc.disable(); cli._load('generate'); print(gc.isenabled())"
    )
    assert call("-c", code).stdout.split() == ["True", "True", "False"]
