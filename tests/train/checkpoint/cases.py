"""Training states of tiny models whose values follow from path and step alone, on any mesh, and saves of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfn import rng, tree
from mmfn.parallel.mesh.layout import Layout, Mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.parallel.weights.sharding import local, shard_params, whole
from mmfn.train.checkpoint import Facts, fill_, open_checkpoint, save
from mmfn.train.guard import Guard
from mmfn.train.step import State, init_state
from tests import tiny
from tests.train.hosted_cases import build_optimizer

LAYOUTS = {
    "one": Layout(),
    "dp": Layout(dp=4),
    "ep": Layout(dp=4, ep=2),
    "all ep": Layout(dp=4, ep=4),
    "hsdp": Layout(replicate=2, dp=2),
    "hsdp ep": Layout(replicate=2, dp=2, ep=2),
    "cp": Layout(dp=1, cp=2),
    "odd": Layout(dp=3),
}
KINDS = {  # family, what is trained, optimizer, dtype of parameters
    "moe": ("moe", "all", "master", torch.bfloat16),
    "dense ema": ("dense", "all", "ema", torch.float32),
    "muon": ("moe", "all", "muon", torch.float32),
    "lora": ("moe", "lora", "rules", torch.float64),
    "frozen": ("dense", "second block", "adamw", torch.float32),
    "omni": ("omni", "all", "adamw", torch.bfloat16),
    "delta": ("delta_moe", "all", "adamw", torch.float32),
    "glm": ("glm", "all", "adamw", torch.bfloat16),
    "small": ("small", "second block", "adamw", torch.bfloat16),
}


def empty_state(kind: str, mesh: Mesh) -> State:
    """The state before the first step, with odd values in all of its memory."""
    name, trained, optimizer, dtype = KINDS[kind]
    model = tiny.model_of(name)
    specs = tiny.TRAINED[trained](model.family, model.cfg)
    params = tree.map(lambda x: x.to(dtype), tiny.with_adapters(model.params, specs))
    params = shard_params(params, specs, mesh) if mesh.layout.world > 1 else params
    state = init_state(params, build_optimizer(optimizer, specs), specs, Guard(window=4, factor=100.0))
    for leaf in tree.leaves(state):
        local(leaf).fill_(77)
    return state


def values_of(path: str, step: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What the whole leaf `path` holds behind `step`."""
    values = torch.randn(shape, generator=rng.generator(step, path), dtype=torch.float64)
    return values.mul(1000).to(dtype) if not dtype.is_floating_point else values.to(dtype)


def state_at(kind: str, mesh: Mesh, step: int) -> State:
    """The state behind a step, cut by another road than the one under test."""
    state = empty_state(kind, mesh)

    def fill(path: str, leaf: Tensor) -> None:
        values = values_of(path, step, tuple(leaf.shape), leaf.dtype)
        own = local(leaf)
        if own is leaf:
            own.copy_(values)
            return
        for size, index, placement in zip(
            leaf.device_mesh.shape, leaf.device_mesh.get_coordinate(), leaf.placements, strict=True
        ):
            if placement.is_shard():
                rows = values.split(-(-values.shape[placement.dim] // size) or 1, placement.dim)
                none = values.narrow(placement.dim, 0, 0)
                values = rows[index] if index < len(rows) else none
        own.copy_(values)

    for path, leaf in tree.items(state):
        fill(path, leaf)
    return state


def facts_of(step: int) -> Facts:
    return Facts(
        step=step,
        cursor={"step": step, "place": 8 * step, "data": "0123abcd"},
        seeds={"train": 5},
        config="train: {steps: 9}\n",
        layout={"dp": 4},
        extra={"metrics_bytes": 100 * step},
    )


def save_on(layout: Layout, root: Path, kind: str, step: int) -> Path:
    """A checkpoint of all ranks of a layout."""

    def rank(mesh: Mesh) -> Path:
        return save(root, state_at(kind, mesh, step), facts_of(step), mesh["world"])

    return virtual(layout, rank)[0]


def check_read_on(layout: Layout, folder: Path, kind: str, step: int) -> None:
    """Every rank of a layout finds the bits of that step, and nothing else, in its shards and in the whole leaves."""

    def rank(mesh: Mesh) -> None:
        found, expected = empty_state(kind, mesh), state_at(kind, mesh, step)
        fill_(found, open_checkpoint(folder), mesh["world"])
        for (path, leaf), other in zip(tree.items(found), tree.leaves(expected), strict=True):
            assert same_bits(local(leaf), local(other)), path
            all_of_it = whole(leaf, mesh)
            assert same_bits(all_of_it, values_of(path, step, tuple(leaf.shape), leaf.dtype)), path

    virtual(layout, rank)


def same_bits(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    x, y = (t.contiguous().reshape(-1).view(torch.uint8) if t.numel() else t for t in (a, b))
    return torch.equal(x, y)


def attempt(work: Callable[[], Any]) -> str | None:
    """What `work` is refused with; None if it is not."""
    try:
        work()
    except ValueError as error:
        return str(error)
    return None
