"""Files that commands write where they are told to: their own are written again, and no other is ever replaced."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmfn import cli
from tests.train.rank_cases import MakeConfig

Command = Callable[[str], list[str]]
TRAIN = ["data.check=first", "checkpoint.every=1", "train.steps=2", "data.batch_samples=2"]


@pytest.fixture
def commands(make_config: MakeConfig, small_demo: Path, full_demo: Path, tmp_path: Path) -> dict[str, Command]:
    """Each command that writes a file, by its option: the arguments that make it write to a path."""
    config, run = str(make_config()), tmp_path / "run"
    plan = ["plan", config, "--device", "cpu"]
    model, data, root = str(small_demo / "model"), str(small_demo / "train.json"), f"data.root={full_demo}"
    given = [
        root,
        "--world",
        "1",
        "--device",
        "cpu",
        "--jobs",
        "1",
        "--rows",
        "50",
        "data.tower_buckets={vision: [64]}",
    ]
    trained = ["model.init=load", f"model.path={run / 'checkpoint'}", "data.max_samples=4", "eval.max_new_tokens=2"]
    return {
        "report --out": lambda out: ["report", str(run), "--out", out],
        "replay --json": lambda out: ["replay", str(run), "--step", "2", "--json", out],
        "plan --json": lambda out: [*plan, "--json", out],
        "plan --html": lambda out: [*plan, "--html", out],
        "eval --out": lambda out: ["eval", config, *trained, "--out", out],
        "data check --html": lambda out: [
            "data",
            "check",
            data,
            "--model",
            model,
            root,
            "--samples",
            "1",
            "--html",
            out,
        ],
        "config schema --out": lambda out: ["config", "schema", "--out", out],
        "suggest --out": lambda out: ["suggest", model, data, *given, "data.token_buckets=[128]", "--out", out],
    }


def test_no_command_replaces_what_it_did_not_write(
    commands: dict[str, Command], make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A slip of the path would destroy data, logs or weights: the second call of each finds the first one's file."""
    assert cli.main(["train", str(make_config()), *TRAIN, "eval.max_new_tokens=2"]) == 0
    written = {name: tmp_path / f"{i}.json" for i, name in enumerate(commands)}
    for name, out in written.items():
        for _ in range(2):
            assert cli.main(commands[name](str(out))) == 0, (name, capsys.readouterr().err)
    victims = [tmp_path / "run" / name for name in ("metrics.jsonl", "config.yaml", "report.html")]
    victims += [*(tmp_path / "run" / "checkpoint").glob("*.safetensors"), *(tmp_path / "run" / "state").glob("*/m*")]
    assert len(victims) >= 5
    capsys.readouterr()
    for name, command in commands.items():
        others = [out for other, out in written.items() if other != name]
        for victim in (*victims, *others):
            before = victim.read_bytes()
            assert cli.main(command(str(victim))) == 2, (name, victim)
            sentence = f"{name.split()[-1]} {str(victim)!r} is there and was not written by this command"
            assert capsys.readouterr().err == f"mmfn: error: {sentence}; choose another file\n"
            assert victim.read_bytes() == before


@pytest.mark.parametrize("name", ["eval.json", "report.html", "checkpoint"])
def test_a_folder_is_no_run_for_the_names_in_it(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """What is named as a file of a run is the user's where there is no run."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / name).write_text("mine")
    config = str(make_config({"data.eval": None}))
    for overwrite in ("true", "false"):
        arguments = ["train", config, *TRAIN, f"output.path={folder}", f"output.overwrite={overwrite}"]
        assert cli.main(arguments) == 2
        said = capsys.readouterr().err
        assert "which no run wrote" in said if overwrite == "true" else "is not empty" in said
        assert (os.listdir(folder), (folder / name).read_text()) == ([name], "mine")


def test_a_reader_that_leaves_ends_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    """`mmfn check | head -1` and `mmfn train | head -1`: the work is done to its end, without a traceback."""
    config, package = str(make_config({"data.eval": None})), [sys.executable, "-m", "mmfn"]
    for command in (["check", config, *TRAIN], ["train", config, *TRAIN, "train.log_every=1"]):
        with subprocess.Popen(
            [*package, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.readline()
            process.stdout.close()
            assert process.stderr.read() == ""
            assert process.wait() == 0
    assert (tmp_path / "run" / "report.html").exists()
