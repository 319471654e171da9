"""From a config to what turns gradients into updates: optimizer, schedule and guard."""

import torch

from mmfn import tree
from mmfn.errors import UserError
from mmfn.train import optim
from mmfn.train.config.learning import OptimizerSection, ScheduleShape
from mmfn.train.config.schema import Config
from mmfn.train.guard import Guard
from mmfn.train.schedule import Schedule, schedule
from mmfn.tree import Tree


def build_optimizer(config: Config, specs: Tree, device: torch.device | None = None) -> optim.Transform:
    """The optimizer for a program's parameters; `device`: where it updates them, default where they lie.

    Raises ValueError for values that do not fit together.
    """
    section = config.optimizer
    _check_patterns(config, specs)
    average = [] if section.ema_decay is None else [optim.ema(section.ema_decay)]
    optimizer = optim.by_path(
        optim.chain(_writer(section, specs), *average),
        no_decay=section.no_decay,
        lr_scales=list(section.lr_scales.items()),
        schedules=[(pattern, _rate(config, group, group.lr)) for pattern, group in config.schedule.groups.items()],
        layer_decay=section.layer_decay,
    )
    clip = [] if section.clip_norm is None else [optim.clip_by_global_norm(section.clip_norm)]
    if config.model.dtype == "bfloat16" and section.master is not False:
        optimizer = optim.master(optimizer)
    if what := set(config.layout.offload) & set(optim.HOST_KINDS):
        optimizer = optim.on_host(optimizer, what=what, device=device)
    return optim.chain(*clip, optimizer)


def build_schedule(config: Config) -> Schedule:
    """The learning rate of parameters without a schedule of their own."""
    return _rate(config, config.schedule, config.optimizer.lr)


def build_guard(config: Config) -> Guard:
    """Which steps are skipped."""
    return Guard(window=config.train.spike_window, factor=config.train.spike_factor)


def _writer(section: OptimizerSection, specs: Tree) -> optim.Transform:
    """What updates parameters."""
    momentum, nesterov, decay = section.momentum, section.nesterov, section.weight_decay
    if section.kind == "sgd":
        return optim.sgd(momentum=momentum, nesterov=nesterov, weight_decay=decay)
    dtype = torch.bfloat16 if section.moments_dtype == "bfloat16" else None
    adamw = optim.adamw(betas=section.betas, eps=section.eps, weight_decay=decay, moments_dtype=dtype)
    if section.kind == "adamw":
        return adamw
    muon = optim.muon(
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=decay,
        adjust_lr=section.adjust_lr,
        compute=getattr(torch, section.muon_dtype),
    )
    return optim.with_others(muon, adamw, specs)


def _check_patterns(config: Config, specs: Tree) -> None:
    """Raise ValueError for a pattern that matches no parameter, or none that is trained."""
    settings = {
        "optimizer.no_decay": config.optimizer.no_decay,
        "optimizer.lr_scales": config.optimizer.lr_scales,
        "schedule.groups": config.schedule.groups,
    }
    for setting, patterns in settings.items():
        for pattern in patterns:
            is_matched = tree.leaves(tree.mask(specs, [(pattern, True)], False))
            if all(leaf.is_frozen for leaf, yes in zip(tree.leaves(specs), is_matched, strict=True) if yes):
                raise UserError(f"pattern {pattern!r} matches only frozen parameters; remove it from {setting}")


def _rate(config: Config, section: ScheduleShape, peak: float) -> Schedule:
    return schedule(
        section.kind,
        peak=peak,
        num_steps=config.train.num_steps,
        warmup_steps=section.warmup_steps,
        final_scale=section.final_scale,
    )
