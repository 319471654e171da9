"""Bytes of files at places that were found before: a file that has changed since then is noticed."""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfn.errors import UserError
from mmfn.train.data.entries import decode

MAX_ROW_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """Size and time of a file."""

    size: int
    mtime_ns: int

    @staticmethod
    def of(descriptor: int) -> "Stamp":
        """That of an open file."""
        stat = os.fstat(descriptor)
        return Stamp(size=stat.st_size, mtime_ns=stat.st_mtime_ns)


def read_piece(path: Path, start: int, end: int, stamp: Stamp) -> bytes:
    """Bytes [start, end) of a file; from any thread or process. Raises OSError for a file that has changed."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        piece = b""
        while more := os.pread(file, end - start - len(piece), start + len(piece)):  # at most 2 GiB at once
            piece += more
        check_stamp(path, file, stamp)
        return piece
    finally:
        os.close(file)


def check_stamp(path: Path, descriptor: int, stamp: Stamp) -> None:
    """Raise OSError for an open file that is not as it was."""
    if Stamp.of(descriptor) != stamp:
        raise changed_file(path)


def changed_file(path: Path) -> OSError:
    """The error of a file that is not the one that was opened: none of its samples can be trusted, so none is bad."""
    return OSError(errno.ESTALE, "the file has changed since it was opened; start again", str(path))


def reopen(kind: Callable[..., Any], arguments: tuple[Any, ...], fingerprint: str) -> Any:
    """A source in a process that it is sent to: nothing of it is sent but what it was opened with.

    Raises OSError for a file that has changed.
    """
    source = kind(*arguments)
    if source.fingerprint != fingerprint:
        raise changed_file(arguments[0])
    return source


def check_row_bytes(size: int) -> None:
    """Raise ValueError for a row that is too long to be text."""
    if size > MAX_ROW_BYTES:
        raise UserError(f"it takes {size} bytes but at most {MAX_ROW_BYTES} are read; keep media in files of their own")


def decode_row(row: bytes) -> object:
    """JSON in UTF-8 -> its value. Raises ValueError with one sentence."""
    try:
        return decode(row.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 ({error.reason} at byte {error.start}); write it in this encoding") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON ({error}); repair it") from None
