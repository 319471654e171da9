"""docs/running.md says what the program does: exit codes, files to touch, signals, and commands that parse."""

import re
import shlex
from pathlib import Path

from mmfn import errors
from mmfn.train.config.load import known_keys
from mmfn.train.run import stop
from mmfn.train.run.folder import REQUESTS

PAGE = (Path(__file__).parents[2] / "docs" / "running.md").read_text(encoding="utf-8")


def test_every_exit_code_is_there() -> None:
    table = PAGE[PAGE.index("| exit code |") :]
    codes = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE) for code in row.split(",")}
    assert codes == {0, errors.FAULT, errors.USAGE_ERROR, errors.LOST, errors.INTERRUPTED, errors.TERMINATED}


def test_signals_and_files_are_there() -> None:
    assert all(number.name in PAGE for number in stop.SIGNALS)
    assert all(f"`touch RUN/{name}`" in PAGE for name in REQUESTS)
    assert f"{stop.SECOND_S:.0f} seconds later" in PAGE


def test_settings_that_are_named_exist() -> None:
    keys = known_keys()
    sections = {key.partition(".")[0] for key in keys}
    named = {name for name in re.findall(r"`(\w+\.\w+)[=`]", PAGE) if name.partition(".")[0] in sections}
    assert named - {"config.yaml"} <= keys.keys()
    assert len(named) > 8


def test_commands_are_those_there_are() -> None:
    for command in re.findall(r"^(?:torchrun|mmfn) .*$", PAGE, re.MULTILINE):
        words = shlex.split(command, comments=True)
        assert "train" in words or words[1] == "error:"
