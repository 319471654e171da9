"""A step by another program: another layout, dtype or table of ops, from the same parameters and data."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mmfn import tree
from mmfn.parallel.mesh.layout import Mesh
from mmfn.parallel.weights.sharding import shard_params
from mmfn.train.config.load import Loaded
from mmfn.train.data.cursor import State as CursorState
from mmfn.train.optim import Leaves
from mmfn.train.run.replay.passes import cast_params, differentiate, weigh_share, whole_grads
from mmfn.train.run.replay.programs import in_dtype, lower_program, on_device
from mmfn.train.run.replay.walk import prepare_rank
from mmfn.tree import Tree

FLOOR = 1e-3
"""Of the root mean square of all gradients: what a leaf's error is relative to at least. The gradient of some leaves is
0 but for rounding, as that of a bias of keys, which shifts all scores of a query alike."""
PASSES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.5}
"""By the narrower of two dtypes, the relative error of a leaf's gradient that it explains: rounding grows through all
blocks, and where experts are chosen a rounding may choose another."""


@dataclass(frozen=True, kw_only=True)
class Other:
    """What a rank of the other program gave; `grads` whole, on the first."""

    numbers: Mapping[str, float]
    grads: Leaves


def differentiate_other(
    mesh: Mesh, loaded: Loaded, cursor: CursorState, params: Tree, dtype: torch.dtype | None
) -> Other:
    """The pass of the step behind a cursor by the program of a config, with its own reading of the data.

    `params`: whole, in the host's memory; `dtype`: what they and all that is computed are cast to. All ranks call it.
    """
    run = prepare_rank(loaded, mesh)
    before = run.loader.resume(dict(cursor))
    share = next(run.loader.steps(before.step + 1, before))
    config = on_device(loaded.config)
    if dtype is not None:
        config, params = in_dtype(config, dtype), cast_params(params, run.specs, dtype)
    program = lower_program(run, config, None)
    if mesh.layout.world > 1:
        placed = shard_params(params, program.specs, mesh, run.place.device)
    else:
        placed = tree.map(lambda leaf: leaf.to(run.place.device), params)
    batches = weigh_share(run, share, dtype)
    one = differentiate(run, program, placed, batches, torch.tensor(before.step))
    grads = whole_grads(one.grads, placed, mesh, is_kept=run.place.is_first)
    return Other(numbers=one.numbers, grads=grads)


@dataclass(frozen=True, kw_only=True)
class LeafError:
    """The relative error of a leaf's gradient."""

    path: str
    error: float

    def __str__(self) -> str:
        return f"{self.path} by {self.error:.2g} of its norm"


def gradient_errors(found: Leaves, expected: Leaves) -> list[LeafError]:
    """How far gradients are from those of another program, the farthest first."""
    squares = sum(float(g.double().square().sum()) for g in expected.values())
    total = sum(g.numel() for g in expected.values())
    floor = FLOOR * (squares / max(1, total)) ** 0.5
    errors = []
    for path, grad in found.items():
        want = expected[path].double()
        size = float(want.norm()) + floor * want.numel() ** 0.5
        distance = float((grad.double() - want).norm())
        errors.append(LeafError(path=path, error=distance / size if size else distance))
    return sorted(errors, key=lambda one: -one.error if one.error == one.error else float("-inf"))
