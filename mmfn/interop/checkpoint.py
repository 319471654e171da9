"""Reading Hugging Face checkpoints: a folder with `config.json` and safetensors, sharded or not.

Accounting is strict and two-way (`accounting`) and comes before a value is read. A leaf, or the part of it that is a
rank's shard, is then read from the tensors and the slices of them that hold it, and from nothing else.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfn import tree
from mmfn.dtypes import at_least
from mmfn.errors import UserError
from mmfn.interop.accounting import Account, Pair, account, check
from mmfn.interop.files import DTYPES, INDEX, SINGLE, FileTensor, open_file, read_json, scan
from mmfn.models.disk_tensor import DiskTensor, Ranges, sizes, slices, whole
from mmfn.models.keymap import KeyMap
from mmfn.spec import ParamSpec
from mmfn.tree import Tree


def read_config(folder: Path) -> dict[str, Any]:
    """The dict in `folder/config.json`. Raises ValueError when it is missing or not a JSON object."""
    if not folder.is_dir():
        raise UserError(f"checkpoint {folder} is not a folder; pass a folder with config.json and {SINGLE}")
    return read_json(folder / "config.json")


def stored_names(folder: Path) -> frozenset[str] | None:
    """Names of all tensors of a checkpoint folder; None where it holds no weights."""
    if not any((folder / file).is_file() for file in (SINGLE, INDEX)):
        return None
    with ExitStack() as stack:
        return frozenset(scan(folder, stack, lambda name: True))


@dataclass(frozen=True, kw_only=True)
class Weights:
    """An open checkpoint of a model (`open_weights`): its leaves are read one by one, whole or in part.

    `dtype`: that of leaves, but for those whose spec declares a wider one; None keeps what is stored, the widest where
    a leaf is stored in several tensors.
    """

    specs: Tree
    account: Account
    dtype: torch.dtype | None = None
    device: torch.device | str = "cpu"

    def read_slice(self, path: str, ranges: Ranges | None = None) -> Tensor:
        """The leaf `path`, or its elements in `ranges` (one per dim of the leaf): contiguous, a copy.

        >>> weights.read_slice("layers/0/experts/gate_up", ((0, 2), (0, 8), (0, 3)))  # 2 of E, 3 of D

        Reads of the files what lies in `ranges`; where a dim of the leaf is stored as several, all along that dim.
        Raises ValueError where a copy of the leaf (a tied head) differs from it there.
        """
        pairs, dtype = self.account.leaves[path], self.dtype_of(path)
        ranges = whole(pairs[0][1].leaf.shape) if ranges is None else ranges
        parts = [(source, part) for source, target in pairs if (part := target.part(ranges)) is not None]
        for copy in self.account.copies.get(path, ()):
            for source, part in parts:
                _check_copy(copy, source, part.disk)
        values = ((part.place, part.from_disk(source.read(part.disk))) for source, part in parts)  # one at a time
        return _assemble(values, sizes(ranges), dtype=dtype, device=self.device)

    def dtype_of(self, path: str) -> torch.dtype:
        """What a leaf is read in."""
        pairs = self.account.leaves[path]
        leaf: ParamSpec = pairs[0][1].leaf
        return at_least(leaf.dtype, self.dtype or _widest([source for source, _ in pairs]))

    def read(self, shards: Mapping[str, Ranges] | None = None) -> Tree:
        """All leaves in the structure of the specs, those with `shards`, by path, in part."""
        return tree.map_with_path(lambda path, leaf: self.read_slice(path, (shards or {}).get(path)), self.specs)


@contextmanager
def open_weights(
    folder: Path,
    specs: Tree,
    key_map: KeyMap,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[Weights]:
    """The weights of a checkpoint folder, any layout of the key map; files are open, nothing but headers is read.

    Raises ValueError naming tensor, file and nearest key for a missing or unexpected tensor, a wrong shape or kind of
    dtype, tensors in different layouts, a missing or truncated file, and pickled weights.
    """
    with ExitStack() as stack:
        tensors = scan(folder, stack, lambda name: name in key_map.copies or key_map.is_ignored(name))
        yield Weights(specs=specs, account=account(folder, specs, key_map, tensors), dtype=dtype, device=device)


def load_params(
    folder: Path,
    specs: Tree,
    key_map: KeyMap,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    shards: Mapping[str, Ranges] | None = None,
) -> Tree:
    """The parameters of a checkpoint folder in the structure of `specs`; `dtype` None keeps each tensor's own.

    A leaf whose spec declares a wider dtype has that. `shards`: by path, the ranges of a rank's part of a leaf, all
    that is read of it. Raises ValueError as `open_weights` does, and for a copy (tied head) that differs from its
    original.
    """
    with open_weights(folder, specs, key_map, dtype=dtype, device=device) as weights:
        return weights.read(shards)


@contextmanager
def open_adapted(
    file: Path,
    specs: Tree,
    names: Mapping[str, DiskTensor],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[Weights]:
    """The weights of one safetensors file with the tensors `names`, which hold some of the leaves, and no others.

    Raises ValueError as `open_weights` does.
    """
    with ExitStack() as stack:
        tensors = open_file(file, stack)
        check(file.parent, names, tensors, [name for name in tensors if name not in names])
        leaves: dict[str, list[Pair]] = {}
        for name, target in names.items():
            leaves.setdefault(target.path, []).append((tensors[name], target))
        uses = Account(leaves=leaves, copies={}, verbatim=(), layout="transformers")
        yield Weights(specs=specs, account=uses, dtype=dtype, device=device)


def from_tensors(tensors: Mapping[str, Tensor], specs: Tree, key_map: KeyMap) -> Tree:
    """The tree of `specs` from tensors under their Hugging Face names, with the same accounting as `load_params`.

    A leaf that is one tensor is a view of it, in its dtype.
    """
    by_name = {name: FileTensor.of(name, value) for name, value in tensors.items()}
    uses = account("the mapping", specs, key_map, by_name)
    for path, copies in uses.copies.items():
        for copy in copies:
            _check_copy(copy, uses.leaves[path][0][0], None)

    def build(path: str, leaf: Any) -> Tensor:
        pairs = uses.leaves[path]
        values = [target.from_disk(source.read()) for source, target in pairs]
        if len(values) == 1:
            return values[0]
        places = [target.ranges for _, target in pairs]
        dtype = reduce(torch.promote_types, [value.dtype for value in values])
        return _assemble(zip(places, values, strict=True), tuple(leaf.shape), dtype=dtype, device=values[0].device)

    return tree.map_with_path(build, specs)


def _assemble(
    values: Iterable[tuple[Ranges, Tensor]],
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """A tensor with each value at its place: one copy, contiguous whatever the order on disk, no view of a file."""
    out = torch.empty(shape, dtype=dtype, device=device)
    for place, value in values:
        out[slices(place)].copy_(value)
    return out


def _widest(sources: Sequence[FileTensor]) -> torch.dtype:
    return reduce(torch.promote_types, [DTYPES[source.dtype] for source in sources])


def _check_copy(copy: FileTensor, original: FileTensor, ranges: Ranges | None) -> None:
    if copy.shape != original.shape or not torch.equal(copy.read(ranges), original.read(ranges)):
        raise UserError(
            f"tensor {copy.name!r} in {copy.file} differs from {original.name!r} although the config ties them; "
            "set tie_word_embeddings to false or remove the tensor"
        )
