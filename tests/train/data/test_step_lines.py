"""Files of a line for each step: found by bisection is what is found by reading all of it."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmfn.train.data import step_lines
from mmfn.train.data.step_lines import cut_lines, read_lines

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def made(*steps: int, end: str = "") -> Path:
        """Lines of very different lengths."""
        lines = [
            json.dumps({"step": step, "text": "x" * random.Random(i).choice([0, 9, 5000])})
            for i, step in enumerate(steps)
        ]
        path = tmp_path / "lines.jsonl"
        path.write_text("".join(f"{line}\n" for line in lines) + end)
        return path

    return made


CASES: dict[str, tuple[tuple[int, ...], str]] = {
    "none": ((), ""),
    "one": ((1,), ""),
    "each": (tuple(range(1, 30)), ""),
    "cut short": (tuple(range(1, 30)), '{"step": 30, "te'),
    "only half of one": ((), '{"st'),
    "several of a step": ((1, 1, 1, 2, 5, 5, 5, 9, 9), ""),
    "behind another run": (tuple(range(21, 40)), ""),
    "without an end": ((1, 2, 3), '{"step": 4}'),
}


@pytest.mark.parametrize("case", CASES)
def test_lines_of_steps(write: Write, case: str) -> None:
    steps, end = CASES[case]
    every = [*steps, 4] if case == "without an end" else list(steps)
    for behind in range(42):
        path = write(*steps, end=end)
        assert [found["step"] for found in read_lines(path, behind)] == [s for s in every if s > behind]
        assert [found["step"] for found in read_lines(path, behind, behind + 3)] == [
            s for s in every if behind < s <= behind + 3
        ]
        whole = path.read_text().splitlines()
        cut_lines(path, behind)
        kept = [line for line, step in zip(whole, every, strict=False) if step <= behind]
        assert path.read_text() == "".join(f"{line}\n" for line in kept)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_no_file_has_no_lines(tmp_path: Path) -> None:
    assert list(read_lines(tmp_path / "none")) == []
    cut_lines(tmp_path / "none", 3)
    assert list(tmp_path.iterdir()) == []


DAMAGED = ("\0" * 40, "", '{"step": 9, "te', "7", "[]", "null", '{"place": 3}', '{"step": "9"}', "\udcff\udcfe")


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("at", [0, 7, 28, 29])
def test_a_damaged_line_takes_no_others_along(write: Write, damage: str, at: int) -> None:
    """What a disk or an editor did to one line: those of the steps before and behind it stay."""
    for behind in (0, 1, 6, 7, 8, 15, 28, 29, 30):
        path = write(*range(1, 30))
        lines = path.read_bytes().splitlines(keepends=True)
        lines.insert(at, damage.encode(errors="surrogateescape") + b"\r\n")
        path.write_bytes(b"".join(lines))
        assert [found["step"] for found in read_lines(path, behind)] == list(range(behind + 1, 30))
        cut_lines(path, behind)
        assert [found["step"] for found in read_lines(path)] == list(range(1, min(behind, 29) + 1))
        num = min(behind, 29)
        assert path.read_bytes() == b"".join(lines[: num + (at < num)])


def test_what_stays_is_not_written_again(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its size: a log of a million steps is some hundred MB, and the cut is durable."""
    path, durable, fsync = write(*range(1, 2001), end='{"step": 2001, "te'), list[tuple[int, int]](), os.fsync

    def noted(number: int) -> None:
        fsync(number)
        durable.append((os.fstat(number).st_ino, os.fstat(number).st_size))

    monkeypatch.setattr(os, "fsync", noted)
    before = path.stat().st_ino
    cut_lines(path, 1990)
    assert durable == [(before, path.stat().st_size)]
    assert [found["step"] for found in read_lines(path, 1988)] == [1989, 1990]
    changed = path.stat().st_mtime_ns
    cut_lines(path, 1990)
    assert path.stat().st_mtime_ns == changed


def test_few_lines_are_read_of_many(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read, loads = write(*range(1, 5001)), [], json.loads

    def counted(text: Any) -> Any:
        read.append(text)
        return loads(text)

    monkeypatch.setattr(step_lines.json, "loads", counted)
    assert [found["step"] for found in read_lines(path, 2500, 2502)] == [2501, 2502]
    cut_lines(path, 4000)
    assert len(read) < 80
    assert sum(1 for _ in read_lines(path)) == 4000
