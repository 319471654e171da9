"""The memory of a step on real tensors, by torch's own allocation events, which know nothing of plans."""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mmfn import tree
from mmfn.parallel.mesh.layout import Layout, Mesh
from mmfn.parallel.planning.alike import recording_mesh
from mmfn.parallel.program import Program
from mmfn.parallel.weights.sharding import local, shard_params
from mmfn.spec import init_params
from mmfn.train.planning import step_trace
from mmfn.train.schedule import schedule
from mmfn.train.step import init_state, make_step


def allocated_peak(setup: step_trace.PlannedStep, layout: Layout) -> tuple[int, int]:
    """The most bytes allocated at a time within the second step, and the bytes held before it.

    By then the buffers of the host have been made, so that they are no part of it.
    """
    mesh = recording_mesh(layout, 0)
    program = setup.build(setup.cfg, mesh)
    program = replace(program, ops=step_trace.balanced(program.ops))
    state, batches = start(setup, program, mesh)
    rate = schedule("constant", peak=1e-3, num_steps=1)
    step = make_step(setup.family, setup.cfg, program, setup.objective, setup.optimizer, schedule=rate)
    state, _ = step(state, batches)
    held = _storages([local(x) for x in (*on_device(state, setup), *tree.leaves(batches))])
    return peak_of(lambda: step(state, batches)), held


def peak_of(fn: Callable[[], Any]) -> int:
    """The most bytes allocated at a time while a function runs; what is left of before is not freed meanwhile.

    On one thread: the CPU's attention has buffers for each, and a plan those of one.
    """
    num_threads = torch.get_num_threads()
    gc.collect()
    gc.disable()
    torch.set_num_threads(1)
    try:
        return _peak_of(fn)
    finally:
        torch.set_num_threads(num_threads)
        gc.enable()


def _peak_of(fn: Callable[[], Any]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        fn()
    alive, most = 0, 0
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def on_device(state: Any, setup: step_trace.PlannedStep) -> list[torch.Tensor]:
    """The leaves of a state that do not lie on the host."""
    away = setup.optimizer.on_host
    opt = [x for x in tree.leaves(state["opt"]) if not ("optimizer" in away and x.ndim)]
    return tree.leaves({**state, "opt": opt, "params": [] if "parameters" in away else state["params"]})


def _storages(tensors: list[torch.Tensor]) -> int:
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())


def start(setup: step_trace.PlannedStep, program: Program, mesh: Mesh) -> tuple[Any, list[Any]]:
    """The state before the first step, and the micro-batches of the rank."""
    params = init_params(program.specs, 0, setup.dtype)
    params = shard_params(params, program.specs, mesh) if mesh.layout.world > 1 else params
    _, shares = step_trace.make_shares(setup, program, is_fake=False)  # each micro-batch in memory of its own
    return init_state(params, setup.optimizer, program.specs), shares
