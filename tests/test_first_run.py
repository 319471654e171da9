"""The commands of docs/first-run.md, in order, at a reduced size; what the page shows is what they print."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmfn import cli
from mmfn.train.evidence.bench import num_steps
from mmfn.train.evidence.files import newest
from mmfn.train.evidence.processes import start

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "first-run.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```bash\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
INSTALL = 1  # the first block is not run
NUM_TRAIN, NUM_HELD_OUT = 96, 24
SMALL = {  # changes of the page's numbers
    "checkpoint.every=50": "checkpoint.every=4 train.steps=24 schedule.warmup_steps=2 train.log_every=4",
    "--step 380": "--step 22",
    "iter_0000350": "iter_0000020",
    "train.steps=100": "train.steps=3 schedule.warmup_steps=1",
    "configs/demo.yaml": "configs/demo.yaml train.allocator=default",  # the other is for the whole process
}
PROGRAMS = {
    "python": [sys.executable],
    "rm": ["rm"],
    "mmfn": [sys.executable, "-m", "mmfn"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"],
}
KILL = "timeout -s KILL 30 "


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what a clone has of the examples."""
    for name in ("examples", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.mark.dist
def test_the_commands_do_what_the_page_says(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = BLOCK.findall(PAGE)
    assert len(blocks) > 6
    for commands, shown in blocks[INSTALL:]:
        printed = ""
        for command in commands.strip().splitlines():
            for wide, narrow in SMALL.items():
                command = command.replace(wide, narrow)
            if command.startswith(KILL):
                printed += kill(command.removeprefix(KILL), clone / "build" / "demo" / "run")
            else:
                printed += run(command, capsys)
            if "digits.py" in command:
                shrink(clone / "build" / "demo")
        if shown:
            check_shown(shown, printed)
    records = (clone / "build" / "demo" / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in records] == list(range(1, 25))


def run(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints; it must end well. Those of mmfn run in this process."""
    program, *rest = shlex.split(command)
    if program == "mmfn":
        assert cli.main(rest) == 0, f"{command}: {capsys.readouterr().err}"
        return capsys.readouterr().out
    done = subprocess.run([*PROGRAMS[program], *rest], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def kill(command: str, folder: Path) -> str:
    """What a training has printed when it is killed behind some steps."""
    program, *rest = shlex.split(command)
    with start([*PROGRAMS[program], *rest], command) as process:
        while process.is_running() and (num_steps(folder) < 6 or not newest(folder)):
            time.sleep(0.02)
        process.kill()
        output = process.outputs[0]
        output.seek(0)
        printed = output.read().decode()
    assert 6 <= num_steps(folder) < 24, printed
    return printed


def shrink(folder: Path) -> None:
    """Leave a part of the demo's data."""
    for name, count in (("train.json", NUM_TRAIN), ("eval.json", NUM_HELD_OUT)):
        entries = json.loads((folder / name).read_text(encoding="utf-8"))[:count]
        (folder / name).write_text(json.dumps(entries), encoding="utf-8")


def check_shown(shown: str, printed: str) -> None:
    """What the page shows was printed, in that order, but for what numbers there are; "..." is anything."""
    pattern = ".*".join(re.escape(shape(part)) for part in shown.strip().split("..."))
    assert re.search(pattern, shape(printed), re.DOTALL), f"shown:\n{shown}\nprinted:\n{printed}"


def shape(text: str) -> str:
    """The text with every number the same, and spaces one."""
    return re.sub(r"[ ]+", " ", re.sub(r"\d[\d.,:]*", "#", text))


def test_what_is_shown_is_told_from_what_is_not() -> None:
    check_shown("a 1.5 b\n...\nd 2,000", "x\na 7 b\nc\nd 3\n")
    for printed in ("a 7 c\nd 3", "d 3\na 7 b\n", "a 7 b\nd x"):
        with pytest.raises(AssertionError):
            check_shown("a 1.5 b\n...\nd 2", printed)


def test_timeout_is_the_command_of_every_linux() -> None:
    assert KILL in PAGE
    assert shutil.which("timeout") is None or subprocess.run(["timeout", "-s", "KILL", "9", "true"], check=True)
