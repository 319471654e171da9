"""The oracle of an export: every tensor whole, in files that safetensors writes."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

import mmfn
from mmfn.dtypes import at_least
from mmfn.interop.hf import to_hf


def tensors_of(model: mmfn.Model, layout: str) -> dict[str, Tensor]:
    """What a checkpoint of a model with whole parameters holds."""
    specs = model.family.key_map(model.cfg).disk_tensors(model.family.specs(model.cfg), layout)
    named = to_hf(model.params, model, layout)
    return {name: value.to(at_least(specs[name].leaf.dtype, value.dtype)) for name, value in named.items()}


def write(folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Files of whole tensors in their order, of at most so many bytes, and their index."""
    groups: list[list[str]] = [[]]
    for name, value in tensors.items():
        if groups[-1] and sum(tensors[n].nbytes for n in groups[-1]) + value.nbytes > max_shard_bytes:
            groups.append([])
        groups[-1].append(name)
    folder.mkdir(parents=True)
    num = len(groups)
    names = [f"model-{i:05d}-of-{num:05d}.safetensors" for i in range(1, num + 1)] if num > 1 else ["model.safetensors"]
    for file, group in zip(names, groups, strict=True):
        save_file({n: tensors[n].contiguous().clone() for n in group}, folder / file, metadata={"format": "pt"})
    if num > 1:
        weight_map = {n: file for file, group in zip(names, groups, strict=True) for n in group}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def content(folder: Path, patterns: Iterable[str] = ("*.safetensors", "*.index.json")) -> dict[str, bytes]:
    """The bytes of files of weights by name."""
    return {path.name: path.read_bytes() for pattern in patterns for path in folder.glob(pattern)}
