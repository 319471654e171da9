"""Indexes of text files: offsets of all rows and of the file's end (int64), and pairs (row, blank lines before it)
wherever their number changes."""

import hashlib
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from mmfn.errors import UserError
from mmfn.train.data.sources.index import Home, open_index
from mmfn.train.data.sources.pieces import Stamp
from mmfn.train.data.sources.scan import scan_lines, scan_list

Array = npt.NDArray[np.int64]
_COPY_BYTES = 2**20


class Offsets:
    """Byte ranges of the rows of a file. `digest`: of the whole file."""

    def __init__(self, digest: str, stamp: Stamp, starts_N: Array, gaps_G2: Array) -> None:
        self.digest, self.stamp = digest, stamp
        self._starts_N, self._gaps_G2 = starts_N, gaps_G2

    def __len__(self) -> int:
        return len(self._starts_N) - 1

    def span(self, row: int) -> tuple[int, int]:
        """Where a row begins and where the next one does; between them there may be white space."""
        return int(self._starts_N[row]), int(self._starts_N[row + 1])

    def line(self, row: int) -> int:
        """The number of a row's line, from 1."""
        place = int(np.searchsorted(self._gaps_G2[:, 0], row, side="right"))
        return row + 1 + (int(self._gaps_G2[place - 1, 1]) if place else 0)


def open_offsets(path: Path, home: Home, *, is_list: bool) -> Offsets:
    """The offsets of the elements of a JSON list, or of the lines of a file that are not blank.

    Raises ValueError for a list that does not end, and where the index cannot be written.
    """

    def write(file: IO[bytes], out: IO[bytes]) -> dict[str, Any]:
        try:
            return _write(file, out, is_list=is_list)
        except UserError as error:
            raise UserError(f"dataset {str(path)!r} is not valid JSON ({error}); repair the file") from None

    index = open_index(path, "list" if is_list else "lines", write, home)
    values_V = index.body_B.view("<i8")
    num = index.facts["rows"] + 1
    return Offsets(index.facts["digest"], index.stamp, values_V[:num], values_V[num:].reshape(-1, 2))


def _write(file: IO[bytes], out: IO[bytes], *, is_list: bool) -> dict[str, Any]:
    """Nothing that grows with the file is in memory."""
    num, digest = 0, hashlib.sha256()
    with TemporaryFile() as rest:
        for starts_N, gaps_G2 in (scan_list if is_list else scan_lines)(file, digest.update):
            out.write(starts_N.astype("<i8").tobytes())
            rest.write(gaps_G2.astype("<i8").tobytes())
            num += len(starts_N)
        rest.seek(0)
        while part := rest.read(_COPY_BYTES):
            out.write(part)
    return {"rows": num - 1, "digest": digest.hexdigest()}
