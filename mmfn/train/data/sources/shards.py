"""Several files of one kind that are one data set, and the files that a path means."""

import hashlib
import re
from bisect import bisect_right
from collections.abc import Sequence
from glob import glob, has_magic
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfn.errors import UserError
from mmfn.train.data.sources.index import INDEX_SUFFIX

if TYPE_CHECKING:
    from mmfn.train.data.sources import Source

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
KINDS = {".jsonl": "JSONL", ".json": "JSON", ".parquet": "parquet", ".tar": "tar"}
_MOST_FILES = 100_000


class Shards:
    """The entries of several sources, one after the other."""

    def __init__(self, path: Path, parts: Sequence["Source"]) -> None:
        self.path, self.parts = path, tuple(parts)
        self._ends = list(accumulate(len(part) for part in self.parts))
        self.fingerprint = hashlib.sha256(" ".join(part.fingerprint for part in self.parts).encode()).hexdigest()

    def __len__(self) -> int:
        return self._ends[-1]

    def entry(self, index: int) -> Any:
        """That of its part."""
        part, row = self._locate(index)
        return part.entry(row)

    def place(self, index: int) -> str:
        """That in its part."""
        part, row = self._locate(index)
        return part.place(row)

    def medium(self, index: int, name: str) -> bytes | None:
        """That of its part."""
        part, row = self._locate(index)
        return part.medium(row, name)

    def _locate(self, index: int) -> tuple["Source", int]:
        part = bisect_right(self._ends, index)
        return self.parts[part], index - (self._ends[part - 1] if part else 0)


def find_files(path: Path) -> list[Path]:
    """The files that a path means, sorted: itself, what fits a pattern, or those of one kind in a folder.

    >>> find_files(Path("train-{000..099}.tar"))  # 100 files
    >>> find_files(Path("part-*.jsonl")), find_files(Path("folder"))

    Raises ValueError for a pattern that no file fits, a folder without data files, and one with several kinds.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in KINDS and not file.name.startswith("."))
        kinds = sorted({KINDS[file.suffix] for file in files})
        if len(kinds) != 1:
            fault = f"holds {' and '.join(kinds)} files" if kinds else f"holds no file that ends in {', '.join(KINDS)}"
            raise UserError(f"dataset {str(path)!r} is a folder that {fault}; name the files, as {path}/*.jsonl")
        return files
    if path.exists():
        return [path]
    names = _expand(str(path))
    files = [Path(file) for name in names for file in (_glob(name) if has_magic(name) else [name])]
    if not files:
        raise UserError(f"no file fits dataset {str(path)!r}; correct the pattern")
    return files


def _glob(pattern: str) -> list[str]:
    """What fits a pattern but the indexes of such files."""
    return sorted(name for name in glob(pattern) if not name.endswith(INDEX_SUFFIX))


def _expand(pattern: str) -> list[str]:
    """Braces as in a shell: {00..12} counts with as many digits, {a,b} lists."""
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    first, last, listed = found.groups()
    if listed is not None:
        items = listed.split(",")
    elif int(last) - int(first) < _MOST_FILES:
        items = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    else:
        raise UserError(f"dataset {pattern!r} counts more than {_MOST_FILES} files; correct the braces")
    ends = _expand(pattern[found.end() :])
    return [pattern[: found.start()] + item + end for item in items for end in ends]
