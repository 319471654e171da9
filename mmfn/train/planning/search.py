"""`mmfn plan --search`: the plans of all layouts that a model can take on so many ranks."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from math import gcd
from multiprocessing import resource_tracker
from typing import Any

import torch

from mmfn.errors import UserError, spell_count
from mmfn.parallel.mesh.layout import Layout
from mmfn.parallel.planning.alike import recording_mesh
from mmfn.parallel.planning.plan import Plan, size
from mmfn.parallel.weights.sharding import sizes_over
from mmfn.train.build.model import find_family
from mmfn.train.build.program import build_program
from mmfn.train.config.layout import LayoutSection
from mmfn.train.config.load import Settings, check, leave_idle_out
from mmfn.train.config.schema import Config
from mmfn.train.planning.device_file import planned_device
from mmfn.train.planning.request import Request, plan_config, planned_step

SHARDS = (1, 2, 4, 8, 16)  # of a search: parameters are whole on a world's 1, 1/2, 1/4, ... of the ranks
MOST = 480  # layouts of a search: minutes to an hour


def search(
    requests: Sequence[Request], jobs: int | None = None, say: Callable[[str], None] = lambda line: None
) -> list[Plan]:
    """Plans of requests that differ in their layouts; those that fit first, then by predicted time.

    Tokens per rank are the same for all, so the time of a step compares them. `jobs`: processes, default one per core.
    `say` is given a line before the work, and one for each layout that cannot be planned and is left out. Raises
    ValueError where that is all of them. An interrupt ends the processes.
    """
    if not requests:
        raise UserError("a search got no layout to plan; give it those of candidates(settings, world)")
    planned_device(requests[0].device)  # this and the next: what is wrong with any layout is found before work begins
    planned_step(requests[0])
    jobs = min(jobs or os.cpu_count() or 1, len(requests))
    say(
        f"planning {spell_count(len(requests), 'layout')} in {spell_count(jobs, 'process')}; layout settings that are "
        "given are kept"
    )
    with planners(jobs) as submit:
        futures = [submit(request) for request in requests]
        results = [future.result() for future in futures]
    reasons = [(r.config.layout, x) for r, x in zip(requests, results, strict=True) if isinstance(x, str)]
    for layout, reason in reasons:
        say(f"left out {layout.sizes}, remat {layout.remat}: {reason}")
    plans = [x for x in results if isinstance(x, Plan)]
    if not plans:
        raise UserError(f"no layout can be planned: {reasons[0][1]}")
    return sorted(plans, key=lambda p: (not p.fits, p.time.total_s))


def candidates(settings: Settings, world: int, say: Callable[[str], None] = lambda line: None) -> Iterator[Config]:
    """Configs that differ in their layout only, each one that the program accepts; those with small cp * ep first.

    A layout setting that is given is kept, but for dp, which makes the world. `say` is told what is left out: layouts
    that are refused, and those with the largest cp * ep where there are more than `MOST`. Raises ValueError where there
    is none.
    """
    settings, left_out = leave_idle_out(settings)
    for note in left_out:
        say(f"note: {note}")
    fixed = {name: value for name, value in settings.values.get("layout", {}).items() if name != "dp"}
    bare = check(replace(settings, values={**settings.values, "layout": {}}), is_plan=True).config
    model_family, cfg = find_family(bare.model)
    seen: list[LayoutSection] = []
    refusals: list[str] = []
    experts = sizes_over(model_family.specs(cfg), "ep")
    groups = _by_spread(world, gcd(*experts.values()) or 1, fixed)
    for i, (spread, group) in enumerate(groups):
        if len(seen) + len(group) > MOST and seen:
            rest = sum(len(layouts) for _, layouts in groups[i:])
            say(
                f"left out {spell_count(rest, 'layout')} with cp * ep of {spread} and more: a search plans at most "
                f"{MOST}; set layout.cp, layout.ep or layout.replicate to look at them"
            )
            break
        for values in group:
            try:
                loaded = check(settings.having("layout", **values), is_plan=True)
                if loaded.notes:  # what is given has no effect there
                    raise UserError(loaded.notes[0])
                config = loaded.config
                if config.layout in seen or config.layout.world != world:
                    continue
                mesh = recording_mesh(config.layout.sizes, 0)
                build_program(config, model_family, cfg, mesh)
            except UserError as error:
                refusals.append(str(error))
                continue  # what a layout or a model refuses is no candidate
            seen.append(config.layout)
            yield config
    because = f", the first because {refusals[0]}" if refusals else ""
    if not seen:
        raise UserError(
            f"no layout of {spell_count(world, 'rank')} fits this model and the layout settings that are given"
            f"{because}; change one of them"
        )
    if refusals:
        are = "is" if len(refusals) == 1 else "are"
        say(f"left out {spell_count(len(refusals), 'layout')} that {are} refused{because}")


def summary(plans: Sequence[Plan]) -> str:
    """One line per plan, best first."""
    head = f"{'step':>9}  {'HFU':>6}  {'peak':>12}  layout"
    lines = [head]
    for p in plans:
        how = ", ".join([str(Layout(**p.layout)), *(n for n in p.notes if n.startswith(("context", "remat")))])
        fits = "" if p.fits else f"  (does not fit {p.device})"
        lines.append(f"{p.time.total_s:8.3f}s  {p.time.hfu:6.1%}  {size(p.peak_bytes):>12}  {how}{fits}")
    return "\n".join(lines)


def _by_spread(world: int, num_experts: int, fixed: Mapping[str, Any]) -> list[tuple[int, list[dict[str, Any]]]]:
    """All layouts with what is given, in groups of one cp * ep, the smallest first."""
    groups: dict[int, list[dict[str, Any]]] = {}
    every = list(_layouts(world, num_experts))
    fixed_sizes = [(name, fixed[name]) for name in ("replicate", "cp", "ep", "kind") if name in fixed]
    fitting = [values for values in every if all(values.get(name, size) == size for name, size in fixed_sizes)]
    for values in fitting or every:  # none: then each is refused with what is given, and says why
        layout = {**values, **fixed}
        sizes = (layout["cp"], layout["ep"])
        group = groups.setdefault(sizes[0] * sizes[1] if all(type(n) is int for n in sizes) else 0, [])
        if layout not in group:
            group.append(layout)
    return sorted(groups.items())


def _layouts(world: int, num_experts: int) -> Iterator[dict[str, Any]]:
    """Every cp that divides the ranks of a share, and every ep that divides them and the experts."""
    for part in (n for n in SHARDS if world % n == 0):
        shard = world // part
        for cp in _divisors(shard):
            kinds: list[dict[str, Any]] = [{"kind": k} for k in ("gather", "ulysses", "ring")] if cp > 1 else [{}]
            kinds += [{"kind": "usp", "ulysses": 2}] if cp > 2 and cp % 2 == 0 else []
            for kind in kinds:
                for ep in (n for n in _divisors(shard) if num_experts % n == 0):
                    for remat in ("none", "full"):
                        yield {"replicate": part, "dp": shard // cp, "cp": cp, "ep": ep, "remat": remat, **kind}


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@contextmanager
def planners(jobs: int) -> Iterator[Callable[[Request], Future[Plan | str]]]:
    """Processes that plan: a function that gives them a request, whose result is the plan, or why there is none.

    An interrupt ends the processes.
    """
    context, before = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_thread) as pool:

        def submit(request: Request) -> Future[Plan | str]:
            with _interrupts_later():  # a process may start here
                return pool.submit(_plan_or_reason, request)

        try:
            yield submit
        except BaseException:
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()
            raise


def _plan_or_reason(request: Request) -> Plan | str:
    """The plan, or why there is none."""
    try:
        return plan_config(request)
    except UserError as error:
        return str(error)


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """An interrupt of this thread waits until the end; processes started meanwhile never see one."""
    resource_tracker.ensure_running()  # multiprocessing starts it with the first process, and lets interrupts through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _one_thread() -> None:
    torch.set_num_threads(1)
