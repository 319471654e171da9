"""Offload: what leaves the device and comes back, in which order, and that nothing changes by it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfn.ops import call_layer, run_stack
from mmfn.parallel.mesh.layout import Layout, single_mesh
from mmfn.parallel.program import Program, lower, pipe
from mmfn.parallel.transforms import offload as module
from mmfn.parallel.transforms.compiled import compiled
from mmfn.parallel.transforms.offload import OFFLOAD_KINDS, offload, wrap_stack_with_offload
from mmfn.parallel.transforms.remat import remat
from mmfn.parallel.weights.host_memory import HostMemory
from mmfn.parallel.weights.streams import Arrival
from mmfn.train.planning import step_trace
from tests.parallel.allocated import allocated_peak
from tests.parallel.conformance import Cell, check_outcome, outcome
from tests.parallel.plan_cases import make

T, D = 64, 32  # an activation is 16 KiB in float64


class Watched(HostMemory):
    """Host memory that writes down what is copied."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, int]] = []
        self.hosts: set[int] = set()

    def take(self, x: Tensor) -> Tensor:
        buffer = super().take(x)
        self.hosts.add(buffer.data_ptr())
        return buffer

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Arrival:
        if pairs:
            is_out = pairs[0][0].data_ptr() in self.hosts
            self.log.append(("out" if is_out else "back", sum(to.nbytes for to, _ in pairs)))
        return super().copy(pairs)


def block(params: Any, x_TD: Tensor, *_: Any) -> tuple[Tensor, None]:
    """Keeps x, x @ w and the tanh of it (the last two once each), its parameters and its other arguments aside."""
    return x_TD + torch.tanh(x_TD @ params["w"]).sin(), None


def layers(num: int) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [{"w": torch.randn(D, D, generator=g, dtype=torch.float64).requires_grad_()} for _ in range(num)]


def run(stack: Any, num: int) -> list[Tensor]:
    params, x_TD = layers(num), torch.linspace(-1, 1, T * D, dtype=torch.float64).view(T, D).requires_grad_()
    y_TD, *_ = stack(call_layer, block, params, x_TD, torch.ones(T, D))
    return [y_TD, *torch.autograd.grad(y_TD.square().sum(), [x_TD, *(p["w"] for p in params)])]


def test_order_and_bytes_of_copies_and_reuse_of_buffers() -> None:
    memory = Watched()
    one = T * D * 8
    kept = 2 * one  # x, which is kept for the product with w, and tanh, from which sin and tanh have their gradients
    want = run(run_stack, 4)
    for _ in range(3):
        memory.log.clear()
        for got, expected in zip(run(wrap_stack_with_offload(run_stack, memory), 4), want, strict=True):
            assert torch.equal(got, expected)
        # the last block keeps its own
        assert memory.log == [("out", kept)] * 3 + [("back", kept)] * 3
        buffers = [x for free in memory.free.values() for x in free]
        assert len(buffers) == 3 * kept // one, "buffers are made once"
        assert len({x.data_ptr() for x in buffers}) == len(buffers)


def test_small_tensors_and_those_of_others_stay() -> None:
    memory = Watched()

    def uses_all(params: Any, x_TD: Tensor, other_TD: Tensor) -> tuple[Tensor, None]:
        return (x_TD * other_TD) @ params["w"] * x_TD.mean().exp(), None

    params, x_TD, other_TD = (
        layers(2),
        torch.ones(T, D, dtype=torch.float64).requires_grad_(),
        torch.ones(T, D).double(),
    )
    y_TD, *_ = wrap_stack_with_offload(run_stack, memory)(call_layer, uses_all, params, x_TD, other_TD)
    assert memory.log == [("out", 2 * T * D * 8)]  # x * other and its product with w: neither other nor w nor a scalar
    assert T * D * 8 > module.LEAST_BYTES
    torch.autograd.grad(y_TD.sum(), x_TD)


