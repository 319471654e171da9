"""What runs have written, compared bit by bit."""

from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mmfn.errors import UserError
from mmfn.train.checkpoint.format import LATEST, folder_name
from mmfn.train.run.folder import STATE


def tensors_apart(one: Path, other: Path) -> int:
    """Tensors of safetensors files that are in one of two folders alone, or are not the same bytes in both."""
    names, others = ({path.name for path in folder.glob("*.safetensors")} for folder in (one, other))
    if not names or not others:
        raise UserError(
            f"{str(other if names else one)!r} holds no safetensors; the run that writes them is not complete"
        )
    apart = 0
    for name in names | others:
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(f / name, "pt")) for f in (one, other) if (f / name).exists()]
            if len(files) == 1:
                apart += len(files[0].keys())
                continue
            keys, theirs = (set(file.keys()) for file in files)
            apart += len(keys ^ theirs) + sum(not _same(*(f.get_tensor(key) for f in files)) for key in keys & theirs)
    return apart


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


def last_state(folder: Path) -> Path:
    """The folder of a run's newest checkpoint of training."""
    return folder / STATE / folder_name(newest(folder))


def newest(folder: Path) -> int:
    """The step of a run's newest checkpoint, 0 without one."""
    path = folder / STATE / LATEST
    return int(path.read_text(encoding="utf-8")) if path.exists() else 0
