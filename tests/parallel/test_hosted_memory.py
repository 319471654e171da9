"""Memory with parameters on the host: what a plan says, what the allocator says, and what a GPU says."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfn import tree
from mmfn.batch import to
from mmfn.parallel.mesh.layout import Layout
from mmfn.parallel.program import Program, pipe
from mmfn.parallel.transforms.offload import offload
from mmfn.parallel.transforms.remat import remat
from mmfn.parallel.weights.hosted import to_device
from mmfn.spec import num_params
from mmfn.train import optim
from mmfn.train.planning import step_trace
from mmfn.train.schedule import schedule
from mmfn.train.step import init_state, make_step
from tests import tiny
from tests.parallel import conformance
from tests.parallel.allocated import allocated_peak
from tests.parallel.conformance import Cell
from tests.parallel.plan_cases import make


def test_the_device_holds_two_blocks_in_place_of_all_parameters() -> None:
    """With remat, in every stretch of the text's blocks that have one ahead; the host holds all, to the byte."""
    traces = []
    for what in ((), ("parameters",)):
        setup, layout = make(layers=6, offload=what, remat="full")
        step_trace.trace_step(setup, layout, 6)  # caches of attention
        traces.append(step_trace.trace_step(setup, layout, 6))
    specs = setup.family.specs(setup.cfg)
    mergers = {"merger": specs["vision"]["merger"], "deepstack": specs["vision"]["deepstack"]}
    saved = [leaf for path, leaf in tree.items(mergers) if not re.fullmatch(r".*/(up|down)/bias", path)]
    fetched = 4 * (2 * num_params(specs["text"]["layers"][0]) + num_params(saved))
    num_bytes, stands = 4 * num_params(specs), 4 * len(tree.leaves(specs))
    assert [trace.host_bytes for trace in traces] == [0, num_bytes]
    assert traces[0].peaks.keys() == traces[1].peaks.keys()
    inner = [mark for mark in traces[0].peaks if mark[0] != "update" and setup.cfg.vision.depth < mark[2] < 7]
    assert len(inner) == 8
    for mark in traces[0].peaks:
        plain, moved = (trace.peaks[mark] for trace in traces)
        if mark[0] != "update":
            assert plain.parts["parameters"] == num_bytes
            assert not moved.parts.get("parameters")
        if mark in inner:
            assert moved.parts["gathered weights"] == fetched
            fall, least = plain.total - moved.total, num_bytes - fetched - stands
            assert fall == least if mark[0] == "forward" else fall >= least


@pytest.mark.parametrize(
    "chosen", [{}, {"dp": 2}, {"prefetch": False}, {"keep_gathered": True}], ids=lambda chosen: str(chosen)
)
def test_device_memory_falls_by_what_is_planned(chosen: dict[str, Any]) -> None:
    """The allocator's peaks of a step on real tensors, what lies on the host aside, with and without."""
    planned, measured = [], []
    for what in ([], ["parameters"]):
        own = chosen if what or "dp" in chosen else {}
        setup, layout = make(layers=6, offload=what, remat="full", **own)
        step_trace.trace_step(setup, layout, 6)  # caches of attention
        planned.append(step_trace.trace_step(setup, layout, 6))
        measured.append(sum(allocated_peak(setup, layout)))
    saved = planned[0].peak.total - planned[1].peak.total
    assert saved == pytest.approx(measured[0] - measured[1], rel=0.01)
    assert 0 < saved < planned[1].host_bytes


@pytest.fixture
def any_order() -> Any:
    """Deterministic mode refuses some kernels of a GPU."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


@pytest.mark.gpu
@pytest.mark.usefixtures("any_order")
@pytest.mark.parametrize("policy", ["none", "full"])
def test_on_a_gpu(policy: str) -> None:
    """The same numbers from pinned memory, and a peak lower by all parameters but those of a few blocks."""
    device = torch.device("cuda")
    model = tiny.model_of("dense", 12)
    params = tree.map(Tensor.float, model.params)
    cell = Cell(layout=Layout(), name="gpu", transforms=(), num_layers=12)
    batch = to(conformance.batch_of(cell), device, torch.float32)
    batch = replace(batch, weights_T=batch.weights_T.float())
    rate = schedule("constant", peak=1e-2, num_steps=1)
    results, peaks = [], []
    for is_moved in (False, True):
        adamw = optim.adamw(eps=1e-3, weight_decay=0.1)  # smooth where gradients are tiny
        writer = optim.on_host(adamw, 2**10, what=("parameters", "optimizer"), device=device) if is_moved else adamw
        transforms = [remat(policy), *([offload("parameters")] if is_moved else [])]
        program = pipe(Program.of(model.family.specs(model.cfg)), *transforms)
        optimizer = optim.chain(optim.clip_by_global_norm(1.0), writer)
        step = make_step(model.family, model.cfg, program, "per_token_loss", optimizer, schedule=rate)
        own = tree.map(torch.clone, params) if is_moved else to_device(params, device)
        state = init_state(own, optimizer, device=device)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            state, metrics = step(state, [batch])
            torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated())
        if is_moved:
            moments = [x for x in tree.leaves(state["opt"]) if x.ndim]
            assert all(x.is_pinned() for x in (*tree.leaves(state["params"]), *moments))
        results.append([*tree.leaves(to_device(state["params"], torch.device("cpu"))), metrics["loss"].cpu()])
        del state, metrics, step, own
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.cpu(), want.cpu(), rtol=1e-5, atol=1e-5)
    if policy == "full":
        assert peaks[1] < peaks[0]
