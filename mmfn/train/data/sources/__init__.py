"""Sources: files of entries, read one entry at a time in any order. Nothing of them is held in memory."""

from glob import has_magic
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from mmfn.errors import UserError
from mmfn.train.data.entries import show
from mmfn.train.data.sources.arrow import ArrowSource, is_saved
from mmfn.train.data.sources.index import Home
from mmfn.train.data.sources.parquet import ParquetSource
from mmfn.train.data.sources.shards import Shards, find_files
from mmfn.train.data.sources.tar import TarSource
from mmfn.train.data.sources.text import TextSource

_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}


class Source(Protocol):
    """Random access to the entries of a data set as they are stored; from any number of threads and processes.

    `path`: what was opened. `fingerprint`: a digest of what is in it, the same wherever it is copied to.
    """

    @property
    def path(self) -> Path: ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def entry(self, index: int) -> Any:
        """Entry `index`, decoded. Raises ValueError with the reason, without the place, where it cannot be."""

    def place(self, index: int) -> str:
        """Where an entry is stored, for messages: "'train.jsonl', line 17"."""

    def medium(self, index: int, name: str) -> bytes | None:
        """What is stored beside an entry under a name; None: it is a file in the folder of media."""


def open_source(path: str | PathLike[str], cache: str | PathLike[str] | None = None) -> Source:
    """The source of a path, by the kind of what is there: a file, a folder of files, a pattern, or a saved data set.

    `cache`: folder for the indexes of large files; by default they lie beside them. Raises ValueError, naming the path,
    for what is missing, empty or of no known kind.
    """
    path = Path(path)
    try:
        source = ArrowSource(path) if is_saved(path) else _open_files(path, None if cache is None else Path(cache))
    except OSError as error:
        raise UserError(
            f"dataset {str(path)!r} cannot be read ({error}); give a JSON, JSONL, parquet or tar file, or a folder"
        ) from error
    if len(source) == 0:
        raise UserError(f"dataset {str(path)!r} is empty; it must hold at least one conversation")
    return source


def media_folder(path: str | PathLike[str]) -> Path:
    """Where the paths of a data set's media begin: its own folder, or the one of its files."""
    path = Path(path)
    while has_magic(str(path)) or "{" in str(path):
        path = path.parent
    return path if path.is_dir() and not is_saved(path) else path.parent


def _open_files(path: Path, cache: Path | None) -> Source:
    files = find_files(path)
    kinds = [_kind(file) for file in files]
    if other := next((i for i, kind in enumerate(kinds) if kind != kinds[0]), None):
        raise UserError(
            f"dataset {str(path)!r} means files of several kinds, {str(files[0])!r} ({kinds[0]}) and "
            f"{str(files[other])!r} ({kinds[other]}); open them apart"
        )
    if kinds[0] == "parquet":
        return ParquetSource(path, files)
    home = Home.of(files, cache)
    parts = [(TarSource if kinds[0] == "tar" else TextSource)(file, home) for file in files]
    return parts[0] if files == [path] else Shards(path, parts)


def _kind(file: Path) -> str:
    """By what it begins with. Raises ValueError for a packed file, and for a pipe or device, which cannot be sought."""
    if file.exists() and not file.is_file():
        raise UserError(f"dataset {str(file)!r} is no regular file; write what it holds to one")
    with open(file, "rb") as opened:
        head = opened.read(512)
    if packed := next((name for magic, name in _PACKED.items() if head.startswith(magic)), None):
        raise UserError(f"dataset {str(file)!r} is packed with {packed}; unpack it first")
    if head[:4] == b"PAR1" or file.suffix == ".parquet":
        return "parquet"
    if head[257:262] == b"ustar" or file.suffix == ".tar":
        return "tar"
    _check_text(file, head)
    return "text"


def _check_text(file: Path, head: bytes) -> None:
    """Raises ValueError for what is no list or lines of JSON objects as a whole, and not in one row."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start and start[:1] not in b"{[" and b'{"' not in start:
        begins = show(start[:16].decode("utf-8", "replace"))
        raise UserError(
            f"dataset {str(file)!r} holds no JSON, it begins with {begins}; write a JSON object in each line"
        )
    if start.split(b"\n")[0].strip() == b"{":
        raise UserError(
            f"dataset {str(file)!r} is one JSON object of several lines; write a list of entries, or each in one line"
        )
