"""From a config to the training step: objective, optimizer, schedule and guard put together."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from mmfn.errors import UserError
from mmfn.model import Model
from mmfn.models import ahead_loss
from mmfn.models.layers.balance import ROUTER_LOSS
from mmfn.ops.cross_entropy import power_of_two
from mmfn.parallel.program import Program
from mmfn.spec import trained_paths
from mmfn.train.build.optimizer import build_guard, build_optimizer, build_schedule
from mmfn.train.config.learning import ObjectiveSection
from mmfn.train.config.schema import Config
from mmfn.train.objective import Objective, loss_weights, resolve
from mmfn.train.step import State, Step, init_state, make_step
from mmfn.tree import Tree

LOSS_SETTINGS = {ROUTER_LOSS: "router_aux_coef", ahead_loss(0): "ahead_weight"}
"""Name of a loss -> the setting of its weight; null: the model's own."""


def build_objective(section: ObjectiveSection) -> Objective:
    """The objective of a config. Raises ValueError for an unknown name."""
    total = section.total_chunk_size
    weights = {name: getattr(section, setting) for name, setting in LOSS_SETTINGS.items()}
    return replace(
        resolve(section.name),
        z_loss=section.z_loss,
        label_smoothing=section.label_smoothing,
        chunk=section.chunk_size if total is None else power_of_two(total),
        loss_weights={name: weight for name, weight in weights.items() if weight is not None},
    )


def loss_notes(model: Model, objective: Objective) -> tuple[str, ...]:
    """What is said of losses beside cross entropy: their weights and where these are from."""
    weights = loss_weights(objective, model.family, model.cfg)
    sources = {name: f"objective.{LOSS_SETTINGS[name]}" for name in objective.loss_weights}
    return tuple(f"{name}: weight {weights[name]:g}, of {sources.get(name, 'config.json')}" for name in weights)


def build_step(
    config: Config, model: Model, program: Program, device: torch.device | None = None
) -> tuple[Step, State]:
    """The step of a config and the state before it; `device`: where it is computed, default where parameters lie."""
    optimizer, guard = build_optimizer(config, program.specs, device), build_guard(config)
    objective, rate = build_objective(config.objective), build_schedule(config)
    _check_ahead(loss_weights(objective, model.family, model.cfg), program.specs)
    step = make_step(
        model.family, model.cfg, program, objective, optimizer, schedule=rate, guard=guard, seed=config.train.seed
    )
    return step, init_state(model.params, optimizer, program.specs, guard, device)


def _check_ahead(weights: Mapping[str, float], specs: Tree) -> None:
    """Raise ValueError where an optimizer would decay what no loss reaches."""
    paths = [path for path in trained_paths(specs) if path.startswith("mtp/")]
    if paths and not weights.get(ahead_loss(0), 0):
        raise UserError(
            f"objective.ahead_weight is 0, so that {paths[0]!r} is trained without a gradient; add mtp to freeze.parts"
        )
