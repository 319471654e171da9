"""Parquet files: rows of a table, read a row group at a time."""

import hashlib
import importlib
import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from mmfn.errors import UserError
from mmfn.train.data.sources.cells import plain, stored_bytes
from mmfn.train.data.sources.pieces import Stamp, check_stamp, reopen

GROUPS, GROUPS_BYTES = 4, 2**28  # row groups that a thread holds, and their bytes unless it is one
MAX_GROUP_BYTES = 2**30
_TAIL = 8  # the length of the footer and PAR1


class ParquetSource:
    """The rows of one file or of several, one after the other. Only the footers are read before a row is asked for."""

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        """Raises ValueError naming the file that is no parquet, or whose columns differ from the first one's."""
        self.path, self._files = path, tuple(files)
        self._parquet = import_parquet()
        self._local = threading.local()
        self._groups: list[tuple[int, int]] = []  # (file, group in it)
        self._stamps: list[Stamp] = []
        sizes, digest, columns = [], hashlib.sha256(), None
        for number, file in enumerate(files):
            try:
                with open(file, "rb") as opened:
                    self._stamps.append(Stamp.of(opened.fileno()))
                    footer = _footer(opened)
                    metadata = self._parquet.read_metadata(opened)
            except Exception as error:  # pyarrow has errors of its own for each kind of broken file
                raise UserError(f"dataset {str(file)!r} cannot be read as parquet ({error}); replace it") from error
            names = metadata.schema.to_arrow_schema().names
            if columns is not None and names != columns:
                raise UserError(
                    f"dataset {str(file)!r} has columns {names} but {str(files[0])!r} {columns}; open them apart"
                )
            columns = names
            digest.update(footer)
            for group in range(metadata.num_row_groups):
                facts = metadata.row_group(group)
                if facts.total_byte_size > MAX_GROUP_BYTES:
                    raise UserError(
                        f"dataset {str(file)!r} has a row group of {facts.total_byte_size} bytes but at most "
                        f"{MAX_GROUP_BYTES} are held in memory; write it with smaller ones (row_group_size=100)"
                    )
                self._groups.append((number, group))
                sizes.append(facts.num_rows)
        self._ends = list(accumulate(sizes))
        self.fingerprint = digest.hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return reopen, (ParquetSource, (self.path, self._files), self.fingerprint)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def entry(self, index: int) -> Any:
        """Raises ValueError for a row group that cannot be read, and for values that JSON does not know."""
        return plain(self._row(index))

    def place(self, index: int) -> str:
        """Rows are counted from 0 in each file."""
        group = self._group(index)
        file = self._groups[group][0]
        first = bisect_left(self._groups, (file, 0))
        return f"{str(self._files[file])!r}, row {index - (self._ends[first - 1] if first else 0)}"

    def medium(self, index: int, name: str) -> bytes | None:
        """The bytes of a cell `{"bytes", "path"}` with that path, or of a binary column with that name."""
        return stored_bytes(self._row(index), name)

    def _row(self, index: int) -> dict[str, Any]:
        cells: dict[str, Any]
        held, cells = getattr(self._local, "row", (-1, {}))
        if held == index:
            return cells
        group = self._group(index)
        row = index - (self._ends[group - 1] if group else 0)
        table = self._table(group)
        try:
            cells = table.slice(row, 1).to_pylist(maps_as_pydicts="strict")[0]
        except Exception as error:  # text that is not UTF-8, keys of a map that stand twice
            raise UserError(f"the row cannot be read ({error}); write it anew") from error
        self._local.row = index, cells  # what asks for its media next
        return cells

    def _group(self, index: int) -> int:
        return bisect_right(self._ends, index)

    def _table(self, group: int) -> Any:
        """A row group, of which each thread holds the last few."""
        tables: OrderedDict[int, Any] = self._local.__dict__.setdefault("tables", OrderedDict())
        if group not in tables:
            file, number = self._groups[group]
            with open(self._files[file], "rb") as opened:
                check_stamp(self._files[file], opened.fileno(), self._stamps[file])
                try:
                    table = self._parquet.ParquetFile(opened).read_row_group(number, use_threads=False)
                except Exception as error:
                    raise UserError(f"row group {number} cannot be read ({error}); replace the file") from error
            tables[group] = table
            while len(tables) > 1 and (len(tables) > GROUPS or sum(t.nbytes for t in tables.values()) > GROUPS_BYTES):
                tables.popitem(last=False)
        tables.move_to_end(group)
        return tables[group]


def import_parquet() -> ModuleType:
    """pyarrow, an optional dependency. Raises ValueError saying how to install it."""
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UserError("parquet files need pyarrow; install it with pip install mmfn[parquet]") from error


def _footer(file: IO[bytes]) -> bytes:
    """Sizes, places and statistics of all columns: what changes when a file does."""
    size = file.seek(0, 2)
    file.seek(max(0, size - _TAIL))
    length = int.from_bytes(file.read(4), "little")
    file.seek(max(0, size - _TAIL - length))
    return file.read() + size.to_bytes(8, "little")
