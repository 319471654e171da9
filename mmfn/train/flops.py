"""The FLOPs of a model as it is trained."""

from typing import Any

from mmfn.models import Family
from mmfn.models.work import Work, work_of
from mmfn.train.objective import Objective, loss_weights
from mmfn.tree import Tree


def model_work(family: Family, cfg: Any, specs: Tree, objective: Objective) -> Work:
    """The work of a model as it is trained: `specs` with adapters and what is frozen, losses of weight 0 left out."""
    weights = loss_weights(objective, family, cfg)
    flow = {part: stages for part, stages in family.flow(cfg).items() if weights.get(part, 1.0)}
    return work_of(specs, flow, family.experts_per_token(cfg))
