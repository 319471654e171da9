"""Tensors that go from one checkpoint into another as they are: bytes are copied, never read as numbers.

So a dtype that torch does not have survives, and a part of many gigabytes passes through a few megabytes of memory.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from math import prod
from pathlib import Path

from mmfn.errors import UserError
from mmfn.interop import files
from mmfn.interop.weight_files import LENGTH, Stored

PIECE_BYTES = 8 * 2**20


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
    def stored(self) -> Stored:
        """What a header says of it."""
        return Stored(dtype=self.dtype, shape=self.shape, nbytes=self.nbytes)

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


def pieces(spans: Mapping[str, Span], index: int, size: int) -> Iterator[tuple[str, int, bytes]]:
    """`(name, offset, bytes)` of the pieces of tensors that are the turn of process `index` of `size`.

    Raises OSError where a file has become shorter.
    """
    turns = cycle(range(size))
    for name, span in spans.items():
        with open(span.file, "rb") as source:
            for start in range(span.start, span.stop, PIECE_BYTES):
                if next(turns) != index:
                    continue
                count = min(PIECE_BYTES, span.stop - start)
                source.seek(start)
                piece = source.read(count)
                if left := count - len(piece):
                    raise OSError(f"weight file {span.file} ends {left} bytes early; it changed while it was copied")
                yield name, start - span.start, piece


def _spans(file: Path) -> dict[str, Span]:
    """Every tensor of a safetensors file, whose header was checked when it was opened."""
    with open(file, "rb") as stream:
        (length,) = LENGTH.unpack(stream.read(LENGTH.size))
        header = json.loads(stream.read(length))
    base = LENGTH.size + length
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
