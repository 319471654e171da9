"""Parameters in a training checkpoint, whatever mesh wrote it, read by one process, leaf by leaf."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from mmfn import tree
from mmfn.errors import UserError
from mmfn.interop.files import DTYPES
from mmfn.parallel.mesh.axis import Axis
from mmfn.train.checkpoint import Checkpoint, fill_, newest
from mmfn.train.checkpoint.format import MANIFEST, step_of
from mmfn.train.checkpoint.read import names
from mmfn.train.run.folder import STATE
from mmfn.tree import Tree

ALONE = Axis(name="world")
PARAMS, AVERAGES = "params/", "/ema/"  # where a state has parameters, and the averages of them


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Parameters in a training checkpoint. `names`: what each of them is called there."""

    checkpoint: Checkpoint
    names: Mapping[str, str]

    def dtype_of(self, path: str) -> torch.dtype:
        """What a parameter is trained in."""
        return DTYPES[self.checkpoint.manifest.leaves[f"{PARAMS}{path}"].dtype]

    def num_bytes(self, path: str) -> int:
        """The size of what is read of a parameter."""
        leaf = self.checkpoint.manifest.leaves[self.names[path]]
        return prod(leaf.shape) * leaf.item_bytes

    def read(self, paths: Sequence[str]) -> dict[str, Tensor]:
        """Values of parameters by path, in the dtype they are trained in; every block that is read is checked."""
        leaves = {path: self.checkpoint.manifest.leaves[self.names[path]] for path in paths}
        values = {path: torch.empty(leaf.shape, dtype=DTYPES[leaf.dtype]) for path, leaf in leaves.items()}
        fill_({self.names[path]: value for path, value in values.items()}, self.checkpoint, ALONE, is_part=True)
        return {path: value.to(self.dtype_of(path)) for path, value in values.items()}


def find_state(path: Path) -> Path | None:
    """The folder with the training checkpoints of a run: `path`, or in it; None where there are none of mmfn."""
    for folder in (path, path / STATE):
        if any((folder / name / MANIFEST).is_file() for name in names(folder)):
            return folder
    return None


def open_state(path: Path) -> tuple[Checkpoint, list[str]]:
    """The checkpoint of a step that `path` is, or the newest whole one in it, a run folder or its `state`.

    And a sentence for each newer one that is not whole. Raises ValueError where there is none.
    """
    if step_of(path.name) is not None:
        root, name = path.parent, path.name
    else:
        root, name = (path / STATE if (path / STATE).is_dir() else path), None
    search = newest(root, ALONE, name=name)
    if search.checkpoint is None:
        reason = "; ".join(search.skipped) or ("there is none in it" if root.is_dir() else "it is no folder")
        if (path / "config.json").is_file():
            raise UserError(f"{path} is a Hugging Face checkpoint already; give a run with checkpoint.every")
        raise UserError(f"{path} holds no checkpoint that is whole ({reason}); give a run with checkpoint.every")
    return search.checkpoint, list(search.skipped)


def names_of(checkpoint: Checkpoint, specs: Tree, weights: str) -> dict[str, str]:
    """What parameters are called in a state, or, with `weights` "ema", those averages of them that there are.

    Raises ValueError where shapes are others, as in another model, and for a state without averages.
    """
    leaves = checkpoint.manifest.leaves
    averages = {name.partition(AVERAGES)[2]: name for name in leaves if AVERAGES in name}
    if weights == "ema" and not averages:
        raise UserError(f"{checkpoint.folder} has no averages of parameters; leave --weights ema out")
    names = {path: f"{PARAMS}{path}" for path in tree.paths(specs)}
    for path, leaf in tree.items(specs):
        found = leaves.get(names[path])
        if found is None or tuple(found.shape) != tuple(leaf.shape):
            has = "no such leaf" if found is None else f"one of shape {list(found.shape)}"
            raise UserError(
                f"the model has {path!r} of shape {list(leaf.shape)} but {checkpoint.folder} {has}; name the model "
                "that was trained by --model"
            )
    return {path: averages.get(path, name) if weights == "ema" else name for path, name in names.items()}
