"""Models from and to Hugging Face: whole checkpoints, configs, and trees under Hugging Face names."""

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfn import spec, tree
from mmfn.errors import UserError
from mmfn.interop import checkpoint, export, verbatim
from mmfn.model import Model
from mmfn.models import Family, family
from mmfn.models.hf_config import sections
from mmfn.tree import Tree


def load_hf(path: str | PathLike[str], dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Model:
    """A model from a folder with `config.json` and safetensors, single or sharded.

    `dtype` None keeps the stored dtypes; what the family declares in a dtype of its own has that. Raises ValueError,
    one sentence, for a config mmfn does not support, for weights that do not fit it exactly (see
    `checkpoint.load_params`), and for a dtype or device that parameters cannot have. No remote code, no pickle.
    """
    with open_hf(path, dtype, device) as (model, weights):
        return replace(model, params=weights.read())


@contextmanager
def open_hf(
    path: str | PathLike[str], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Iterator[tuple[Model, checkpoint.Weights]]:
    """The model of a folder, still without parameters, and its open weights, of which any part can be read.

    Raises ValueError as `load_hf` does, before a value is read; but for a copy (tied head) that differs from its
    original, which is found by whoever reads the part.
    """
    _check_dtype(dtype)
    _check_device(device)
    folder = Path(path)
    model = blank(checkpoint.read_config(folder), folder)
    specs, key_map = model.family.specs(model.cfg), model.family.key_map(model.cfg)
    with checkpoint.open_weights(folder, specs, key_map, dtype=dtype, device=device) as weights:
        yield replace(model, verbatim=weights.account.verbatim), weights


def blank(hf_config: Mapping[str, Any], folder: Path | None = None) -> Model:
    """A model without parameters. `folder`: that of its weights, whose absent parts it lacks.

    Raises ValueError for an unsupported config.
    """
    model_family, cfg = resolve(hf_config, folder)
    return Model(family=model_family, cfg=cfg, params={}, hf_config=copy.deepcopy(dict(hf_config)))


def init(hf_config: Mapping[str, Any], seed: int = 0, dtype: torch.dtype | None = None) -> Model:
    """A model with random parameters from the dict of a `config.json` alone; float32 unless `dtype` says otherwise.

    What the family declares in a dtype of its own has that. The draws depend on `seed` and each parameter's path only.
    Raises ValueError for an unsupported config or dtype.
    """
    _check_dtype(dtype)
    model = blank(hf_config)
    return replace(model, params=spec.init_params(model.family.specs(model.cfg), seed, dtype))


def to_hf(values: Tree, model: Model, layout: str = "hub") -> dict[str, Tensor]:
    """`{Hugging Face name: tensor}` of any tree shaped like the parameters (gradients, moments), as saved on disk.

    A tied head is absent. `layout`: "hub", or "transformers" for tensors as that library holds them, where a family's
    differ. Raises ValueError for another layout, and when the structure or a shape differs from the parameters'.
    """
    _check_leaves(values, model)
    leaves = dict(tree.items(values))
    tensors = model.family.key_map(model.cfg).disk_tensors(model.family.specs(model.cfg), layout)
    return {name: tensor.to_disk(leaves[tensor.path]) for name, tensor in tensors.items()}


def from_hf(tensors: Mapping[str, Tensor], model: Model) -> Tree:
    """Inverse of `to_hf`: a tree shaped like `model.params` from tensors under their Hugging Face names, in any layout.

    Raises ValueError for missing and unexpected names and wrong shapes, with the nearest name.
    """
    return checkpoint.from_tensors(tensors, model.family.specs(model.cfg), model.family.key_map(model.cfg))


def save_hf(
    path: str | PathLike[str],
    model: Model,
    assets: str | PathLike[str] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    layout: str = "hub",
) -> None:
    """Write the model as a Hugging Face checkpoint that transformers loads with no missing and no unexpected key.

    `assets`: a folder whose tokenizer, processor, template and generation files are copied beside the weights, and, of
    a model whose checkpoint held more than parameters (`model.verbatim`), these tensors, byte for byte. The folder
    appears complete or not at all. `overwrite` replaces a checkpoint with all that is in its folder. `layout`:
    "hub", which everything reads, or "transformers", what that library itself writes; they differ in some families.
    Raises ValueError when the folder exists and is neither empty nor a checkpoint to overwrite, when transformers would
    misread the layout because a tensor is square, and when `assets` lack what is to be copied.
    """
    _check_leaves(model.params, model)
    what = checkpoint_contents(model, assets, max_shard_bytes=max_shard_bytes, layout=layout)
    export.check_target(Path(path).resolve(), overwrite=overwrite)
    export.save(Path(path), what, (export.Piece.whole(name, leaf) for name, leaf in tree.items(model.params)))


def checkpoint_contents(
    model: Model,
    assets: str | PathLike[str] | None = None,
    *,
    max_shard_bytes: int = 5_000_000_000,
    layout: str = "hub",
    texts: Mapping[str, str] | None = None,
) -> export.Contents:
    """What a checkpoint of the model is going to hold; of its parameters dtypes alone count, they may be shards.

    `texts`: further files by name, in place of those in `assets`. The rest, and what is raised, is that of `save_hf`.
    """
    specs, key_map = model.family.specs(model.cfg), model.family.key_map(model.cfg)
    export.check_layout(specs, key_map, layout)
    source = None if assets is None else Path(assets)
    return export.contents(
        key_map.disk_tensors(specs, layout),
        {path: leaf.dtype for path, leaf in tree.items(model.params)},
        {"config.json": export.json_text(config_to_save(model)), **(texts or {})},
        assets=source,
        extra=verbatim.find(source, model.verbatim),
        max_shard_bytes=max_shard_bytes,
    )


def _check_leaves(values: Tree, model: Model) -> None:
    """Raise ValueError unless a tree is shaped like the parameters of a model."""
    specs = model.family.specs(model.cfg)
    leaves = dict(tree.items(values))
    if leaves.keys() != (paths := set(tree.paths(specs))):
        odd = sorted(leaves.keys() ^ paths)[0]
        plain = "mmfn.lora.merge(params), which adds adapters to their weights"
        raise UserError(
            f"the tree has {len(leaves)} leaves and the model {len(paths)} parameters, {odd!r} is in one of them only; "
            f"pass {plain if '/lora/' in odd else 'a tree shaped like model.params'}"
        )
    for path, leaf in tree.items(specs):
        if tuple(leaves[path].shape) != tuple(leaf.shape):
            raise UserError(
                f"leaf {path!r} has shape {list(leaves[path].shape)} but the parameter has {list(leaf.shape)}; pass a "
                "tree shaped like model.params"
            )


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        return
    raise UserError(f"dtype is {dtype!r} but must be a floating torch.dtype of 16 bits or more, or None; use one")


def _check_device(device: torch.device | str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        raise UserError(f"device {device!r} cannot be used by this torch {torch.__version__}; try 'cpu'") from error


def resolve(hf_config: Mapping[str, Any], folder: Path | None = None) -> tuple[Family, Any]:
    """The family of a `config.json` and its config; with the folder of its weights, without parts that they lack."""
    if not isinstance(hf_config, Mapping):
        raise UserError(
            f"hf_config is a {type(hf_config).__name__} but must be the dict of a config.json; pass its to_dict() "
            "if it is a config object of transformers"
        )
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str):
        raise UserError(f"model_type is {model_type!r} but must name a model family; pass the dict of a config.json")
    model_family = family(model_type)
    cfg = model_family.config_from_hf(hf_config)
    names = None if folder is None else checkpoint.stored_names(folder)
    return model_family, cfg if names is None else model_family.without_absent(cfg, names)


def config_to_save(model: Model) -> dict[str, Any]:
    """The config with the model's dtype, which transformers loads the weights as, in all sections that have one."""
    config: dict[str, Any] = json.loads(json.dumps(dict(model.hf_config)))
    dtype = spec.model_dtype(model.params, model.family.specs(model.cfg))
    for key, section in sections(config):
        if not key or key.endswith("_config") or "dtype" in section or "torch_dtype" in section:
            section.pop("torch_dtype", None)
            section["dtype"] = str(dtype).removeprefix("torch.")
    if not config.get("architectures"):
        config["architectures"] = [model.family.key_map(model.cfg).architecture]
    return config
