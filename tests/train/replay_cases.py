"""What is injected into a run that is replayed: into its checkpoints, its settings, its data and its ops."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from mmfn import ops as tables
from mmfn import torch_private, tree
from mmfn.batch import Batch
from mmfn.parallel.mesh.launch import Place
from mmfn.parallel.mesh.layout import Mesh, single_mesh
from mmfn.train.build.run import prepare
from mmfn.train.checkpoint import open_checkpoint, save
from mmfn.train.config.load import load_config
from mmfn.train.run.progress import Progress
from mmfn.train.run.replay import walk
from mmfn.train.run.training import run_training
from tests.train.watch_cases import Bend, faulty


def flip(x: Tensor, place: int, bit: int) -> None:
    """Flip one bit of a float32."""
    x.view(-1).view(torch.int32)[place] ^= 1 << bit


def spoil(folder: Path, step: int, path: str, change: Callable[[Tensor], None]) -> None:
    """Save a checkpoint again, with whole digests, after a change of one leaf: as memory that erred would be saved."""
    name = folder / "state" / f"iter_{step:07d}"
    checkpoint = open_checkpoint(name)
    held = prepare(load_config(folder / "config.yaml", [f"output.path={folder / 'none'}"]), lambda text: None)
    walk.begin_(held, checkpoint)
    (leaf,) = [leaf for found, leaf in tree.items(held.state) if found.endswith(path)]
    change(leaf)
    shutil.rmtree(name)
    save(folder / "state", held.state, checkpoint.manifest.facts, single_mesh()["world"])


def train(config: Path, *changes: str) -> None:
    """Train a run on ranks of this process."""
    loaded = load_config(config, changes)

    def rank(mesh: Mesh) -> None:
        place = Place(device=torch.device("cpu"), mesh=mesh, host=mesh)
        progress = Progress(num_steps=loaded.config.train.num_steps, log_every=100, stream=io.StringIO())
        run_training(prepare(loaded, lambda text: None, place), progress)

    walk.on_ranks(loaded.config.layout.sizes, rank)


def set_nan(x: Tensor) -> None:
    x.view(-1)[7] = torch.nan


def edit(folder: Path, key: str, value: Any) -> None:
    """Change a setting of the run behind its back."""
    sections = yaml.safe_load((folder / "config.yaml").read_text())
    section, name = key.split(".")
    sections[section][name] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(sections))


def bend_data(change: Callable[[Tensor], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first reading of the data give another tensor of pixels."""
    right, count = walk.weigh_share, [0]

    def wrong(*args: Any) -> list[Batch]:
        batches = right(*args)
        if not count[0]:
            change(batches[0].towers["vision"].inputs_UF)
        count[0] += 1
        return batches

    monkeypatch.setattr(walk, "weigh_share", wrong)


def bend_op(name: str, bend: Bend, monkeypatch: pytest.MonkeyPatch, *, is_forward: bool = True) -> None:
    """Let an op of the portable table be wrong at every call."""

    def table() -> tables.Ops:
        return faulty(tables.portable(), name, None, bend, is_forward=is_forward)

    monkeypatch.setitem(tables.TABLES, "portable", table)  # type: ignore[misc]


def bend_adamw(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the fused kernel take steps of another size of one leaf in each call."""
    right = torch_private.fused_adamw_

    def wrong(*lists: list[Tensor], **settings: Any) -> None:
        before = lists[0][0].clone()
        right(*lists, **settings)
        lists[0][0].add_(lists[0][0] - before, alpha=0.01)

    monkeypatch.setattr(torch_private, "fused_adamw_", wrong)
