"""Parameters on the host: what is copied when, that only copies touch them, and that nothing changes by it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfn import tree
from mmfn.batch import to
from mmfn.ops import call_layer, run_stack
from mmfn.parallel.mesh.layout import Layout, Mesh, single_mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.parallel.program import Program, pipe
from mmfn.parallel.transforms.offload import offload
from mmfn.parallel.transforms.remat import remat
from mmfn.parallel.weights.gather import Gather, enter
from mmfn.parallel.weights.host_memory import Arrival, HostMemory
from mmfn.parallel.weights.hosted import copy_of, fetch_in_graph, handles, host_copy, to_device, to_host
from mmfn.parallel.weights.prefetch import wrap_stack_with_gather, wrap_stack_with_prefetch
from mmfn.parallel.weights.recompute import Recomputed
from mmfn.parallel.weights.sharding import local, shard_params
from mmfn.spec import ONES, num_params, spec
from mmfn.train import optim
from mmfn.train.planning import step_trace
from mmfn.train.schedule import schedule
from mmfn.train.step import init_state, make_step
from tests import tiny
from tests.parallel import conformance
from tests.parallel.allocated import allocated_peak
from tests.parallel.conformance import Cell
from tests.parallel.plan_cases import make

CPU = torch.device("cpu")
T, D = 3, 4
SPECS = {"w": spec((D, D), "mlp embed", ONES), "b": spec((D,), "embed", ONES)}


def block_params(index: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(index)
    return {name: torch.randn(s.shape, generator=g, dtype=torch.float64) for name, s in SPECS.items()}


def given(params: Any, gather: Gather) -> tuple[Any, list[Tensor]]:
    """Blocks of `SPECS` as a step hands them to `gather`, and the handles it differentiates."""
    stands = tree.map(lambda x: x.detach().requires_grad_(), handles(params, CPU))
    places = [gather.place(SPECS[path.rpartition("/")[2]], path) for path in tree.paths(params)]
    weights = enter(stands, params, places=places, dtypes=[None] * len(places), is_hosted=True)
    return weights, tree.leaves(stands)


# ---- leaves


@pytest.mark.parametrize("memory", [HostMemory(), None], ids=["copies", "operators"])
@pytest.mark.parametrize("layout", [Layout(), Layout(dp=2), Layout(replicate=2, dp=3)], ids=str)
def test_what_is_gathered_and_its_gradient(layout: Layout, memory: HostMemory | None) -> None:
    whole = block_params(0)

    def run(mesh: Mesh) -> None:
        params = whole if layout.world == 1 else shard_params(whole, SPECS, mesh)
        plain = tree.map(lambda x: x.detach().requires_grad_(), params)
        given_leaves, stands = given(params, Gather(mesh=mesh))
        results = []
        for leaves, inputs in ((plain, tree.leaves(plain)), (given_leaves, stands)):
            out = replace(Gather(mesh=mesh), memory=None if inputs is not stands else memory)(leaves)
            total = (out["w"] * whole["w"].sin()).sum() + (out["b"].exp()).sum()
            results.append((tree.leaves(out), [local(g) for g in torch.autograd.grad(total, inputs)]))
        for want, got in zip(results[0][0] + results[0][1], results[1][0] + results[1][1], strict=True):
            assert torch.equal(want, got)
            assert want.dtype == got.dtype
        for leaf, copy in zip(tree.leaves(params), results[1][0], strict=True):
            assert local(leaf).untyped_storage()._cdata != copy.untyped_storage()._cdata

    virtual(layout, run)


def test_frozen_leaves_and_dtypes() -> None:
    params = block_params(0)
    stands = {"w": handles(params["w"], CPU).detach().requires_grad_(), "b": handles(params["b"], CPU)}
    for memory in (HostMemory(), None):
        dtypes = [torch.float32, None]  # "b" before "w"
        leaves = enter(stands, params, places=[None, None], dtypes=dtypes, is_hosted=True)
        out = Gather(mesh=single_mesh(), compute=torch.float16, memory=memory)(leaves)
        assert {name: x.dtype for name, x in out.items()} == {"b": torch.float32, "w": torch.float16}
        assert {name: x.requires_grad for name, x in out.items()} == {"b": False, "w": True}
        (grad,) = torch.autograd.grad(out["w"].sum(), stands["w"])
        assert torch.equal(grad, torch.ones_like(params["w"]))


def test_a_handle_has_the_memory_of_one_value() -> None:
    x = handles({"x": torch.ones(5, 7, dtype=torch.bfloat16)}, CPU)["x"]
    assert (x.shape, x.dtype, x.untyped_storage().nbytes()) == ((5, 7), torch.bfloat16, 2)


def test_the_operator_of_graphs() -> None:
    handle = torch.empty(()).expand(3, 2).detach().requires_grad_()
    torch.library.opcheck(fetch_in_graph, (handle, torch.ones(3, 2)))


def test_places_on_a_machine_without_a_device() -> None:
    params = block_params(0)
    for moved in (to_host(params, CPU), to_device(params, CPU)):
        assert all(x is y for x, y in zip(tree.leaves(moved), tree.leaves(params), strict=True))
    for make_copy in (copy_of, lambda leaf: host_copy(leaf, CPU)):
        assert torch.equal(make_copy(params["w"]), params["w"])
        assert make_copy(params["w"]).data_ptr() != params["w"].data_ptr()


# ---- order


@dataclass(eq=False)
class Watched(HostMemory):
    """Host memory that writes down which blocks are copied."""

    block_of: dict[int, int] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Arrival:
        blocks = {self.block_of[source.data_ptr()] for _, source in pairs}
        assert len(pairs) == len(SPECS) * len(blocks)
        self.log += [f"c{i}" for i in blocks]
        return super().copy(pairs)


ORDERS: dict[str, tuple[bool, bool, bool, int, str]] = {
    # prefetch, remat, keep gathered, ranks -> copies (c) and runs (r) of three blocks, forward and backward
    "plain": (False, False, False, 1, "c0 r0 c1 r1 c2 r2"),
    "ahead": (True, False, False, 1, "c0 c1 r0 c2 r1 r2"),
    "remat": (False, True, False, 1, "c0 r0 c1 r1 c2 r2 | c2 r2 c1 r1 c0 r0"),
    "remat, ahead": (True, True, False, 1, "c0 c1 r0 c2 r1 r2 | c2 c1 r2 c0 r1 r0"),
    "remat, kept": (True, True, True, 1, "c0 c1 r0 c2 r1 r2 | r2 r1 r0"),
    "ranks": (False, True, False, 2, "c0 r0 c1 r1 c2 r2 | c2 r2 c1 r1 c0 r0"),
    "ranks, ahead": (True, True, False, 2, "c0 c1 c2 r0 r1 r2 | c2 c1 c0 r2 r1 r0"),
}


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_copies(name: str) -> None:
    is_ahead, is_again, is_kept, num_ranks, want = ORDERS[name]
    layout = Layout(dp=num_ranks)
    whole = [block_params(i) for i in range(3)]

    def run(mesh: Mesh) -> list[str]:
        params = whole if num_ranks == 1 else [shard_params(x, SPECS, mesh) for x in whole]
        memory = Watched()
        memory.block_of = {local(x).data_ptr(): i for i, own in enumerate(params) for x in tree.leaves(own)}
        gather = Gather(mesh=mesh, memory=memory)

        def block(own: Any, x_TD: Tensor) -> tuple[Tensor, None]:
            own = gather(own)
            memory.log.append(f"r{[torch.equal(own['w'], w['w']) for w in whole].index(True)}")
            return torch.tanh(x_TD @ own["w"] + own["b"]), None

        stack = wrap_stack_with_prefetch(run_stack, gather, in_backward=not is_kept) if is_ahead else run_stack
        stack = wrap_stack_with_gather(stack, gather) if is_kept else stack
        leaves, stands = given(params, gather)
        x_TD = torch.linspace(-1, 1, T * D, dtype=torch.float64).view(T, D).requires_grad_()
        y_TD, *_ = stack(call_layer, Recomputed(block) if is_again else block, leaves, x_TD)
        memory.log.append("|")
        torch.autograd.grad(y_TD.square().sum(), [x_TD, *stands])
        return memory.log

    for log in virtual(layout, run):
        assert " ".join(log).removesuffix(" |") == want


# ---- plans


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


# ---- a device that is not the host


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
