"""The safetensors files of a checkpoint: where every tensor lies in them is known before any of its values is.

So any number of processes write into one file side by side, each the elements it has.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from mmfn.interop.files import CODES
from mmfn.models.disk_tensor import Part

ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")
"""The dtypes of `files.DTYPES` as safetensors orders tensors: wide ones first, so that all of them are aligned."""
LENGTH = struct.Struct("<Q")  # of the header, at the start of a safetensors file


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a header says of a tensor: its dtype, as safetensors names it, its shape and its size."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, dtype: torch.dtype, shape: tuple[int, ...]) -> "Stored":
        """A tensor that torch can hold."""
        return cls(dtype=CODES[dtype], shape=shape, nbytes=prod(shape) * dtype.itemsize)


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A file of weights: its header, the size of all of it, and the byte at which each of its tensors begins."""

    head: bytes
    num_bytes: int
    begins: Mapping[str, int]


def in_order(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors in the order in which safetensors writes them."""
    return dict(sorted(tensors.items(), key=lambda item: (ORDER.index(item[1].dtype), item[0])))


def weight_file(tensors: Mapping[str, Stored]) -> WeightFile:
    """The file of tensors in their order, byte for byte what safetensors writes of those that are `in_order`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name, one in tensors.items():
        offsets[name], end = end, end + one.nbytes
        header[name] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH.size)
    head = LENGTH.pack(len(text)) + text
    begins = {name: len(head) + offset for name, offset in offsets.items()}
    return WeightFile(head=head, num_bytes=len(head) + end, begins=begins)


class OpenFiles:
    """Files of a folder that are written at chosen bytes, opened when they are first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.numbers: dict[str, int] = {}

    def write(self, name: str, begin: int, data: bytes | memoryview) -> None:
        """Write `data` from byte `begin` of a file on."""
        view, path = memoryview(data), self.folder / name
        try:
            if name not in self.numbers:
                self.numbers[name] = os.open(path, os.O_WRONLY)
            while view:
                count = os.pwrite(self.numbers[name], view, begin)
                view, begin = view[count:], begin + count
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error

    def sync(self) -> None:
        """Wait until all that was written is durable."""
        for name, number in self.numbers.items():
            try:
                os.fsync(number)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.folder / name)) from error


@contextmanager
def open_files(folder: Path) -> Iterator[OpenFiles]:
    """Files of a folder for the time of a block."""
    files = OpenFiles(folder)
    try:
        yield files
    finally:
        for number in files.numbers.values():
            os.close(number)


def write_part(files: OpenFiles, name: str, begin: int, part: Part, values: Tensor) -> None:
    """Write what a shard, in the host's memory, has of a tensor that begins at byte `begin` of a file."""
    stored = part.to_disk(values).contiguous()
    data, item = bytes_of(stored), values.element_size()
    done = 0
    for first, count in part.runs():
        files.write(name, begin + first * item, data[done : done + count * item])
        done += count * item


def bytes_of(values: Tensor) -> memoryview:
    """The memory of a contiguous tensor in the host's memory."""
    flat = values.detach().as_strided((values.numel(),), (1,))  # one element may have any stride and be contiguous
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def sync(path: Path) -> None:
    """Wait until what is in a file, or the names in a folder, are durable."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
