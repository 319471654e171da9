"""JSON and JSONL files: rows are byte ranges of an index, read and decoded when they are asked for."""

from pathlib import Path
from typing import Any

from mmfn.train.data.sources.index import Home
from mmfn.train.data.sources.offsets import open_offsets
from mmfn.train.data.sources.pieces import check_row_bytes, decode_row, read_piece, reopen
from mmfn.train.data.sources.scan import BOM

_WHITE = b" \t\r\n"


class TextSource:
    """The elements of one JSON list, or the lines of a JSONL file. A file whose first character is [ is a list."""

    def __init__(self, path: Path, home: Home) -> None:
        """Raises ValueError for a list that does not end, and for an index that cannot be written."""
        with open(path, "rb") as file:
            head = file.read(2**16).removeprefix(BOM).lstrip(_WHITE)
        self.path, self._home = path, home
        self._is_list = head[:1] == b"["
        self._offsets = open_offsets(path, home, is_list=self._is_list)
        self.fingerprint = self._offsets.digest
        is_bare = self._is_list and len(self._offsets) == 1 and self._read(0) == b""  # [ ]
        self._num = 0 if is_bare else len(self._offsets)

    def __reduce__(self) -> tuple[Any, ...]:
        return reopen, (TextSource, (self.path, self._home), self.fingerprint)

    def __len__(self) -> int:
        return self._num

    def entry(self, index: int) -> Any:
        """Raises ValueError for a row that is no JSON, too long, not UTF-8 or has a key twice in one object."""
        start, end = self._offsets.span(index)
        check_row_bytes(end - start)
        return decode_row(self._read(index))

    def place(self, index: int) -> str:
        """Lines are counted from 1 as editors do, the elements of a list from 0."""
        where = f"entry {index}" if self._is_list else f"line {self._offsets.line(index)}"
        return f"{str(self.path)!r}, {where}"

    def medium(self, index: int, name: str) -> bytes | None:
        """Media of text files are files."""
        return None

    def _read(self, index: int) -> bytes:
        row = read_piece(self.path, *self._offsets.span(index), self._offsets.stamp).strip(_WHITE)
        return row.removesuffix(b",") if self._is_list else row
