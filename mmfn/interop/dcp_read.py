"""Reading folders of torch.distributed.checkpoint: tensors alone, and without unpickling (`safe_pickle`).

A folder has `.metadata`, which says in what boxes every tensor lies in which files, and `__RANK_N.distcp` files, one
piece of `torch.save` behind the other. Source: torch 2.13 (`FileSystemWriter`, version 1.0.0 of its metadata).
"""

import io
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfn.errors import UserError
from mmfn.interop.files import CODES, FileTensor
from mmfn.interop.safe_pickle import Record, load_metadata, load_tensor
from mmfn.models.disk_tensor import Ranges, overlap, sizes, slices, within

METADATA, TRACKER = ".metadata", "latest_checkpointed_iteration.txt"
LOCAL_HEADER_BYTES = 30  # of a member of a zip file, before its name


@dataclass(frozen=True, kw_only=True)
class Box:
    """The `ranges` of a tensor that lie in `file`, in the `length` bytes from `begin` on."""

    ranges: Ranges
    file: Path
    begin: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """A tensor in boxes. What `FileTensor` asks of an open safetensors file, of this tensor alone."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: Sequence[Box]

    def get_tensor(self, name: str) -> Tensor:
        """All of it."""
        return self[tuple(slice(0, size) for size in self.shape)]

    def get_slice(self, name: str) -> "Boxes":
        """Itself, to be indexed."""
        return self

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        """The elements in slices with a start and a stop; every box that has some is read."""
        ranges = tuple((part.start, part.stop) for part in index)
        out = torch.empty(sizes(ranges), dtype=self.dtype)
        for box in self.boxes:
            common = overlap(ranges, box.ranges)
            if all(start < stop for start, stop in common):
                values = _read(self.name, box, self.dtype)
                out[slices(within(common, ranges))] = values[slices(within(common, box.ranges))]
        return out


def find_folder(path: Path) -> Path:
    """The folder with `.metadata` that `path` is, or that its tracker, or its only content, names.

    Raises ValueError where there is none, or several.
    """
    if (path / METADATA).is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path} is no folder; give that of a checkpoint of torch.distributed.checkpoint")
    tracker = path / TRACKER
    if tracker.is_file():
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        folder = path / ("release" if text == "release" else f"iter_{int(text):07d}" if text.isdigit() else text)
        if not (folder / METADATA).is_file():
            raise UserError(f"{tracker} names {text!r} but {folder} has no {METADATA}; name the folder of a step")
        return folder
    found = sorted(file.parent for file in path.glob(f"*/{METADATA}"))
    if len(found) != 1:
        names = ", ".join(folder.name for folder in found) or "none"
        raise UserError(f"{path} has no {METADATA} and no {TRACKER}, and {names} in it has one; name one folder")
    return found[0]


def open_dcp(folder: Path) -> dict[str, FileTensor]:
    """Every tensor of a folder by its flattened name; metadata alone are read. What is no tensor is left out.

    Raises ValueError, one sentence, for metadata that are damaged, name code, or have boxes that do not fit.
    """
    path = folder / METADATA
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a folder that has one") from error
    try:
        return _tensors(load_metadata(data, path), folder)
    except UserError:
        raise
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); use another copy") from error


def _tensors(metadata: Record, folder: Path) -> dict[str, FileTensor]:
    places: dict[tuple[str, tuple[int, ...]], Any] = {}
    for index, info in vars(metadata)["storage_data"].items():
        if getattr(index, "offset", None) is not None:  # an object has none
            places[index.fqn, tuple(index.offset)] = info
    found = {}
    for name, entry in vars(metadata)["state_dict_metadata"].items():
        if not hasattr(entry, "chunks"):  # an object, which was pickled
            continue
        dtype, shape = entry.properties.dtype, tuple(entry.size)
        if dtype not in CODES:
            raise UserError(f"tensor {name!r} of {folder} has dtype {dtype}, which parameters cannot have; convert it")
        boxes = [_box(name, chunk, places, folder) for chunk in entry.chunks]
        _check(name, shape, boxes, folder)
        source = Boxes(name=name, shape=shape, dtype=dtype, boxes=boxes)
        found[name] = FileTensor(name, boxes[0].file.name if boxes else METADATA, shape, CODES[dtype], source)
    return found


def _box(name: str, chunk: Any, places: Any, folder: Path) -> Box:
    offsets = tuple(chunk.offsets)
    info = places.get((name, offsets))
    if info is None:
        raise UserError(
            f"{folder / METADATA} does not say where {name!r} is stored from {list(offsets)} on; use another"
        )
    if Path(info.relative_path).name != info.relative_path:
        raise UserError(
            f"{folder / METADATA} puts {name!r} into {info.relative_path!r}, no file beside it; use another"
        )
    if getattr(info, "transform_descriptors", None):
        raise UserError(
            f"tensor {name!r} in {info.relative_path} is compressed; save the checkpoint without extensions"
        )
    return Box(
        ranges=tuple((start, start + size) for start, size in zip(offsets, tuple(chunk.sizes), strict=True)),
        file=folder / info.relative_path,
        begin=info.offset,
        length=info.length,
    )


def _check(name: str, shape: tuple[int, ...], boxes: Sequence[Box], folder: Path) -> None:
    """Raise ValueError unless boxes lie inside a shape and have as many elements: ranks cut along grid lines."""
    fits = all(
        len(box.ranges) == len(shape) and all(0 <= a <= b <= n for (a, b), n in zip(box.ranges, shape, strict=True))
        for box in boxes
    )
    if not fits or sum(prod(sizes(box.ranges)) for box in boxes) != prod(shape):
        raise UserError(f"the pieces of {name!r} in {folder} do not make its shape {list(shape)}; use another copy")


class _Window(io.RawIOBase):
    """Bytes of a file as a file."""

    def __init__(self, number: int, begin: int, length: int) -> None:
        self.number, self.begin, self.length, self.place = number, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.length}[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self.length - self.place)]
        count = os.preadv(self.number, [view], self.begin + self.place) if view else 0
        self.place += count
        return count


def _read(name: str, box: Box, dtype: torch.dtype) -> Tensor:
    """The values of a box. Raises ValueError where they are not what the metadata say."""
    try:
        number = os.open(box.file, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{box.file}, which holds {name!r}, cannot be opened ({error.strerror}); fetch it") from error
    try:
        window = _Window(number, box.begin, box.length)
        with zipfile.ZipFile(window) as archive:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            (_, stored, key, _, count), first, shape, strides, *_ = load_tensor(
                archive.read(members["data.pkl"]), box.file
            )
            if archive.read(members["byteorder"]) != b"little" or stored != dtype or tuple(shape) != sizes(box.ranges):
                raise ValueError("its header says otherwise")
            member = members[f"data/{key}"]
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != count * dtype.itemsize:
            raise ValueError("its storage has another size")
        data = torch.empty(member.file_size, dtype=torch.uint8)
        window.seek(member.header_offset)
        head = window.read(LOCAL_HEADER_BYTES)
        window.seek(member.header_offset + len(head) + sum(int.from_bytes(head[i : i + 2], "little") for i in (26, 28)))
        if data.numel() and not _fill(window, memoryview(data.numpy().data)):
            raise ValueError("it is cut short")
        last = first + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if prod(shape) else -1
        if min(first, *strides, 0) < 0 or last >= count:
            raise ValueError("its elements lie outside of its storage")
        return data.view(dtype).as_strided(tuple(shape), tuple(strides), first)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise UserError(f"tensor {name!r} in {box.file} is damaged ({error}); use another copy") from error
    finally:
        os.close(number)


def _fill(window: _Window, view: memoryview) -> bool:
    """Read until the view is full; False where the bytes end before."""
    while view:
        count = window.readinto(view)
        if not count:
            return False
        view = view[count:]
    return True
