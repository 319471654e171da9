"""What a plan is asked for: from a config, or a bare `config.json`, to a planned step and its plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mmfn.errors import UserError
from mmfn.parallel.context.token_order import segment_multiple
from mmfn.parallel.mesh.layout import Layout, Mesh
from mmfn.parallel.planning.plan import Plan, size
from mmfn.parallel.program import Program
from mmfn.train.build.checks import with_any_steps
from mmfn.train.build.kernels import planned_ops
from mmfn.train.build.model import check_model, find_family, model_specs
from mmfn.train.build.optimizer import build_optimizer
from mmfn.train.build.program import build_program
from mmfn.train.build.step import build_objective
from mmfn.train.config.load import Loaded, Settings, check, read_settings
from mmfn.train.config.schema import Config
from mmfn.train.planning.device_file import planned_device
from mmfn.train.planning.step_plan import Measured, measure
from mmfn.train.planning.step_trace import PlannedStep
from mmfn.train.planning.workload import Workload, largest_workload

BARE: Mapping[str, Mapping[str, Any]] = {
    "data": {"train": "", "token_buckets": [1], "tower_buckets": {}},
    "optimizer": {"lr": 1e-5},
    "train": {"steps": 1},
    "output": {"path": ""},
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to plan: a config, the device, and what every rank is given in a step."""

    config: Config
    device: str
    workload: Workload
    title: str
    all_layers: bool = False


def read(path: str, overrides: Sequence[str]) -> Settings:
    """A run's YAML file, or a bare `config.json`: then the settings that a plan does not read are filled in.

    Sizes are set by `with_world` or `candidates`, which then check the whole.
    """
    if not path.endswith(".json"):
        return read_settings(path, overrides)
    if Path(path).name != "config.json":
        raise UserError(f"{path!r} is read as a model's config.json; give a file of that name, or a run's YAML file")
    values = {**BARE, "model": {"path": str(Path(path).parent)}}
    return Settings(values=values, path=Path(path), origins={}).overridden(overrides)


def with_world(settings: Settings, world: int | None) -> Loaded:
    """The checked config, with dp set so that its layout has `world` ranks. Raises ValueError where none does."""
    layout_values = settings.values.get("layout", {})
    replicate, cp = (layout_values.get(name, 1) for name in ("replicate", "cp"))
    if world is not None and type(replicate) is type(cp) is int and min(replicate, cp) > 0:  # others `check` refuses
        if world < 1 or world % (replicate * cp):
            raise UserError(f"world {world} is no multiple of replicate * cp = {replicate * cp}; change one of them")
        settings = settings.having("layout", dp=world // (replicate * cp))
    return check(settings, is_plan=True)


def plan_config(request: Request) -> Plan:
    """The plan of a config's layout."""
    return measure_config(request).on(planned_device(request.device), request.title)


def measure_config(request: Request) -> Measured:
    """The same on whatever device."""
    setup, layout = planned_step(request)
    return measure(setup, layout, all_layers=request.all_layers)


def run_request(config: Config, device_name: str, title: str = "plan", sample_tokens: int = 4096) -> Request:
    """To plan a config with its own largest buckets (`workload.largest_workload`)."""
    workload = largest_workload(config, *find_family(config.model), sample_tokens)
    return Request(config=config, device=device_name, workload=workload, title=title)


def check_fits(config: Config, device_name: str) -> Plan:
    """The same, which fits the device. Raises ValueError where it does not."""
    found = plan_config(run_request(config, device_name))
    if not found.fits:
        most = max(found.peak_parts, key=lambda name: found.peak_parts[name])
        raise UserError(
            f"layout: a rank needs {size(found.peak_bytes)} but {device_name} has "
            f"{size(found.memory_bytes)}, most of it for {most}; use more ranks, smaller buckets, "
            "layout.remat or layout.offload (mmfn suggest finds which)"
        )
    return found


def planned_step(request: Request) -> tuple[PlannedStep, Layout]:
    """The step of a config, from its `config.json` alone."""
    config = request.config
    model_family, cfg = find_family(config.model)
    layout = config.layout.sizes
    ops = planned_ops(config)
    waits = {"prefetch": False, "sums_under_way": 0} if config.gathers_in_graphs else {}
    eager = config.model_copy(
        update={
            "train": config.train.model_copy(update={"compile": "none"}),
            "layout": config.layout.model_copy(update=waits),
        }
    )

    specs = model_specs(config, model_family, cfg)
    check_model(config, model_family, cfg, is_plan=True)
    build_optimizer(with_any_steps(config), specs)  # refuses the rules that training refuses; the one below has none

    def build(shallow: Any, mesh: Mesh) -> Program:
        *_, (stack, depth) = model_family.stacks(shallow).items()
        part = {**specs[stack], "layers": specs[stack]["layers"][:depth]}
        return build_program(eager, model_family, shallow, mesh, {**specs, stack: part}, ops)

    setup = PlannedStep(
        family=model_family,
        cfg=cfg,
        build=build,
        optimizer=build_optimizer(without_rules(config), specs),
        workload=replace(request.workload, segment_multiple=segment_multiple(config.layout.kind, layout)),
        dtype=getattr(torch, config.model.dtype),
        objective=build_objective(config.objective),
        kernels=config.model.table,
        packages=config.model.kernel_packages,
        is_fused=config.train.compile != "none",
    )
    return setup, layout


def without_rules(config: Config) -> Config:
    """The config without rules for single parameters: they change no shape, and a plan traces a few layers only."""
    plain = {"no_decay": (), "lr_scales": {}, "layer_decay": 1.0}
    return config.model_copy(
        update={
            "optimizer": config.optimizer.model_copy(update=plain),
            "schedule": config.schedule.model_copy(update={"groups": {}}),
        }
    )
