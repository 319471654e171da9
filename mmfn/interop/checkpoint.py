"""Reading Hugging Face checkpoints: a folder with `config.json` and safetensors, sharded or not.

Accounting is strict and two-way: every stored tensor is consumed once, every leaf is filled once, or the load refuses
before it reads a value.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmfn import tree
from mmfn.models.keymap import KeyMap, Stored
from mmfn.tree import Tree

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_KINDS = {"F64": "float", "F32": "float", "F16": "float", "BF16": "float", "BOOL": "bool"}  # safetensors dtype -> kind


def read_config(folder: Path) -> dict[str, Any]:
    """The dict in `folder/config.json`. Raises ValueError when it is missing or not a JSON object."""
    if not folder.is_dir():
        raise ValueError(f"checkpoint {folder} is not a folder; pass a folder with config.json and {SINGLE}")
    return read_json(folder / "config.json")


def load_params(
    folder: Path, specs: Tree, key_map: KeyMap, *, dtype: torch.dtype | None, device: torch.device | str
) -> Tree:
    """The parameters of a checkpoint folder in the structure of `specs`; `dtype` None keeps each tensor's own.

    Any layout of the key map is read. Raises ValueError naming tensor, file and nearest key for a missing or unexpected
    tensor, a wrong shape or kind of dtype, tensors in different layouts, a missing or truncated file, a copy (tied
    head) that differs from its original, and pickled weights.
    """
    with ExitStack() as stack:
        found = _scan(folder, stack)
        names = _account(folder, specs, key_map, found)

        def read(path: str, spec: Any) -> Tensor:
            # One copy, contiguous whatever the order on disk, so that parameters never alias the mapped file.
            name, stored = names[path]
            value = stored.from_disk(found[name].read())
            own = dtype or value.dtype
            return value.to(device=device, dtype=own, copy=True, memory_format=torch.contiguous_format)

        return tree.map_with_path(read, specs)


def load_file(file: Path, wanted: Mapping[str, Stored]) -> dict[str, Tensor]:
    """`{path: leaf}` of one safetensors file with the tensors `wanted`, by name, and no others.

    Raises ValueError as `load_params` does.
    """
    with ExitStack() as stack:
        found = _open(file, stack)
        _check_tensors(file.parent, wanted, found, {})
        return {
            stored.path: stored.from_disk(found[name].read()).clone(memory_format=torch.contiguous_format)
            for name, stored in wanted.items()
        }


def from_tensors(tensors: Mapping[str, Tensor], specs: Tree, key_map: KeyMap) -> Tree:
    """The tree of `specs` from tensors under their Hugging Face names, with the same accounting as `load_params`."""
    found = {name: _Found.of(name, value) for name, value in tensors.items()}
    names = _account("the mapping", specs, key_map, found)
    leaves = {path: stored.from_disk(tensors[name]) for path, (name, stored) in names.items()}
    return tree.map_with_path(lambda path, spec: leaves[path], specs)


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; nearest is 'x'"`, or nothing when there is no candidate."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"; nearest is {near[0]!r}" if near else ""


@dataclass(frozen=True)
class _Found:
    """One stored tensor: where it is, its shape and kind of dtype, and how to read it."""

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    source: Any  # an open safetensors file, or the tensor itself

    @staticmethod
    def of(name: str, value: Tensor) -> "_Found":
        kind = "F32" if value.is_floating_point() else "BOOL" if value.dtype == torch.bool else "I64"
        return _Found(name, "it", tuple(value.shape), kind, value)

    def read(self) -> Tensor:
        value: Tensor = self.source if isinstance(self.source, Tensor) else self.source.get_tensor(self.name)
        return value


def _scan(folder: Path, stack: ExitStack) -> dict[str, _Found]:
    """Every stored tensor by name; opens all files, reads headers only."""
    found: dict[str, _Found] = {}
    for file, listed in _files(folder).items():
        path = folder / file
        own = _open(path, stack)
        names = set(own)
        if listed is not None and (absent := sorted(listed - names)):
            raise ValueError(f"weight file {path} lacks tensor {absent[0]!r} that {INDEX} lists; fetch the file again")
        if listed is not None and (extra := sorted(names - listed)):
            raise ValueError(
                f"weight file {path} holds tensor {extra[0]!r} that {INDEX} does not list; fetch both again"
            )
        found |= own
    return found


def _open(path: Path, stack: ExitStack) -> dict[str, _Found]:
    """Every tensor of a file by name; reads the header only."""
    try:
        handle = stack.enter_context(safe_open(path, framework="pt"))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"weight file {path} is damaged or cut short ({error}); fetch it again") from error
    views = {name: handle.get_slice(name) for name in sorted(handle.keys())}
    return {n: _Found(n, path.name, tuple(v.get_shape()), v.get_dtype(), handle) for n, v in views.items()}


def _files(folder: Path) -> dict[str, set[str] | None]:
    """Weight files of a folder, each with the tensor names the index lists for it (None without an index)."""
    if (folder / SINGLE).is_file():
        return {SINGLE: None}
    if not (folder / INDEX).is_file():
        if any(folder.glob("*.bin")):
            raise ValueError(
                f"checkpoint {folder} holds pickled *.bin weights, which can run code; convert them to {SINGLE}"
            )
        raise ValueError(f"checkpoint {folder} holds neither {SINGLE} nor {INDEX}; fetch its weights")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX} has no weight_map of tensor names to files; fetch it again")
    files: dict[str, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(
                f"{folder / INDEX} puts tensor {name!r} into {file!r}; a safetensors file beside it is expected"
            )
        if not (folder / file).is_file():
            raise ValueError(f"weight file {folder / file} is missing but {INDEX} lists it; fetch it")
        names = files.setdefault(file, set())
        assert names is not None
        names.add(name)
    return files


def _account(
    where: Path | str, specs: Tree, key_map: KeyMap, found: Mapping[str, _Found]
) -> dict[str, tuple[str, Stored]]:
    """`{path: (name, Stored)}`, after every stored tensor was found to be consumed once and every leaf filled once."""
    wanted = _choose_layout(where, specs, key_map, found)
    _check_tensors(where, wanted, found, key_map.copies)
    names = {stored.path: (name, stored) for name, stored in wanted.items()}
    _check_copies({path: name for path, (name, _) in names.items()}, found, key_map.copies)
    return names


def _choose_layout(where: Path | str, specs: Tree, key_map: KeyMap, found: Mapping[str, _Found]) -> dict[str, Stored]:
    """What is wanted in the layout that most shapes fit.

    One tensor alone may fit two layouts (a square one does), so all are asked together. Raises ValueError when they
    do not agree.
    """
    options = {layout: key_map.stored(specs, layout) for layout in key_map.layouts}

    def fits(layout: str, name: str) -> bool:
        stored = options[layout].get(name)
        return stored is not None and name in found and found[name].shape == stored.shape

    odd = {layout: [name for name in wanted if not fits(layout, name)] for layout, wanted in options.items()}
    best = min(options, key=lambda layout: len(odd[layout]))
    for name in odd[best]:
        if other := next((layout for layout in options if fits(layout, name)), None):
            raise ValueError(
                f"tensor {name!r} in {found[name].file} of {where} has shape {list(found[name].shape)}, the layout of "
                f"{other!r}, but other tensors have that of {best!r}; store them all in one layout"
            )
    return options[best]


def _check_tensors(
    where: Path | str, wanted: Mapping[str, Stored], found: Mapping[str, _Found], copies: Mapping[str, str]
) -> None:
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted and name not in copies]
    if missing:
        name = missing[0]
        raise ValueError(
            f"{where} lacks tensor {name!r} for parameter {wanted[name].path}{nearest(name, unexpected or found)}"
            f"{_more(missing)}; config and weights must belong together"
        )
    if unexpected:
        name = unexpected[0]
        raise ValueError(
            f"tensor {name!r} in {found[name].file} of {where} belongs to no parameter{nearest(name, wanted)}"
            f"{_more(unexpected)}; config and weights must belong together"
        )
    for name, stored in wanted.items():
        here = found[name]
        if here.shape != stored.shape:
            raise ValueError(
                f"tensor {name!r} in {here.file} of {where} has shape {list(here.shape)} but the config needs "
                f"{list(stored.shape)}; config and weights must belong together"
            )
        kind = "float" if stored.leaf.dtype.is_floating_point else "integer"
        if _KINDS.get(here.dtype, "integer" if here.dtype[0] in "IU" else here.dtype) != kind:
            raise ValueError(
                f"tensor {name!r} in {here.file} of {where} has dtype {here.dtype} but a {kind} tensor is needed; "
                "convert the checkpoint (quantized weights are not supported)"
            )


def _check_copies(paths: Mapping[str, str], found: Mapping[str, _Found], copies: Mapping[str, str]) -> None:
    for name, path in copies.items():
        if name not in found:
            continue
        copy, original = found[name], found[paths[path]]
        if copy.shape != original.shape or not torch.equal(copy.read(), original.read()):
            raise ValueError(
                f"tensor {name!r} in {copy.file} differs from {original.name!r} although the config ties them; "
                "set tie_word_embeddings to false or remove the tensor"
            )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist; pass a complete checkpoint folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__} but must hold a JSON object; fetch it again")
    return value
