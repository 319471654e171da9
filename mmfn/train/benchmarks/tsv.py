"""TSV files of questions with images inside, row by row: nothing of them but where rows begin is held in memory.

As VLMEvalKit lays them out: a header, fields that hold tabs or line breaks in quotes, images in base64.
"""

import csv
import hashlib
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from mmfn.errors import UserError

INDEX = "index"  # the column that names rows


class TsvFile:
    """Random access to the rows of a TSV file, each a dict by column; empty fields are left out.

    `fingerprint`: a digest of the whole file.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        """Read the file once. Raises ValueError, naming the line, for one that is no such file."""
        self.path = Path(path)
        self._starts, self._rows = array("q"), dict[str, int]()
        digest = hashlib.sha256()
        try:
            with _no_limit(), open(self.path, "rb") as file:
                lines = _Lines(file, digest)
                records = csv.reader(lines, delimiter="\t", strict=True)
                self.columns = next(records, [])
                self._check_columns()
                while True:
                    start = lines.position
                    record = next(records, None)
                    if record is None:
                        break
                    self._rows.setdefault(self._by_column(record, lines.number)[INDEX], len(self._starts))
                    self._starts.append(start)
        except OSError as error:
            raise UserError(f"cannot read {str(path)!r} ({error.strerror}); give the path of a TSV file") from error
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{str(path)!r} is no TSV file at line {lines.number} ({error}); repair it") from error
        if not self._starts:
            raise UserError(f"{str(path)!r} has no row; give a TSV file of questions")
        self.fingerprint = digest.hexdigest()[:12]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, row: int) -> dict[str, str]:
        with _no_limit(), open(self.path, "rb") as file:
            file.seek(self._starts[row])
            record = next(csv.reader(_Lines(file), delimiter="\t", strict=True))
        return self._by_column(record, row + 2)

    def find(self, index: str) -> int | None:
        """The first row of that index, None where there is none."""
        return self._rows.get(index)

    def _check_columns(self) -> None:
        for needed in (INDEX, "question"):
            if needed not in self.columns:
                raise UserError(f"{str(self.path)!r} has no column {needed!r} but {self.columns[:20]}; name it so")
        if twice := [name for name in self.columns if self.columns.count(name) > 1]:
            raise UserError(f"{str(self.path)!r} has column {twice[0]!r} twice; remove one")

    def _by_column(self, record: list[str], line: int) -> dict[str, str]:
        if len(record) != len(self.columns):
            raise UserError(
                f"{str(self.path)!r}, line {line}, has {len(record)} fields for {len(self.columns)} columns; repair it"
            )
        found = {name: field for name, field in zip(self.columns, record, strict=True) if field != ""}
        if INDEX not in found:
            raise UserError(f"{str(self.path)!r}, line {line}, has no {INDEX}; number its rows")
        return found


class _Lines:
    """The lines of a file as text; `position`: of the byte behind them, `number`: of the last one."""

    def __init__(self, file: BinaryIO, digest: "hashlib._Hash | None" = None) -> None:
        self._file, self._digest = file, digest
        self.position, self.number = file.tell(), 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._file)
        if self._digest is not None:
            self._digest.update(line)
        self.number += 1
        text = line.decode("utf-8-sig" if self.position == 0 else "utf-8")
        self.position += len(line)
        return text


@contextmanager
def _no_limit() -> Iterator[None]:
    """Python's reader refuses fields above a limit that is one of the process; an image may be larger."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
