"""LoRA adapters in peft's format: a folder with `adapter_config.json` and `adapter_model.safetensors`.

Layers have the names transformers gives its modules. Experts are peft's `target_parameters`: adapters of one module are
nested, the parameter its class registers last outermost. Parameters trained in full are peft's `modules_to_save`.
Source: peft 0.21 (`LoraConfig`, `ParamWrapper`, `get_peft_model_state_dict`), the oracle.

Legend: r rank, E experts.
"""

import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from mmfn import tree
from mmfn.errors import UserError
from mmfn.interop import export, peft_config
from mmfn.interop.checkpoint import Weights, open_adapted
from mmfn.interop.peft_config import CONFIG, ends, is_target
from mmfn.lora import Adapter, adapt, adapters_of, layers
from mmfn.model import Model
from mmfn.models.disk_tensor import DiskTensor, whole
from mmfn.models.keymap import KeyMap
from mmfn.spec import model_dtype, rules_of, trained_paths
from mmfn.tree import Tree

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name: peft wraps a model twice


def save(folder: str | PathLike[str], model: Model, specs: Tree, base: str = "", *, overwrite: bool = False) -> None:
    """Write a model's adapters, and what else is trained, as peft reads them; the folder appears complete or not.

    `specs`: those of `model.params` (`mmfn.lora.lora`). `base`: the name or folder of the model without adapters.
    `overwrite` replaces an adapter. Raises ValueError for a folder that is neither empty nor an adapter to overwrite,
    and for what peft's format cannot express (see `disk_tensors`).
    """
    export.check_target(Path(folder).resolve(), overwrite=overwrite, config=CONFIG)
    what = contents(model, specs, base)
    leaves = ((path, leaf) for path, leaf in tree.items(model.params) if path in what.leaves)
    export.save(Path(folder), what, (export.Piece.whole(path, leaf) for path, leaf in leaves))


def contents(model: Model, specs: Tree, base: str = "", texts: Mapping[str, str] | None = None) -> export.Contents:
    """What the folder of `save` is going to hold; of parameters dtypes alone count, they may be shards.

    `texts`: further files by name. Raises ValueError for what peft's format cannot express.
    """
    config = settings(specs, *_plain(model)) | {"base_model_name_or_path": base}
    return export.contents(
        disk_tensors(specs, *_plain(model)),
        {path: leaf.dtype for path, leaf in tree.items(model.params)},
        {CONFIG: export.json_text(config), **(texts or {})},
        max_shard_bytes=sys.maxsize,  # peft reads one file
        single=WEIGHTS,
    )


def load(folder: str | PathLike[str], model: Model) -> Model:
    """The model with the adapters of a folder that peft or `save` wrote, in the dtype of its parameters.

    Every stored tensor is used once and every leaf filled once. Raises ValueError for an adapter of another model and
    for settings that mmfn does not have (see `read`).
    """
    values, (plain, _) = dict(tree.items(model.params)), _plain(model)
    device, dtype = next(iter(values.values())).device, model_dtype(model.params, plain)
    with open_weights(folder, model, dtype, device) as weights:
        values |= {path: weights.read_slice(path) for path in weights.account.leaves}
    return replace(model, params=tree.map_with_path(lambda path, leaf: values[path], weights.specs))


