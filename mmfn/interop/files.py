"""The files of a checkpoint folder: JSON, and safetensors with or without an index, of which headers alone are read."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmfn.errors import UserError
from mmfn.models.disk_tensor import Ranges, slices, whole

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What parameters can be stored in, by the names of safetensors."""
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class FileTensor:
    """One tensor of a file, or of a mapping: its shape and dtype (as safetensors names it), and how to read it."""

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    source: Any  # an open safetensors file, or the tensor itself

    @classmethod
    def of(cls, name: str, value: Tensor) -> "FileTensor":
        """A tensor in memory."""
        return cls(name, "it", tuple(value.shape), CODES.get(value.dtype, str(value.dtype)), value)

    def read(self, ranges: Ranges | None = None) -> Tensor:
        """The values, or those in `ranges`, without those outside: a view of a mapped file or of the tensor."""
        if isinstance(self.source, Tensor):
            return self.source if ranges is None else self.source[slices(ranges)]
        if ranges is None or ranges == whole(self.shape):
            value: Tensor = self.source.get_tensor(self.name)
        else:
            value = self.source.get_slice(self.name)[slices(ranges)]
        return value


def scan(folder: Path, stack: ExitStack, is_optional: Callable[[str], bool]) -> dict[str, FileTensor]:
    """Every tensor of a folder by name; opens all files (until `stack` ends), reads headers only.

    Raises ValueError where files and index disagree, but for names that are `is_optional`.
    """
    tensors: dict[str, FileTensor] = {}
    for file, index in _files(folder).items():
        path = folder / file
        content = open_file(path, stack)
        names = set(content)
        if index is not None and (absent := sorted(n for n in index - names if not is_optional(n))):
            raise UserError(f"weight file {path} lacks tensor {absent[0]!r} that {INDEX} lists; fetch the file again")
        if index is not None and (extra := sorted(n for n in names - index if not is_optional(n))):
            raise UserError(
                f"weight file {path} holds tensor {extra[0]!r} that {INDEX} does not list; fetch both again"
            )
        tensors |= content
    return tensors


def open_file(path: Path, stack: ExitStack) -> dict[str, FileTensor]:
    """Every tensor of a safetensors file by name; reads the header only."""
    try:
        handle = stack.enter_context(safe_open(path, framework="pt"))
    except (SafetensorError, OSError) as error:
        raise UserError(f"weight file {path} is damaged or cut short ({error}); fetch it again") from error
    views = {name: handle.get_slice(name) for name in sorted(handle.keys())}
    return {n: FileTensor(n, path.name, tuple(v.get_shape()), v.get_dtype(), handle) for n, v in views.items()}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        inner = path.parent / "checkpoint"  # of a run
        near = f", such as {inner}" if (inner / path.name).is_file() else ""
        raise UserError(f"{path} does not exist; pass a complete checkpoint folder{near}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__} but must hold a JSON object; fetch it again")
    return value


def _files(folder: Path) -> dict[str, set[str] | None]:
    """Weight files of a folder, each with the tensor names the index lists for it (None without an index)."""
    if (folder / SINGLE).is_file():
        return {SINGLE: None}
    if not (folder / INDEX).is_file():
        if any(folder.glob("*.bin")):
            raise UserError(
                f"checkpoint {folder} holds pickled *.bin weights, which can run code; convert them to {SINGLE}"
            )
        raise UserError(
            f"checkpoint {folder} holds neither {SINGLE} nor {INDEX}; fetch its weights, or begin with "
            "random ones (model.init=random)"
        )
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX} has no weight_map of tensor names to files; fetch it again")
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or file not in files:  # one file holds thousands of tensors
            _check_file(folder, name, file)
        files.setdefault(file, set()).add(name)
    return dict(files)


def _check_file(folder: Path, name: str, file: Any) -> None:
    """Raise ValueError unless `file`, where the index puts tensor `name`, is a weight file of the folder."""
    if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
        raise UserError(
            f"{folder / INDEX} puts tensor {name!r} into {file!r}; a safetensors file beside it is expected"
        )
    if not (folder / file).is_file():
        raise UserError(f"weight file {folder / file} is missing but {INDEX} lists it; fetch it")
