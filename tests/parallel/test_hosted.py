"""Parameters on the host: what is copied when, that only copies touch them, and that nothing changes by it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfn import tree
from mmfn.ops import call_layer, run_stack
from mmfn.parallel.mesh.layout import Layout, Mesh, single_mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.parallel.weights.gather import Gather, enter
from mmfn.parallel.weights.host_memory import HostMemory
from mmfn.parallel.weights.hosted import copy_of, fetch_in_graph, handles, host_copy, to_device, to_host
from mmfn.parallel.weights.prefetch import wrap_stack_with_gather, wrap_stack_with_prefetch
from mmfn.parallel.weights.recompute import Recomputed
from mmfn.parallel.weights.sharding import local, shard_params
from mmfn.parallel.weights.streams import Arrival
from mmfn.spec import ONES, spec

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
