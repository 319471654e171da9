"""Files and folders that are there for good once a call returns, and the hidden folder of a save."""

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mmfn.interop.weight_files import sync
from mmfn.train.checkpoint.format import LATEST

_LEFTOVER = re.compile(r"\.iter_\d{7,}\.(writing-[0-9a-f]{32}|deleting)")


@dataclass(frozen=True, kw_only=True)
class Scratch:
    """The hidden folder of a save, and the save's own name."""

    path: Path
    id: str


def scratch_path(root: Path, name: str, save_id: str) -> Path:
    """Where the checkpoint `name` is written before it has that name."""
    return root / f".{name}.writing-{save_id}"


@contextmanager
def scratch_folder(root: Path, name: str) -> Iterator[Scratch]:
    """A new hidden folder, removed at the end unless it was renamed.

    It is locked for the time of the block: no other save that lives is mistaken for one that was killed.
    """
    save_id = secrets.token_hex(16)
    path = scratch_path(root, name, save_id)
    os.mkdir(path)
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks: what a killed save leaves there stays
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        sync(root)
        yield Scratch(path=path, id=save_id)
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def remove_leftovers(root: Path) -> None:
    """Delete what killed saves and deletions have left: hidden folders that no living process has locked."""
    for name in os.listdir(root):
        if not _LEFTOVER.fullmatch(name) or (root / name).is_symlink():
            continue
        with suppress(OSError):
            lock = os.open(root / name, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(root / name)
            finally:
                os.close(lock)


def delete(root: Path, name: str) -> None:
    """Delete a checkpoint: hidden by a rename first, so that a kill leaves none in part."""
    hidden = root / f".{name}.deleting"
    os.rename(root / name, hidden)
    sync(root)
    shutil.rmtree(hidden)


def write_latest(root: Path, step: int) -> None:
    """Replace the tracker as a whole."""
    scratch = root / f".{LATEST}.writing"
    with suppress(FileNotFoundError):
        os.unlink(scratch)
    write_file(scratch, [(0, f"{step}\n".encode())])
    os.replace(scratch, root / LATEST)
    sync(root)


def write_file(path: Path, content: Iterable[tuple[int, bytes | memoryview]], size: int = 0) -> None:
    """Write a new file and wait until it is durable. `content`: (from which byte on, bytes).

    `size`: room that is taken first, so that a full disk shows.
    """
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        if size:
            os.posix_fallocate(file, 0, size)
        for begin, data in content:
            view, done = memoryview(data), 0
            while done < len(view):
                done += os.pwrite(file, view[done:], begin + done)
        os.fsync(file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(file)


def drop_cache(path: Path) -> None:
    """Let the next reader of a durable file have it from the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)
