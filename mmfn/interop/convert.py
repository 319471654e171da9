"""Between Hugging Face checkpoints and folders of torch.distributed.checkpoint, one leaf in memory at a time.

Values, dtypes and what no family trains (blocks ahead, other parts of a model) go over as they are stored.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mmfn import tree
from mmfn.dtypes import at_least
from mmfn.errors import UserError
from mmfn.interop import checkpoint, dcp_names, export, hf, verbatim
from mmfn.interop.accounting import account
from mmfn.interop.checkpoint import Weights
from mmfn.interop.dcp_read import TRACKER, find_folder, open_dcp
from mmfn.interop.files import DTYPES, FileTensor, scan
from mmfn.model import Model
from mmfn.models.disk_tensor import DiskTensor, whole
from mmfn.spec import ZEROS, ParamSpec
from mmfn.tree import Tree

RELEASE = "release"  # the folder of weights that no step of a run wrote


def hf_to_dcp(
    source: Path, out: Path, *, prefix: str = "model.", drop: str = "", experts: str = "flat", has_head: bool = False
) -> int:
    """Write a Hugging Face checkpoint as `OUT/release`, with a tracker that names it; returns the number of tensors.

    A tensor `DROP x` is stored as `model.PREFIX x`. `experts`: "hub", "merged" or "flat" (`dcp_names`). `has_head`: a
    head that is tied to the embedding is stored as well. Raises ValueError for what is no checkpoint of a known family,
    and where `out` is not empty.
    """
    from mmfn.interop.dcp_write import LazyTensor, write

    export.check_empty(out)
    model = hf.blank(checkpoint.read_config(source), source)
    key_map, specs = model.family.key_map(model.cfg), as_stored(model.family.specs(model.cfg))
    with ExitStack() as stack:
        weights = stack.enter_context(checkpoint.open_weights(source, specs, key_map))
        files = scan(source, stack, lambda name: True)
        named = dcp_names.tensors_of(specs, key_map, experts)
        if has_head:
            named |= _copies(key_map.copies, named)
        tensors = {
            name: LazyTensor(shape=t.shape, dtype=weights.dtype_of(t.path), read=partial(_read, weights, t))
            for name, t in named.items()
        }
        for name in weights.account.verbatim:
            tensors[name] = LazyTensor(shape=files[name].shape, dtype=_dtype(files[name]), read=files[name].read)
        with export.naming(out), export.folder_beside(out.resolve()) as fresh:
            write(fresh / RELEASE, {prefix + name.removeprefix(drop): one for name, one in tensors.items()})
            (fresh / TRACKER).write_text(RELEASE, encoding="utf-8")
            export.publish(fresh, out.resolve())
    return len(tensors)


def dcp_to_hf(
    source: Path,
    out: Path,
    *,
    model: Path,
    dtype: torch.dtype | None = None,
    layout: str = "hub",
    prefixes: dcp_names.Prefixes | None = None,
) -> str:
    """Write the weights of a folder of torch.distributed.checkpoint as a Hugging Face checkpoint.

    `model`: the folder of the original, whose config, tokenizer and other files it gets, and the parts that it has and
    `source` lacks (a block ahead, a talker). `dtype`: of the parameters that declare no wider one, default as stored.
    `prefixes`: how names are changed, default found out. Returns the layout that was read. Raises ValueError, one
    sentence, for what does not fit exactly, and where `out` is not empty.
    """
    export.check_empty(out)
    folder = find_folder(source)
    full = hf.blank(checkpoint.read_config(model), model)
    stored = open_dcp(folder)
    known = dcp_names.layouts(full.family.specs(full.cfg), full.family.key_map(full.cfg))
    found = prefixes or dcp_names.find_prefixes(stored, known.values())
    tensors = {new: replace(stored[old], name=new) for new, old in found.rename(stored).items()}
    blank = replace(full, cfg=full.family.without_absent(full.cfg, tensors))
    key_map, plain = blank.family.key_map(blank.cfg), as_stored(blank.family.specs(blank.cfg))
    uses = account(folder, plain, key_map, tensors, dcp_names.layouts(plain, key_map))
    weights = Weights(specs=plain, account=uses)
    declared = {path: leaf.dtype for path, leaf in tree.items(blank.family.specs(blank.cfg))}
    kinds = {path: weights.dtype_of(path) if dtype is None else at_least(declared[path], dtype) for path in declared}
    params = tree.map_with_path(lambda path, leaf: torch.empty(leaf.shape, dtype=kinds[path], device="meta"), plain)
    more = {name: _as_leaf(tensors[name]) for name in uses.verbatim}
    what = export.contents(
        key_map.disk_tensors(plain, layout) | more,
        kinds | {name: _dtype(tensors[name]) for name in more},
        {"config.json": export.json_text(hf.config_to_save(replace(blank, params=params)))},
        assets=model,
        extra=verbatim.find(model, _absent(model, full, tensors)),
    )

    def pieces() -> Iterator[export.Piece]:
        for path in declared:
            yield export.Piece.whole(path, weights.read_slice(path))
        for name in more:
            yield export.Piece.whole(name, tensors[name].read())

    export.save(out, what, pieces())
    return uses.layout


def as_stored(specs: Tree) -> Tree:
    """The specs with no dtype declared but of integers: what is stored is taken as it is."""

    def free(leaf: ParamSpec) -> ParamSpec:
        is_float = leaf.dtype is None or leaf.dtype.is_floating_point
        return replace(leaf, dtype=None if is_float else leaf.dtype, rule="")

    return tree.map(free, specs)


def _read(weights: Weights, tensor: DiskTensor) -> Tensor:
    """What a tensor holds, read of the files that have it, and nothing else."""
    return weights.read_slice(tensor.path, tensor.ranges).permute(tensor.dims).reshape(tensor.shape)


def _copies(copies: Mapping[str, str], named: Mapping[str, DiskTensor]) -> dict[str, DiskTensor]:
    """Tensors that repeat a leaf."""
    by_path = {tensor.path: tensor for tensor in named.values()}
    return {name: by_path[path] for name, path in copies.items()}


def _absent(folder: Path, full: Model, tensors: Mapping[str, FileTensor]) -> list[str]:
    """Names of what the original has of parts that a checkpoint with `tensors` lacks."""
    names = checkpoint.stored_names(folder)
    if names is None:
        return []
    family = full.family
    part = family.without_absent(full.cfg, tensors)
    all_names, own = (set(family.key_map(cfg).disk_tensors(family.specs(cfg))) for cfg in (full.cfg, part))
    beside = family.key_map(full.cfg).verbatim_of(sorted(names))
    return sorted(name for name in {*(all_names - own), *beside} if name in names and name not in tensors)


def _as_leaf(tensor: FileTensor) -> DiskTensor:
    """A tensor that is no leaf, as one."""
    axes = ("beside",) * len(tensor.shape)
    leaf = ParamSpec(shape=tensor.shape, axes=axes, init=ZEROS)
    dims = tuple(range(len(tensor.shape)))
    return DiskTensor(path=tensor.name, ranges=whole(tensor.shape), dims=dims, shape=tensor.shape, leaf=leaf)


def _dtype(tensor: FileTensor) -> torch.dtype:
    if tensor.dtype not in DTYPES:
        raise UserError(f"tensor {tensor.name!r} has dtype {tensor.dtype}, which cannot be converted; leave it out")
    return DTYPES[tensor.dtype]