@contextmanager
def open_weights(
    folder: str | PathLike[str], model: Model, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Iterator[Weights]:
    """The open weights of a folder that peft or `save` wrote, adapters and what is trained in full: `dtype` or wider.

    Of `model` the config alone counts. Raises ValueError as `load` does.
    """
    specs = read(folder, *_plain(model))
    names = disk_tensors(specs, *_plain(model))
    with open_adapted(Path(folder) / WEIGHTS, specs, names, dtype=dtype, device=device) as weights:
        yield weights


def read(folder: str | PathLike[str], plain: Tree, key_map: KeyMap) -> Tree:
    """The specs `plain` of a model with the adapters that a folder's config names, all else frozen as peft does.

    Its dropout is that of training on. Raises ValueError for a missing or broken config, one that is not plain LoRA,
    one that names no layer of this model, and one that holds a tied embedding.
    """
    config = peft_config.read(folder)
    names = _names(plain, key_map)
    layer_of = {path: layer for layer, path in layers(plain).items()}
    experts = {path for path, layer in layer_of.items() if path == layer}
    weights = [path for path in layer_of if is_target(names[path], path in experts, config)]
    if not weights:
        raise UserError(
            f"adapter {str(folder)!r} targets {config.get('target_modules')!r}, which is no layer of this model; use "
            "the model it was trained on"
        )
    modules = config.get("modules_to_save") or ()
    shared = [name for copy, path in key_map.copies.items() for name in (copy, names[path])]
    if tied := [name for name in shared if ends(name.rpartition(".")[0], modules)]:
        raise UserError(
            f"adapter {str(folder)!r} holds {tied[0]!r} in full, which is tied to a module that peft leaves on the old "
            "matrix; merge it with peft (output.adapter: merged), or leave the embedding out of lora.keep"
        )
    return adapt(
        plain,
        weights,
        _of_modules(names, modules),
        rank=config["r"],
        alpha=config["lora_alpha"],
        is_rs=config.get("use_rslora", False),
        dropout=config.get("lora_dropout", 0.0),
    )


def disk_tensors(specs: Tree, plain: Tree, key_map: KeyMap) -> dict[str, DiskTensor]:
    """`{name on disk: DiskTensor}` of all that is trained: adapters, [E * r, in] and [out, r * E] of experts, the rest.

    `plain`: the specs without adapters. Raises ValueError for what peft cannot express: a module that is trained in
    part, and an embedding trained in full that is the head too.
    """
    names, tensors = _names(plain, key_map), {}
    adapters = adapters_of(specs)
    for path, adapter in adapters.items():
        head, _, name = path.rpartition("/")
        holder = _holder(path, adapters, names, key_map)
        for side, leaf in (("a", adapter.a), ("b", adapter.b)):
            tensors[f"{PREFIX}{holder}.lora_{side.upper()}.weight"] = _on_disk(f"{head}/lora/{name}/{side}", leaf, side)
    full = _in_full(specs, names)
    if partial := set(_of_modules(names, {names[path].rpartition(".")[0] for path in full})) - set(full):
        raise UserError(
            f"an adapter holds whole modules but {min(partial)!r} is not trained while others of its module are; train "
            "all of them, or set output.adapter to merged"
        )
    if tied := set(key_map.copies.values()) & set(full):
        raise UserError(
            f"{min(tied)!r} is trained in full and tied to the head, which peft leaves on the old matrix; set "
            "output.adapter to merged, or leave the embedding out of lora.keep"
        )
    by_name = key_map.disk_tensors(plain, "transformers")
    return tensors | {f"{PREFIX}{names[path]}": by_name[names[path]] for path in full}


def settings(specs: Tree, plain: Tree, key_map: KeyMap) -> dict[str, Any]:
    """The `adapter_config.json` of adapted specs.

    Raises ValueError unless all adapters have one rank, one alpha and one dropout.
    """
    names, adapters = _names(plain, key_map), adapters_of(specs)
    kinds = {(adapter.rank, adapter.alpha, adapter.is_rs, adapter.dropout) for adapter in adapters.values()}
    if len(kinds) != 1:
        raise UserError(
            f"peft's format needs adapters of one rank, alpha and dropout, got {sorted(kinds)}; save them merged"
        )
    ((rank, alpha, is_rs, dropout),) = kinds
    experts = [path for path in adapters if _is_stack(adapters[path])]
    modules = {names[path].rpartition(".")[0] for path in _in_full(specs, names)}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "use_rslora": is_rs,
        "lora_dropout": dropout,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted(names[path].removesuffix(".weight") for path in adapters if path not in experts),
        "target_parameters": sorted(names[path] for path in experts) or None,
        "modules_to_save": sorted(modules) or None,
    }


def _plain(model: Model) -> tuple[Tree, KeyMap]:
    return model.family.specs(model.cfg), model.family.key_map(model.cfg)


def _names(plain: Tree, key_map: KeyMap) -> dict[str, str]:
    """`{path: name of the parameter in transformers}`. Raises ValueError where a leaf is several parameters there."""
    names: dict[str, str] = {}
    for name, tensor in key_map.disk_tensors(plain, "transformers").items():
        if tensor.path in names:
            raise UserError(
                f"{tensor.path!r} is several parameters in transformers, such as {name!r}, and peft adapts each alone; "
                "set output.adapter to merged"
            )
        names[tensor.path] = name
    return names


def _is_stack(adapter: Adapter) -> bool:
    return len(adapter.a.shape) == 3


def _on_disk(path: str, leaf: Any, side: str) -> DiskTensor:
    ranges = whole(leaf.shape)
    if len(leaf.shape) == 2:
        return DiskTensor(path=path, ranges=ranges, dims=(0, 1), shape=leaf.shape, leaf=leaf)
    dims = (0, 1, 2) if side == "a" else (1, 2, 0)
    first, second, third = (leaf.shape[d] for d in dims)
    shape = (first * second, third) if side == "a" else (first, second * third)
    return DiskTensor(path=path, ranges=ranges, dims=dims, shape=shape, leaf=leaf)


def _holder(path: str, adapters: Mapping[str, Adapter], names: Mapping[str, str], key_map: KeyMap) -> str:
    """The module that holds a weight's adapter. Of one module's parameters the last registered is outermost."""
    module, _, parameter = names[path].rpartition(".")
    if not _is_stack(adapters[path]):
        return module
    entries = (*key_map.layouts["transformers"], *key_map.entries)
    order = [name.rpartition(".")[2] for entry in entries for name in entry.names]
    others = [names[other].rpartition(".") for other in adapters if _is_stack(adapters[other])]
    behind = [p for m, _, p in others if m == module and order.index(p) > order.index(parameter)]
    return module + ".base_layer" * len(behind)


def _in_full(specs: Tree, names: Mapping[str, str]) -> list[str]:
    """Paths of the parameters that change themselves, by gradient or by a rule, and not through an adapter."""
    return [path for path in (*trained_paths(specs), *rules_of(specs)) if path in names]


def _of_modules(names: Mapping[str, str], modules: Collection[str]) -> list[str]:
    """Paths of all parameters of modules."""
    return [path for path, name in names.items() if ends(name.rpartition(".")[0], modules)]
