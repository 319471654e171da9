"""The second half of a step: from summed gradients to new parameters, by the optimizer and by rules.

What is not finite, or a spike, is skipped here, decided on the device (`mmfn.train.guard`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmfn import tree
from mmfn.models import Family
from mmfn.parallel.mesh.step_sums import norm_and_sums
from mmfn.parallel.program import Program
from mmfn.parallel.weights.sharding import local
from mmfn.spec import trained_paths
from mmfn.train import optim
from mmfn.train.guard import Guard
from mmfn.train.optim import Leaves, Transform, Update, facts_of
from mmfn.train.rule_updates import rule_updates
from mmfn.train.schedule import Schedule
from mmfn.tree import Tree

Apply = Callable[..., tuple[dict[str, Any], dict[str, Tensor]]]
"""(params, grads, memory, step, sums) -> (memory, metrics); see `update_of`."""


def update_of(
    family: Family, cfg: Any, program: Program, optimizer: Transform, schedule: Schedule, guard: Guard, kernel: str
) -> tuple[Callable[[Tree], Leaves], Apply]:
    """`(leaves, apply_)`: which shards of a tree of parameters are written, by path, and the function that does.

    `apply_` writes `params` in place, those that a gradient and those that a rule updates. `memory`: "opt" and "guard"
    of the state. `sums`: this rank's shares of metrics and counts, which are summed over ranks here, along with the
    norm. `kernel`: see `Update`. Raises ValueError for patterns and rules that fit nothing.
    """
    rule_paths, update_by_rule = rule_updates(family, cfg, program.specs, program.mesh)
    optimize = optimizer.update(facts_of(program.specs, program.mesh))
    written = {*trained_paths(program.specs), *rule_paths}
    places = [(path, i) for i, path in enumerate(tree.paths(program.specs)) if path in written]

    def leaves(params: Tree) -> Leaves:
        flat = tree.leaves(params)
        return {path: local(flat[i]) for path, i in places}

    def apply_(
        params: Leaves, grads: Leaves, memory: dict[str, Any], step: Tensor, sums: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        lr = schedule(step)
        norm, sums = norm_and_sums(optim.global_norm(grads), sums, program.mesh)
        is_taken, counters = guard.judge(memory["guard"], sums["loss"], norm)
        sums = update_by_rule(params, sums, is_taken)
        trained = {path: params[path] for path in grads}
        update = Update(params=trained, grads=grads, norm=norm, finite=is_taken, lr=lr, step=step, kernel=kernel)
        _, opt = optimize(update, memory["opt"])
        skips = {"skipped": (~is_taken).to(torch.int64), "in_a_row": counters["in_a_row"]}
        return {"opt": opt, "guard": counters}, {**sums, "grad_norm": norm, "lr": lr, **skips}

    return leaves, apply_
