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
    chosen = config.optimizer
    _check_patterns(config, specs)
    average = [] if chosen.ema_decay is None else [optim.ema(chosen.ema_decay)]
    optimizer = optim.by_path(
        optim.chain(_writer(chosen, specs), *average),
        no_decay=chosen.no_decay,
        lr_scales=list(chosen.lr_scales.items()),
        schedules=[(pattern, _rate(config, group, group.lr)) for pattern, group in config.schedule.groups.items()],
        layer_decay=chosen.layer_decay,
    )
    clip = [] if chosen.clip_norm is None else [optim.clip_by_global_norm(chosen.clip_norm)]
    if config.model.dtype == "bfloat16" and chosen.master is not False:
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


def _writer(chosen: OptimizerSection, specs: Tree) -> optim.Transform:
    """What updates parameters."""
    momentum, nesterov, decay = chosen.momentum, chosen.nesterov, chosen.weight_decay
    if chosen.kind == "sgd":
        return optim.sgd(momentum=momentum, nesterov=nesterov, weight_decay=decay)
    dtype = torch.bfloat16 if chosen.moments_dtype == "bfloat16" else None
    adamw = optim.adamw(betas=chosen.betas, eps=chosen.eps, weight_decay=decay, moments_dtype=dtype)
    if chosen.kind == "adamw":
        return adamw
    muon = optim.muon(
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=decay,
        adjust_lr=chosen.adjust_lr,
        compute=getattr(torch, chosen.muon_dtype),
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


def _rate(config: Config, chosen: ScheduleShape, peak: float) -> Schedule:
    return schedule(
        chosen.kind,
        peak=peak,
        num_steps=config.train.steps,
        warmup_steps=chosen.warmup_steps,
        final_scale=chosen.final_scale,
    )
