"""Pickles of torch.distributed.checkpoint and `torch.save`, read without running anything that is named in them.

A pickle is a program: it may call whatever it names. Here a name is looked up in a short table of what these files
need, and what stands there are records without behaviour, never torch's own classes. Any other name is refused.
"""

import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mmfn.errors import UserError

METADATA = "torch.distributed.checkpoint.metadata"
RECORDS = {
    f"{METADATA}.{name}"
    for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")
} | {f"{METADATA}.MetadataIndex", f"{METADATA}.StorageMeta", "torch.distributed.checkpoint.filesystem._StorageInfo"}
DTYPES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}
"""Dtypes of tensors, and the names of their storages in what `torch.save` writes."""


class Record:
    """What an object of a class was made of: its attributes."""

    def __init__(self, *args: Any) -> None:
        self.args = args


class _Properties(Record):
    """torch's TensorProperties, of which the dtype counts."""

    def __setstate__(self, state: Any) -> None:
        self.dtype = state[0] if isinstance(state, tuple) else state["dtype"]


def load_metadata(data: bytes, where: Path) -> Record:
    """The object in a `.metadata` file. Raises ValueError for one that names anything but what such a file needs."""
    found = _load(data, where, _table({name: _fresh(Record) for name in RECORDS}), None)
    if not isinstance(found, Record):
        raise UserError(f"{where} is damaged: it holds a {type(found).__name__}; use another copy of the checkpoint")
    return found


def load_tensor(data: bytes, where: Path) -> Any:
    """What `torch.save` says of a tensor: `(storage, first element, sizes, strides, ...)`.

    A storage is `("storage", dtype, name, device, number of elements)`. Raises ValueError as `load_metadata` does.
    """
    return _load(data, where, _table({"torch._utils._rebuild_tensor_v2": lambda *args: args}), lambda pid: pid)


def _fresh(base: type) -> type:
    """A class of its own for one load, which it may spoil."""
    return type(base.__name__, (base,), {})


def _table(more: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    plain = {f"torch.{name}": getattr(torch, name) for name in DTYPES}
    storages = {f"torch.{storage}": getattr(torch, name) for name, storage in DTYPES.items()}
    paths = {f"pathlib{inner}.{kind}Path": lambda *parts: "/".join(map(str, parts)) for inner in ("", "._local")
             for kind in ("Posix", "Windows", "PurePosix")}  # fmt: skip
    return {
        **plain,
        **storages,
        **paths,
        f"{METADATA}.TensorProperties": _fresh(_Properties),
        f"{METADATA}._MEM_FORMAT_ENCODING": lambda value: value,
        "torch.serialization._get_layout": lambda name: name,
        "torch.Size": tuple,
        "collections.OrderedDict": lambda *items: dict(*items),
        **more,
    }


def _load(data: bytes, where: Path, table: Mapping[str, Any], persistent: Callable[[Any], Any] | None) -> Any:
    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if f"{module}.{name}" in table:
                return table[f"{module}.{name}"]
            raise UserError(
                f"{where} names {module}.{name}, which no weights need and which may run code; nothing of it was run, "
                "and the checkpoint is not read"
            )

        def persistent_load(self, pid: Any) -> Any:
            if persistent is None:
                raise UserError(f"{where} is damaged: it refers to something outside; use another copy")
            return persistent(pid)

    try:
        return Reader(io.BytesIO(data)).load()
    except UserError:
        raise
    except Exception as error:  # a pickle that is damaged can fail in any way
        raise UserError(
            f"{where} is damaged ({type(error).__name__}: {error}); use another copy of the checkpoint"
        ) from error
