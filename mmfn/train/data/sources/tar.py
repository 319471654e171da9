"""Tar files as webdataset writes them: neighbours `17.json`, `17.jpg`, `17.wav` are one sample.

Members are byte ranges of an index that is made of the headers alone; nothing is ever extracted. The index of a large
file lies beside it: a header, for each sample its first member (int64), for each member where it and its name lie, and
all names.
"""

import hashlib
import tarfile
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from mmfn.errors import UserError
from mmfn.train.data.sources.index import Home, open_index
from mmfn.train.data.sources.pieces import check_row_bytes, decode_row, read_piece, reopen

_NO_FILE = -1  # the offset of a link or device


class TarSource:
    """The samples of one shard."""

    def __init__(self, path: Path, home: Home) -> None:
        """Raises ValueError for what is no uncompressed tar file, one that is cut off, and one without samples."""
        self.path, self._home = path, home
        index = open_index(path, "tar", partial(_write_index, path), home)
        num, members, body_B = index.facts["rows"], index.facts["members"], index.body_B
        self._stamp = index.stamp
        self.fingerprint: str = index.facts["digest"]
        self._first_N = body_B[: 8 * (num + 1)].view("<i8")
        self._members_M4 = body_B[8 * (num + 1) : 8 * (num + 1) + 32 * members].view("<i8").reshape(members, 4)
        self._names_B = body_B[8 * (num + 1) + 32 * members :]

    def __reduce__(self) -> tuple[Any, ...]:
        return reopen, (TarSource, (self.path, self._home), self.fingerprint)

    def __len__(self) -> int:
        return len(self._first_N) - 1

    def entry(self, index: int) -> Any:
        """What the sample's .json says. Raises ValueError where there is none, or it is no JSON."""
        found = [(start, size) for name, start, size in self._members(index) if _split(name)[1] == "json"]
        if len(found) != 1:
            raise UserError(f"it has {len(found)} members .json but needs one, with its messages; pack it anew")
        start, size = found[0]
        check_row_bytes(size)
        return decode_row(self._read("json", start, size))

    def place(self, index: int) -> str:
        """The key of the sample."""
        name = next(self._members(index))[0]
        return f"{str(self.path)!r}, sample {_split(name)[0]!r}"

    def medium(self, index: int, name: str) -> bytes | None:
        """A member of the sample by its name, with folders or without, or by what follows its first dot ("jpg")."""
        name, members = name.removeprefix("./"), list(self._members(index))
        for spelling in (lambda n: n, lambda n: n.rpartition("/")[2], lambda n: _split(n)[1]):
            for known, start, size in members:
                if spelling(known) == name:
                    return self._read(name, start, size)
        return None

    def _read(self, name: str, start: int, size: int) -> bytes:
        if start == _NO_FILE:
            raise UserError(f"member {name!r} is a link or no regular file; pack the file itself")
        return read_piece(self.path, start, start + size, self._stamp)

    def _members(self, index: int) -> Iterator[tuple[str, int, int]]:
        """(name, offset, size) of the members of a sample."""
        for start, size, begin, end in self._members_M4[self._first_N[index] : self._first_N[index + 1]].tolist():
            yield self._names_B[begin:end].tobytes().decode("utf-8", "surrogateescape"), start, size


def _split(name: str) -> tuple[str, str]:
    """(key, extension): a/b.seg.png is the seg.png of a/b."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension


def _write_index(path: Path, file: IO[bytes], out: IO[bytes]) -> dict[str, Any]:
    first, members, names = array("q"), array("q"), bytearray()
    digest, key, size = hashlib.sha256(), None, file.seek(0, 2)
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as opened:
            while (member := opened.next()) is not None:
                vars(opened)["members"].clear()  # tarfile remembers every header
                if member.isdir():
                    continue
                name = member.name.removeprefix("./")
                if _split(name)[0] != key:
                    key = _split(name)[0]
                    first.append(len(members) // 4)
                is_file = member.isreg() and not member.issparse()
                if is_file and member.offset_data + member.size > size:
                    raise UserError(f"dataset {str(path)!r} is cut off in {name!r}; replace it")
                data = name.encode("utf-8", "surrogateescape")
                members.extend(
                    (member.offset_data if is_file else _NO_FILE, member.size, len(names), len(names) + len(data))
                )
                names += data
                digest.update(f"{name!r} {member.size} {member.mtime} {member.chksum}".encode())
            file.seek(opened.offset)
            if any(file.read(tarfile.BLOCKSIZE)):  # what tarfile cannot read it takes for the end
                raise tarfile.ReadError(f"bad header at byte {opened.offset}")
    except UserError:
        raise
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"dataset {str(path)!r} cannot be read as tar ({error}); give an uncompressed one") from error
    first.append(len(members) // 4)
    for part in (first, members):
        out.write(np.frombuffer(part, np.int64).astype("<i8").tobytes())
    out.write(names)
    return {"rows": len(first) - 1, "members": len(members) // 4, "digest": digest.hexdigest()}
