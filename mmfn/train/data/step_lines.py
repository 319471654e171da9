"""Files of one JSON object a line, each with the "step" it is of, by step: what grows while a run goes on.

A place in them is found by bisection, so of a run of a million steps only the lines that are asked for are read. A last
line that a kill has cut short is of a step that is taken again.
"""

import bisect
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


def read_lines(path: Path, behind: int = 0, until: int = sys.maxsize) -> Iterator[dict[str, Any]]:
    """The objects of the steps behind `behind` up to `until`, one by one; none where there is no file."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(_end_of(file, behind))
        for line in file:
            try:
                found = json.loads(line)
            except ValueError:
                return
            if found["step"] > until:
                return
            yield found


def cut_lines(path: Path, num_steps: int) -> None:
    """Remove the lines of steps behind the first `num_steps`, in one go."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        end = _end_of(file, num_steps)
        file.seek(max(0, end - 1))
        has_end = end == 0 or file.read(1) == b"\n"
    if has_end and end == path.stat().st_size:
        return
    scratch = path.with_name(f".{path.name}.cut")
    shutil.copyfile(path, scratch)
    with open(scratch, "r+b") as file:
        file.truncate(end)
        file.seek(end)
        file.write(b"" if has_end else b"\n")
        file.flush()
        os.fsync(file.fileno())  # or a loss of power behind the rename leaves an empty file
    os.replace(scratch, path)


def _end_of(file: BinaryIO, num_steps: int) -> int:
    """Where the lines of the first steps end, in bytes."""

    def step_from(place: int) -> int:
        _seek_line(file, place)
        return _step_of(file.readline())

    size = file.seek(0, os.SEEK_END)
    return _seek_line(file, bisect.bisect_right(range(size), num_steps, key=step_from))


def _seek_line(file: BinaryIO, place: int) -> int:
    """Go to the first line that begins at a place or behind it; where that is."""
    file.seek(max(0, place - 1))
    if place:
        file.readline()
    return file.tell()


def _step_of(line: bytes) -> int:
    """The step of a line; one behind all others where it holds no object."""
    try:
        step: int = json.loads(line)["step"]
    except ValueError:
        return sys.maxsize
    return step
