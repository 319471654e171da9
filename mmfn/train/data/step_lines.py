"""Files of one JSON object a line, each with the "step" it is of, by step: what grows while a run goes on.

A place in them is found by bisection, so of a run of a million steps only the lines that are asked for are read. A last
line that a kill has cut short is of a step that is taken again; one that is damaged further ahead is passed over.
"""

import bisect
import json
import os
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
            found = parse_line(line)
            if found is None:
                continue
            if found["step"] > until:
                return
            yield found


def cut_lines(path: Path, num_steps: int) -> None:
    """Remove the lines of steps behind the first `num_steps`, in one go; what stays is not written again."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        end = _end_of(file, num_steps)
        file.seek(max(0, end - 1))
        has_end = end == 0 or file.read(1) == b"\n"
        if has_end and end == path.stat().st_size:
            return
        file.truncate(end)
        file.seek(end)
        file.write(b"" if has_end else b"\n")
        file.flush()
        os.fsync(file.fileno())


def _end_of(file: BinaryIO, num_steps: int) -> int:
    """Where the lines of the first steps end, in bytes."""

    def step_from(place: int) -> int:
        _seek_line(file, place)
        return next((found["step"] for found in map(parse_line, file) if found is not None), sys.maxsize)

    size = file.seek(0, os.SEEK_END)
    return _seek_line(file, bisect.bisect_right(range(size), num_steps, key=step_from))


def _seek_line(file: BinaryIO, place: int) -> int:
    """Go to the first line that begins at a place or behind it; where that is."""
    file.seek(max(0, place - 1))
    if place:
        file.readline()
    return file.tell()


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object of a line, None where it holds none of a step."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None
