"""`mmfn plan`: from a config to a plan, or to the plans of all layouts that a model can take on so many ranks."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mmfn.interop.checkpoint import read_config
from mmfn.models import Family, family
from mmfn.parallel.devices import device
from mmfn.parallel.mesh import Layout, Mesh
from mmfn.parallel.plan import Plan, size
from mmfn.parallel.program import Program
from mmfn.parallel.split import segment_multiple
from mmfn.parallel.trace import Recorder, recording_mesh
from mmfn.train import setup as training
from mmfn.train.config import load_config
from mmfn.train.plan import Setup, Workload, plan
from mmfn.train.recipe import build_optimizer
from mmfn.train.sections import Config, LayoutSection

SHARDS = (1, 2, 4, 8, 16)  # of a search: parameters are whole on a world's 1, 1/2, 1/4, ... of the ranks
CP_SIZES = (1, 2, 4, 8)
BARE = """\
data: {train: unused, token_buckets: [1], patch_buckets: [1]}
optimizer: {lr: 1e-5}
train: {steps: 1}
output: {path: unused}
"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to plan: a config, the device, and what every rank is given in a step."""

    config: Config
    device: str
    workload: Workload
    title: str
    all_layers: bool = False


def read(path: str, overrides: Sequence[str]) -> Config:
    """A run's YAML file, or a bare `config.json`: then the settings that a plan does not read are filled in."""
    if not path.endswith(".json"):
        return load_config(path, overrides).config
    if Path(path).name != "config.json":
        raise ValueError(f"{path!r} is read as a model's config.json; give a file of that name, or a run's YAML file")
    with TemporaryDirectory() as folder:
        bare = Path(folder) / "config.yaml"
        bare.write_text(BARE, encoding="utf-8")
        return load_config(bare, [f"model.path={Path(path).parent}", *overrides]).config


def with_world(config: Config, world: int | None) -> Config:
    """The config with dp set so that the layout has `world` ranks. Raises ValueError where none does."""
    layout = config.layout
    if world is None or layout.world == world:
        return config
    others = layout.replicate * layout.cp
    if world < 1 or world % others:
        raise ValueError(f"world {world} is no multiple of replicate * cp = {others}; change one of them")
    return _with_layout(config, {**layout.model_dump(exclude_unset=True), "dp": world // others})


def plan_config(request: Request) -> Plan:
    """The plan of a config's layout."""
    setup, layout = make_setup(request)
    return plan(setup, layout, device(request.device), title=request.title, all_layers=request.all_layers)


def make_setup(request: Request) -> tuple[Setup, Layout]:
    """The step of a config, from its `config.json` alone."""
    config = request.config
    found, cfg = _model(config)
    layout = training.layout_of(config.layout)
    eager = config.model_copy(update={"train": config.train.model_copy(update={"compile": "none"})})

    specs = training.model_specs(config, found, cfg)

    def build(shallow: Any, mesh: Mesh) -> Program:
        blocks = specs["text"]["layers"][: shallow.num_layers]
        own = {**specs, "text": {**specs["text"], "layers": blocks}}
        return training.build_program(eager, found, shallow, mesh, own)

    setup = Setup(
        family=found,
        cfg=cfg,
        build=build,
        optimizer=build_optimizer(without_rules(config), specs),
        workload=replace(request.workload, segment_multiple=segment_multiple(config.layout.kind, layout)),
        dtype=getattr(torch, config.model.dtype),
        objective=training.build_objective(config.objective),
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


def search(
    request: Request, world: int, jobs: int | None = None, say: Callable[[str], None] = lambda line: None
) -> list[Plan]:
    """Plans of all layouts of `world` ranks that the model can take; those that fit first, then by predicted time.

    Tokens per rank are the same for all, so the time of a step compares them. `jobs`: processes, default one per core.
    `say` is given a line before the work. Raises ValueError where there is no layout.
    """
    found = [replace(request, config=config) for config in candidates(request.config, world)]
    if not found:
        raise ValueError(
            f"no layout of {world} ranks fits this model and the config's own layout settings; change one of them"
        )
    jobs = jobs or os.cpu_count() or 1
    say(f"planning {len(found)} layouts of {world} ranks in {jobs} processes; layout settings that are given are kept")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_thread) as pool:
        plans = list(pool.map(plan_config, found))
    return sorted(plans, key=lambda p: (not p.fits, p.time.total_s))


def candidates(config: Config, world: int) -> Iterator[Config]:
    """Configs that differ in their layout only, each one that the program accepts.

    A layout setting that the config gives is kept, but for dp, which makes the world.
    """
    family_, cfg = _model(config)
    given = config.layout.model_dump(exclude_unset=True)
    given.pop("dp", None)
    seen = []
    for values in _layouts(world, getattr(cfg, "moe", None)):
        try:
            chosen = _with_layout(config, {**values, **given})
            if chosen.layout in seen or chosen.layout.world != world:
                continue
            seen.append(chosen.layout)
            layout = training.layout_of(chosen.layout)
            training.build_program(chosen, family_, cfg, recording_mesh(layout, 0, Recorder(is_fake=True)))
        except ValueError:
            continue  # what a layout or a model refuses is no candidate
        yield chosen


def summary(plans: Sequence[Plan]) -> str:
    """One line per plan, best first."""
    head = f"{'step':>9}  {'MFU':>6}  {'peak':>12}  layout"
    lines = [head]
    for p in plans:
        how = ", ".join([str(Layout(**p.layout)), *(n for n in p.notes if n.startswith(("context", "remat")))])
        fits = "" if p.fits else f"  (does not fit {p.device})"
        lines.append(f"{p.time.total_s:8.3f}s  {p.time.mfu:6.1%}  {size(p.peak_bytes):>12}  {how}{fits}")
    return "\n".join(lines)


def _layouts(world: int, moe: Any) -> Iterator[dict[str, Any]]:
    for part in SHARDS:
        shard, rest = divmod(world, part)
        if rest:
            continue
        for cp in (n for n in CP_SIZES if shard % n == 0):
            kinds: list[dict[str, Any]] = [{"kind": k} for k in ("gather", "ulysses", "ring")] if cp > 1 else [{}]
            kinds += [{"kind": "usp", "ulysses": 2}] if cp > 2 else []
            experts = [n for n in (1, 8, 16, 32) if moe is not None and moe.num_experts % n == 0] or [1]
            for kind in kinds:
                for ep in (n for n in experts if shard % n == 0):
                    for remat in ("none", "full"):
                        yield {"replicate": part, "dp": shard // cp, "cp": cp, "ep": ep, "remat": remat, **kind}


def _with_layout(config: Config, values: dict[str, Any]) -> Config:
    return config.model_copy(update={"layout": LayoutSection.model_validate(values)})


def _model(config: Config) -> tuple[Family, Any]:
    hf = read_config(Path(config.model.path))
    found = family(str(hf.get("model_type")))
    return found, found.config_from_hf(hf)


def _one_thread() -> None:
    torch.set_num_threads(1)