def test_views_of_one_storage_travel_once_and_a_graph_may_be_used_twice() -> None:
    memory = Watched()

    def views(params: Any, x_TD: Tensor) -> tuple[Tensor, None]:
        a_TD, b_TD = torch.tanh(x_TD @ params["w"]).view(2, T // 2, D).unbind(0)
        return torch.cat([a_TD * b_TD, a_TD.t().contiguous().t()]), None

    results = []
    for stack in (run_stack, wrap_stack_with_offload(run_stack, memory)):
        params, x_TD = layers(3), torch.ones(T, D, dtype=torch.float64).requires_grad_()
        y_TD, *_ = stack(call_layer, views, params, x_TD)
        leaves = [x_TD, *(p["w"] for p in params)]
        results += [torch.autograd.grad(y_TD.sum(), leaves, retain_graph=keep) for keep in (True, False)]
    assert memory.log[0] == ("out", 2 * T * D * 8)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def real_first(h_TD: Tensor) -> Tensor:
    return h_TD * h_TD + twice(torch.view_as_complex(h_TD.view(T, -1, 2)))


def complex_first(h_TD: Tensor) -> Tensor:
    return twice(torch.view_as_complex(h_TD.view(T, -1, 2))) + h_TD * h_TD


def complex_part_of_an_odd_storage(h_TD: Tensor) -> Tensor:
    """The first to be saved begins late, and the storage is no multiple of its elements."""
    h = torch.cat([h_TD.flatten(), h_TD[0, :1]]).sin()  # sin's own gradient needs nothing of h
    part = torch.view_as_complex(h[2:-1].view(-1, 2))
    return h_TD + torch.view_as_real(part * part).sum() + h[1:].square().view(T, D)


def conjugate(h_TD: Tensor) -> Tensor:
    """Saved as it is stored, and as its lazy conjugate, first."""
    c = torch.view_as_complex(h_TD.view(T, -1, 2))
    return twice(c.conj()) + twice(c) + torch.view_as_real(c.exp() * c.conj()).view(T, D)


def negative(h_TD: Tensor) -> Tensor:
    """The imaginary part of a lazy conjugate is a lazy negative."""
    c = torch.view_as_complex(h_TD.view(T, -1, 2))
    return c.conj().imag.square().repeat(1, 2) + twice(c)


def twice(c: Tensor) -> Tensor:
    return torch.view_as_real(c * c).view(T, D)


@pytest.mark.parametrize(
    "mix",
    [real_first, complex_first, complex_part_of_an_odd_storage, conjugate, negative],
    ids=lambda mix: mix.__name__,
)
def test_one_storage_saved_in_several_dtypes(mix: Callable[[Tensor], Tensor]) -> None:
    memory = Watched()

    def mixed(params: Any, x_TD: Tensor) -> tuple[Tensor, None]:
        return torch.tanh(mix(x_TD @ params["w"]) / D), None

    results = []
    for stack in (run_stack, wrap_stack_with_offload(run_stack, memory)):
        params, x_TD = layers(3), torch.linspace(-1, 1, T * D, dtype=torch.float64).view(T, D).requires_grad_()
        y_TD, *_ = stack(call_layer, mixed, params, x_TD)
        results.append([y_TD, *torch.autograd.grad(y_TD.sum(), [x_TD, *(p["w"] for p in params)])])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert [way for way, _ in memory.log] == ["out"] * 2 + ["back"] * 2
    if mix in (real_first, complex_first):
        assert memory.log[0] == ("out", 3 * T * D * 8), "x, its product with w once, and tanh"


def test_a_gradient_that_does_not_come_through_the_last_block() -> None:
    """As that of features tapped on the way."""
    results = []
    for stack in (run_stack, wrap_stack_with_offload(run_stack, Watched())):
        params, x_TD, taps = layers(4), torch.ones(T, D, dtype=torch.float64).requires_grad_(), []
        stack(call_layer, block, params, x_TD, between={1: lambda x, taps=taps: (x, taps.append(x))})
        results.append(torch.autograd.grad(taps[0].sum(), [x_TD, params[0]["w"], params[1]["w"]]))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_without_a_gradient_nothing_is_copied() -> None:
    memory = Watched()
    with torch.no_grad():
        wrap_stack_with_offload(run_stack, memory)(call_layer, block, layers(3), torch.ones(T, D, dtype=torch.float64))
    assert memory.log == []


def test_with_remat_block_inputs_alone_travel() -> None:
    memory = Watched()
    program = pipe(Program.of(None), remat("full"))
    for got, want in zip(run(wrap_stack_with_offload(program.ops.stack, memory), 4), run(run_stack, 4), strict=True):
        assert torch.equal(got, want)
    assert memory.log == [("out", T * D * 8)] * 3 + [("back", T * D * 8)] * 3


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of torch's compiler itself
@pytest.mark.parametrize("policy", ["full", "none"])
def test_compiled_layers(policy: str) -> None:
    transforms = (offload("activations"), remat(policy), compiled("layer", backend="aot_eager"))
    cell = Cell(layout=Layout(), name="compiled", transforms=transforms, num_layers=3)
    check_outcome(cell, outcome(cell, single_mesh()))


@pytest.mark.parametrize(("policy", "least_share"), [("none", 0.7), ("full", 0.3)])
def test_device_memory_falls_by_what_is_planned(policy: str, least_share: float) -> None:
    """The allocator's peaks of a step on real tensors, host buffers aside, with and without."""
    planned, measured = [], []
    for chosen in ([], ["activations"]):
        setup, layout = make(layers=8, offload=chosen, remat=policy)
        setup = replace(setup, workload=replace(setup.workload, tokens=1024, sample_tokens=256))
        step_trace.trace_step(setup, layout, 8)  # caches of attention
        planned.append(step_trace.trace_step(setup, layout, 8))
        measured.append(sum(allocated_peak(setup, layout)))
    plain, moved = planned
    saved = plain.peak.total - moved.peak.total
    assert saved == pytest.approx(measured[0] - measured[1], rel=0.01)
    assert plain.host_bytes == 0
    # of eight blocks that send (seven of the text, one of the tower) one is back at the peak; with remat another peaks
    assert least_share * moved.host_bytes < saved < moved.host_bytes


def test_facts_and_errors() -> None:
    program = pipe(Program.of(None), offload("activations"))
    assert program.is_offloaded
    assert program.notes == ("offload: activations to the host",)
    with pytest.raises(ValueError, match=r"offload\('optimizer'\) is unknown; .* on_host for an optimizer's state"):
        offload("optimizer")
    for what in OFFLOAD_KINDS:
        with pytest.raises(ValueError, match=rf"offload\('{what}'\) moves memory .* use compiled\('layer'\)"):
            lower(pipe(Program.of(None), compiled("step"), offload(what)))
