"""Indexes of large files: made once in one pass, published whole, and mapped into memory ever after.

An index is a header (one line of JSON, padded to `HEADER` bytes) and a body. Small files are indexed anew, in memory,
each time they are opened, unless there are many of them.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from mmfn.errors import UserError
from mmfn.train.data.sources.pieces import Stamp

SMALL_BYTES = 16 * 2**20  # what takes less is indexed in memory
MANY_BYTES = 256 * 2**20  # unless it is one of files that take so much together
INDEX_SUFFIX = ".index"
HEADER = 512
VERSION = 1
_PROBES, _PROBE_BYTES = 64, 4096
# Reads a file from its start and writes the body of its index; returns the size of it and other facts for the header.
Writer = Callable[[IO[bytes], IO[bytes]], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Index:
    """What an index says. `stamp`: of the file it was made of; `body_B`: uint8[B]."""

    stamp: Stamp
    facts: dict[str, Any]
    body_B: npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Home:
    """Where indexes lie: beside their files, or in the folder `cache`. `has_small`: those of small files as well."""

    cache: Path | None = None
    has_small: bool = False

    @staticmethod
    def of(files: Sequence[Path], cache: Path | None) -> "Home":
        """Of the files of a data set."""
        return Home(cache=cache, has_small=sum(file.stat().st_size for file in files) >= MANY_BYTES)

    def names(self, path: Path) -> list[Path]:
        """Where the index of a file may lie; a new one is written to the last."""
        names = [path.with_name(f"{path.name}{INDEX_SUFFIX}")]
        if self.cache is not None:
            digest = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
            names.append(self.cache / f"{path.name}-{digest}{INDEX_SUFFIX}")
        return names


def open_index(path: Path, kind: str, write: Writer, home: Home) -> Index:
    """The index of a file: the one that lies there if it was made of this very file, or else a new one.

    Of several processes the first writes it and the others wait. Raises ValueError where the folder of a large file's
    cannot be written, and what `write` raises.
    """
    with open(path, "rb") as file:
        identity = _identity(file, kind)
        stamp = Stamp.of(file.fileno())
        is_small = identity["size"] < SMALL_BYTES
        if is_small and not home.has_small:
            return _in_memory(file, identity, write, stamp)
        names = home.names(path)
        if (index := _find(names, identity, stamp)) is not None:
            return index
        try:
            names[-1].parent.mkdir(parents=True, exist_ok=True)
            with _lock(names[-1]):
                if (index := _find(names, identity, stamp)) is None:  # no other process has written it meanwhile
                    _publish(file, identity, write, names[-1])
        except OSError as error:
            if is_small:
                return _in_memory(file, identity, write, stamp)
            raise UserError(
                f"the index {str(names[-1])!r} of dataset {str(path)!r} cannot be written ({error.strerror}); set "
                "data.index_folder to a folder with room for it"
            ) from error
    index = index or _find(names, identity, stamp)
    if index is None:
        raise UserError(f"dataset {str(path)!r} changed while it was read; start again when it is complete")
    return index


def _in_memory(file: IO[bytes], identity: dict[str, Any], write: Writer, stamp: Stamp) -> Index:
    file.seek(0)
    memory = io.BytesIO()
    _write(file, identity, write, memory)
    return _parse(np.frombuffer(memory.getvalue(), np.uint8), stamp)


def _identity(file: IO[bytes], kind: str) -> dict[str, Any]:
    """By what a changed file is noticed without reading it: size, time, and a digest of a few of its parts."""
    stat = os.fstat(file.fileno())
    probe = hashlib.sha256()
    for number in range(_PROBES):
        start = max(0, stat.st_size - _PROBE_BYTES) * number // (_PROBES - 1)
        probe.update(os.pread(file.fileno(), _PROBE_BYTES, start))
    return {
        "version": VERSION,
        "kind": kind,
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "probe": probe.hexdigest()[:32],
    }


def _find(names: list[Path], identity: dict[str, Any], stamp: Stamp) -> Index | None:
    """The first whole index of that very file."""
    for name in names:
        with suppress(OSError, ValueError, KeyError, TypeError):
            index = _parse(np.memmap(name, np.uint8, mode="r"), stamp)
            is_its = {key: index.facts.get(key) for key in identity} == identity
            if is_its and index.facts["body_bytes"] == len(index.body_B):
                return index
    return None


def _parse(index_B: npt.NDArray[np.uint8], stamp: Stamp) -> Index:
    facts = json.loads(index_B[:HEADER].tobytes())
    if not isinstance(facts, dict):
        raise ValueError("it is no index")
    return Index(stamp=stamp, facts=facts, body_B=index_B[HEADER:])


def _publish(file: IO[bytes], identity: dict[str, Any], write: Writer, name: Path) -> None:
    part = name.with_name(f".{name.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as out:
            _write(file, identity, write, out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, name)
    finally:
        part.unlink(missing_ok=True)


def _write(file: IO[bytes], identity: dict[str, Any], write: Writer, out: IO[bytes]) -> None:
    out.write(bytes(HEADER))
    facts = write(file, out)
    facts["body_bytes"] = out.seek(0, os.SEEK_END) - HEADER
    out.seek(0)
    out.write(json.dumps({**identity, **facts}).ljust(HEADER).encode())


@contextmanager
def _lock(name: Path) -> Iterator[None]:
    """One process at a time, by the system's own locks, which end with their process.

    Where the file system has none, each writes its own index, and the last renamed, equal to the others, stays.
    """
    fcntl: Any = __import__("fcntl")
    lock = name.with_name(f".{name.name}.lock")
    with open(lock, "wb") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
