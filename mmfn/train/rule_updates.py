"""Leaves that no gradient trains: a rule updates them from what a step has counted, where the step is taken.

A family declares them (`ParamSpec.rule`), counts (`Output.counts`) and says how (`Family.rules`). Counts are summed
over micro-batches and ranks along with the metrics of a step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmfn import tree
from mmfn.errors import UserError
from mmfn.models import Family
from mmfn.parallel.mesh.layout import Mesh
from mmfn.parallel.weights.sharding import cuts, rows
from mmfn.spec import rules_of
from mmfn.train.objective import COUNTS
from mmfn.train.optim import Leaves
from mmfn.tree import Tree

RuleUpdate = Callable[[Leaves, dict[str, Tensor], Tensor], dict[str, Tensor]]
"""(this rank's shards by path, sums of a step, 0-D bool: it is taken) -> the sums without counts; writes the shards."""


def rule_updates(family: Family, cfg: Any, specs: Tree, mesh: Mesh) -> tuple[tuple[str, ...], RuleUpdate]:
    """The paths of the leaves of `specs` that rules update, and the function that does.

    A rule sees whole counts and gives what is added to the whole leaf; a rank adds its rows of that. Counts of a leaf
    that is frozen altogether are ignored. Parameters on the host (`offload("parameters")`) wait here for the copy of
    their change from the device. Raises ValueError for a rule that the family does not have and, when called,
    for a leaf nothing was counted for, counts of what is no leaf, and a change that has not the shape of its leaf.
    """
    known = family.rules(cfg)
    if absent := sorted(set(rules_of(specs).values()) - set(known)):
        raise UserError(
            f"a parameter is updated by rule {absent[0]!r} but family {family.name!r} has "
            f"{', '.join(known) or 'no rules'}; add it to its rules"
        )
    shapes = {path: leaf.shape for path, leaf in tree.items(specs)}
    leaves = {path: (known[leaf.rule], cuts(leaf, mesh)) for path, leaf in tree.items(specs) if leaf.rule}

    def update(params: Leaves, sums: dict[str, Tensor], is_taken: Tensor) -> dict[str, Tensor]:
        counts = {name.removeprefix(COUNTS): x for name, x in sums.items() if name.startswith(COUNTS)}
        if strange := sorted(counts.keys() - shapes.keys()):
            raise UserError(
                f"family {family.name!r} counted for {strange[0]!r}, which is no parameter; correct its Output.counts"
            )
        for path, (rule, own_cuts) in leaves.items():
            if path not in counts:
                raise UserError(f"parameter {path!r} is updated by a rule but the model counted nothing for it")
            leaf, change = params[path], rule(counts[path])
            if change.shape != shapes[path]:
                raise UserError(
                    f"the rule of parameter {path!r} gave a change of shape {list(change.shape)} for one of shape "
                    f"{list(shapes[path])}; return what is added to each of its elements"
                )
            for dim, axis in own_cuts:
                start, stop = rows(change.shape[dim], axis.size, axis.index)
                change = change.narrow(dim, start, stop - start)
            leaf.add_(torch.where(is_taken, change, 0.0).to(leaf))
        return {name: value for name, value in sums.items() if not name.startswith(COUNTS)}

    return tuple(leaves), update
