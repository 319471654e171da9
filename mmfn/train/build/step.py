"""From a config to the training step: objective, optimizer, schedule and guard put together."""

from dataclasses import replace

import torch

from mmfn.model import Model
from mmfn.ops.cross_entropy import power_of_two
from mmfn.parallel.program import Program
from mmfn.train.build.optimizer import build_guard, build_optimizer, build_schedule
from mmfn.train.config.learning import ObjectiveSection
from mmfn.train.config.schema import Config
from mmfn.train.objective import Objective, resolve
from mmfn.train.step import State, Step, init_state, make_step


def build_objective(section: ObjectiveSection) -> Objective:
    """The objective of a config. Raises ValueError for an unknown name."""
    total = section.total_chunk_size
    return replace(
        resolve(section.name),
        z_loss=section.z_loss,
        label_smoothing=section.label_smoothing,
        chunk=section.chunk_size if total is None else power_of_two(total),
    )


def build_step(
    config: Config, model: Model, program: Program, device: torch.device | None = None
) -> tuple[Step, State]:
    """The step of a config and the state before it; `device`: where it is computed, default where parameters lie."""
    optimizer, guard = build_optimizer(config, program.specs, device), build_guard(config)
    objective, rate = build_objective(config.objective), build_schedule(config)
    step = make_step(
        model.family, model.cfg, program, objective, optimizer, schedule=rate, guard=guard, seed=config.train.seed
    )
    return step, init_state(model.params, optimizer, program.specs, guard, device)
