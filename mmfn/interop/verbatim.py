"""Tensors that go from one checkpoint into another as they are: bytes are copied, never read as numbers.

So a dtype that torch does not have survives, and a part of many gigabytes passes through a few megabytes of memory.
"""

import json
import struct
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

from mmfn.errors import UserError
from mmfn.interop import files

PIECE_BYTES = 8 * 2**20
_LENGTH = struct.Struct("<Q")  # of the header, at the start of a safetensors file


@dataclass(frozen=True, kw_only=True)
class Span:
    """The bytes `start` to `stop` of a safetensors file, a tensor of `dtype` (as safetensors names it) and `shape`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.stop - self.start

    @property
    def order(self) -> tuple[bool, int]:
        """What to sort by so that every tensor of a file starts at a multiple of its element's size."""
        return self.nbytes > 0, -(self.nbytes // max(1, prod(self.shape)))


def find(folder: Path | None, names: Collection[str]) -> dict[str, Span]:
    """Where the tensors `names`, which the model's checkpoint has beside its parameters, lie in `folder`.

    Raises ValueError, with the fix, when there is no folder or it lacks one of them.
    """
    if not names:
        return {}
    fix = "pass assets=the folder that the model was loaded from"
    if folder is None:
        raise UserError(
            f"the model's checkpoint holds {min(names)!r}{_more(names)} beside its parameters, copied into what is "
            f"saved, but no folder to copy from is named; {fix}"
        )
    with ExitStack() as stack:
        try:
            tensors = files.scan(folder, stack, lambda name: True)
        except UserError as error:
            raise UserError(f"assets hold no weights to copy {min(names)!r} from ({error}); {fix}") from error
        if absent := sorted(set(names) - set(tensors)):
            raise UserError(
                f"assets {folder} lack tensor {absent[0]!r}{_more(absent)} of the model's checkpoint; {fix}"
            )
        headers = {file: _spans(folder / file) for file in sorted({tensors[name].file for name in names})}
    return {name: headers[tensors[name].file][name] for name in names}


def write(file: Path, spans: Mapping[str, Span]) -> None:
    """A safetensors file of the tensors; empty ones, then those of the widest elements, come first: all are aligned."""
    ordered = dict(sorted(spans.items(), key=lambda item: item[1].order))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, span in ordered.items():
        header[name] = {
            "dtype": span.dtype,
            "shape": list(span.shape),
            "data_offsets": [offset, offset + span.nbytes],
        }
        offset += span.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH.size)
    with open(file, "wb") as target:
        target.write(_LENGTH.pack(len(text)) + text)
        for span in ordered.values():
            with open(span.file, "rb") as source:
                _copy(source, target, span)


def _copy(source: BinaryIO, target: BinaryIO, span: Span) -> None:
    source.seek(span.start)
    left = span.nbytes
    while left:
        piece = source.read(min(left, PIECE_BYTES))
        if not piece:
            raise OSError(f"weight file {span.file} ends {left} bytes early; it changed while it was copied")
        target.write(piece)
        left -= len(piece)


def _spans(file: Path) -> dict[str, Span]:
    """Every tensor of a safetensors file, whose header was checked when it was opened."""
    with open(file, "rb") as stream:
        (length,) = _LENGTH.unpack(stream.read(_LENGTH.size))
        header = json.loads(stream.read(length))
    base = _LENGTH.size + length
    return {
        name: Span(
            file=file,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            start=base + entry["data_offsets"][0],
            stop=base + entry["data_offsets"][1],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _more(names: Collection[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
