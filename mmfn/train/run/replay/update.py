"""The update of a step, leaf by leaf, held against the written formula of its optimizer in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmfn import tree
from mmfn.parallel.weights.sharding import local
from mmfn.train.build.optimizer import build_optimizer, build_schedule
from mmfn.train.build.run import Run
from mmfn.train.config.schema import Config
from mmfn.train.optim import Leaves, Update, facts_of
from mmfn.train.run.replay.compare import Error, measure
from mmfn.train.step import State


@dataclass(frozen=True, kw_only=True)
class UpdateError:
    """How far an updated leaf is from the formula's; of a shard, this rank's."""

    path: str
    dtype: str
    error: Error

    def __str__(self) -> str:
        e = self.error
        return (
            f"the update of {self.path}: largest error {e.largest:.2g} at {list(e.at)} where {self.dtype} explains "
            f"{e.explained:.2g}"
        )


def has_formula(config: Config) -> bool:
    """Whether an update follows from a formula alone: nothing is rounded at random or iterated in bfloat16, and the
    state lies where it is updated."""
    section = config.optimizer
    return section.kind != "muon" and section.moments_dtype == "float32" and not config.layout.offload


def expected_params(run: Run, state: State, grads: Leaves, norm: float) -> Leaves:
    """The trained leaves behind a step, in float64, by path. `state`: before it; `norm`: of all gradients."""
    config, step = run.loaded.config, state["step"]
    optimize = build_optimizer(config, run.specs, run.place.device).update(facts_of(run.specs, run.place.mesh))
    leaves = dict(tree.items(state["params"]))
    update = Update(
        params={path: _wide(leaves[path]) for path in grads},
        grads={path: _wide(grad) for path, grad in grads.items()},
        norm=torch.tensor(norm, dtype=torch.float64, device=run.place.device),
        finite=torch.tensor(True, device=run.place.device),
        lr=build_schedule(config)(step),
        step=step,
        kernel="reference",
    )
    done, _ = optimize(update, tree.map(_wide, state["opt"]))
    return done.params


def update_errors(state: State, expected: Leaves) -> list[UpdateError]:
    """The leaves of a state whose error is more than their dtype explains, the farthest first."""
    leaves, errors = dict(tree.items(state["params"])), []
    for path, want in expected.items():
        found = local(leaves[path])
        error = measure(found, want, want.to(found.dtype))
        if not error.ratio <= 1:
            errors.append(UpdateError(path=path, dtype=str(found.dtype).removeprefix("torch."), error=error))
    return sorted(errors, key=lambda one: -one.error.ratio)


def _wide(x: Tensor) -> Tensor:
    """A copy of a rank's values, in float64 where they are floating-point."""
    own = local(x)
    return own.to(torch.float64 if own.is_floating_point() else own.dtype, copy=True)
