"""Shards, buckets and the gather hook: what is gathered is whole, gradients are sums over ranks, and how many calls."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from mmfn import tree
from mmfn.ops import run_stack
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.layout import Layout, Mesh
from mmfn.parallel.mesh.virtual import run_virtual, virtual
from mmfn.parallel.planning.alike import recording_mesh
from mmfn.parallel.program import Program, lower, pipe
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.offload import offload
from mmfn.parallel.transforms.remat import remat
from mmfn.parallel.weights.buckets import Bucket, Cut, Like
from mmfn.parallel.weights.gather import Gather
from mmfn.parallel.weights.sharding import like, local, rows, shard, shard_params, sharding_of, whole_params
from mmfn.spec import ZEROS, spec
from tests.parallel.conformance import Cell, run_cell

SPECS = {
    "big": spec((7, 3), "mlp embed", ZEROS),
    "bias": spec((2,), "embed", ZEROS),  # fewer rows than ranks
    "experts": {"up": spec((4, 5, 3), "experts mlp embed", ZEROS), "down": spec((4, 3, 5), "experts embed mlp", ZEROS)},
    "scalar": spec((1,), "embed", ZEROS),
}
LAYOUTS = [Layout(dp=2), Layout(dp=3), Layout(replicate=2), Layout(replicate=2, dp=2, ep=2), Layout(dp=4, cp=2, ep=4)]


def draw(seed: int) -> Any:
    g = torch.Generator().manual_seed(seed)
    return tree.map(lambda s: torch.randn(s.shape, generator=g, dtype=torch.float64), SPECS)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_shards_join_to_the_whole(layout: Layout) -> None:
    params = draw(0)

    def run(mesh: Mesh) -> Any:
        sharded = shard_params(params, SPECS, mesh)
        for leaf in tree.leaves(sharded):
            assert isinstance(leaf, DTensor)
            assert local(leaf).is_contiguous()
        return tree.map(lambda x: local(x).shape, sharded), whole_params(sharded, mesh)

    for rank, (shapes, back) in enumerate(virtual(layout, run)):
        for want, got in zip(tree.leaves(params), tree.leaves(back), strict=True):
            assert torch.equal(want, got), rank
        start, stop = rows(7, layout.shard, rank % layout.shard)
        assert shapes["big"] == (stop - start, 3)


def test_placements() -> None:
    def run(mesh: Mesh) -> None:
        sharded = shard_params(draw(0), SPECS, mesh)
        assert sharded["big"].placements == (Replicate(), Shard(0))
        assert sharded["experts"]["up"].placements == (Replicate(), Shard(1), Shard(0))
        assert str(sharding_of(SPECS["big"], mesh)) == "shard on dim 0"
        assert str(sharding_of(SPECS["experts"]["up"], mesh)) == "edp on dim 1 and ep on dim 0"
        leaf = sharded["big"]
        assert like(local(leaf), leaf) is leaf
        assert torch.equal(local(like(local(leaf) + 1, leaf)), local(leaf) + 1)
        plain = torch.ones(2)
        assert local(plain) is plain
        assert like(plain, plain) is plain

    virtual(Layout(replicate=2, dp=4, ep=2), run)


@pytest.mark.parametrize("shape", [(7, 3), (2,), (6, 4, 5), (1, 2), (9, 1, 2)])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_cut_and_its_inverses(shape: tuple[int, ...], size: int) -> None:
    x = torch.randn(shape)
    for dim in range(len(shape)):
        cut = Cut(shape=shape, dim=dim, size=size)
        shards = []
        for i in range(size):
            start, stop = rows(shape[dim], size, i)
            shards.append(x.narrow(dim, start, stop - start))
        parts = torch.stack([cut.pack(s) for s in shards])
        assert torch.equal(cut.join(parts), x)
        assert torch.equal(cut.split(x), parts)
        sent = torch.full((size, cut.numel + 2), torch.nan, dtype=torch.float64)
        cut.split_(sent[:, 1:-1], x)
        assert torch.equal(sent[:, 1:-1], parts.double())
        assert sent[:, [0, -1]].isnan().all()
        for s, flat in zip(shards, parts, strict=True):
            assert torch.equal(cut.unpack(flat, s.shape[dim]), s)


class Made(TorchDispatchMode):
    """The sizes of the tensors that operators make, not counting views and what is written in place."""

    is_eager = True

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.known |= {x.untyped_storage()._cdata for x in tree.leaves(args) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree.leaves(out) if x.untyped_storage()._cdata not in self.known]
        self.known |= {x.untyped_storage()._cdata for x in made}
        self.sizes += [x.numel() for x in made]
        return out


def test_gradients_are_cast_and_packed_into_what_is_sent_at_once() -> None:
    shapes, axis = [(7, 3), (2,), (4, 5, 3)], Axis(name="own")
    cuts = tuple(Cut(shape=shape, dim=len(shape) // 3, size=1) for shape in shapes)
    bucket = Bucket(axis=axis, replicate=axis, cuts=cuts, compute=torch.bfloat16, reduce=torch.float32)
    grads = [torch.randn(7, 3).bfloat16().t().contiguous().t(), None, torch.randn(4, 5, 3).bfloat16()]
    like = [Like(shape[cut.dim], torch.float32, torch.device("cpu")) for shape, cut in zip(shapes, cuts, strict=True)]
    with Made() as made:
        found = bucket.sum_gradients(grads, like)
    assert made.sizes == [21 + 2 + 60]
    for grad, shape, own in zip(grads, shapes, found, strict=True):
        assert torch.equal(own, torch.zeros(shape) if grad is None else grad.float())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gather_and_its_gradient(layout: Layout) -> None:
    """Rank r's loss is `sum(whole * weights_r)`: a gradient is the sum of weights over the ranks that use the leaf."""
    params, weights = draw(0), [draw(1 + r) for r in range(layout.world)]

    def run(mesh: Mesh) -> tuple[Any, Any]:
        gather = Gather(mesh=mesh)
        leaves = tree.map(lambda x: x.detach().requires_grad_(), shard_params(params, SPECS, mesh))
        out = gather(leaves)
        own = weights[mesh["world"].index]
        ep = mesh["ep"]
        own = {**own, "experts": {k: w.chunk(ep.size)[ep.index] for k, w in own["experts"].items()}}
        loss = sum((x * w).sum() for x, w in zip(tree.leaves(out), tree.leaves(own), strict=True))
        grads = torch.autograd.grad(loss, tree.leaves(leaves))
        for grad, leaf in zip(grads, tree.leaves(leaves), strict=True):
            assert isinstance(grad, DTensor)
            assert (grad.placements, grad.shape) == (leaf.placements, leaf.shape)
            assert grad.to_local().shape == leaf.to_local().shape
            assert grad.to_local().is_contiguous(), "an update would copy it, and those of all leaves at once"
        grads = tree.unflatten(tree.flatten(leaves)[1], grads)
        return tree.map(lambda x: x.detach(), out), whole_params(grads, mesh)

    total = tree.map(lambda *ws: torch.stack(ws).sum(0), *weights)
    for rank, (out, grads) in enumerate(virtual(layout, run)):
        place = rank % layout.shard % layout.ep
        for name in ("big", "bias", "scalar"):
            assert torch.equal(out[name], params[name])
            torch.testing.assert_close(grads[name], total[name], rtol=1e-13, atol=1e-13)
        for name, want in params["experts"].items():
            assert torch.equal(out["experts"][name], want.chunk(layout.ep)[place])
            # an expert is used by the ranks of one ep index: their weights for it, and no others
            users = [w["experts"][name] for r, w in enumerate(weights)]
            parts = []
            for index in range(layout.ep):
                mine = [
                    users[r].chunk(layout.ep)[index]
                    for r in range(layout.world)
                    if r % layout.shard % layout.ep == index
                ]
                parts.append(torch.stack(mine).sum(0))
            torch.testing.assert_close(grads["experts"][name], torch.cat(parts), rtol=1e-13, atol=1e-13)


def test_a_bucket_per_mesh_dtype_and_need_of_a_gradient() -> None:
    params = draw(0)
    params["bias"] = params["bias"].float()

    def run(mesh: Mesh) -> None:
        leaves = shard_params(params, SPECS, mesh)
        leaves = tree.map_with_path(lambda path, x: x.detach().requires_grad_(path != "scalar"), leaves)
        out = Gather(mesh=mesh)(leaves)
        assert not out["scalar"].requires_grad
        used = [x for path, x in tree.items(leaves) if path != "scalar"]
        torch.autograd.grad(sum(x.double().sum() for x in tree.leaves(out)), used)

    world = run_virtual(Layout(replicate=2, dp=4, ep=2), run)
    with_gradient = [("shard", torch.float32), ("shard", torch.float64), ("edp", torch.float64)]  # bias, big, experts
    gathers = [("all_gather", *bucket) for bucket in (*with_gradient, ("shard", torch.float64))]  # and the frozen leaf
    sums = [(name, over or axis, dtype) for axis, dtype in with_gradient for name, over in REDUCTIONS]
    for calls in world.calls:
        found = [(c.name, c.axis, c.dtype) for c in calls]
        assert found[:4] == gathers
        assert sorted(found[4:], key=str) == sorted(sums, key=str)


REDUCTIONS = (("reduce_scatter", None), ("all_reduce", "replicate"))


def test_a_leaf_without_gradient_counts_as_zeros_but_is_reduced() -> None:
    """On one rank the loss misses a leaf; the others' gradients still arrive, and no rank waits in vain."""

    def run(mesh: Mesh) -> Any:
        leaves = tree.map(lambda x: x.detach().requires_grad_(), shard_params(draw(0), SPECS, mesh))
        out = Gather(mesh=mesh)(leaves)
        loss = out["bias"].sum() if mesh["world"].index == 1 else out["big"].sum() + out["bias"].sum()
        big, bias = torch.autograd.grad(loss, [leaves["big"], leaves["bias"]])
        return whole_params({"big": big, "bias": bias}, mesh)

    for grads in virtual(Layout(dp=3), run):
        assert torch.equal(grads["big"], torch.full((7, 3), 2.0, dtype=torch.float64))
        assert torch.equal(grads["bias"], torch.full((2,), 3.0, dtype=torch.float64))


def test_dtypes_of_travel() -> None:
    """Shards travel in the compute dtype and gradients in the reduce dtype; the leaf's own dtype comes back."""

    def run(mesh: Mesh) -> Tensor:
        leaf = shard(torch.full((2,), 1.0), sharding_of(SPECS["bias"], mesh)).requires_grad_()
        out = Gather(mesh=mesh, compute=torch.bfloat16, reduce=torch.float32)({"x": leaf})["x"]
        assert out.dtype == torch.bfloat16
        # in bfloat16 256 + 1 is 256
        (grad,) = torch.autograd.grad((out * (1.0 if mesh["dp"].index else 256.0)).sum(), leaf)
        assert grad.dtype == torch.float32
        return grad.to_local()

    world = run_virtual(Layout(dp=2), run)
    assert all(grad.item() == 257.0 for grad in world.results)
    assert [c.dtype for c in world.calls[0]] == [torch.bfloat16, torch.float32]


# ---- what a stack issues, and when


def block(params: Any, x: Tensor, axis: Axis, gather: Any) -> tuple[Tensor, None]:
    """A block that calls a collective behind its gather, so that the log shows when it ran."""
    w = gather(params)["w"]
    return Mark.apply(x * (w * w).sum(), axis), None


class Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        axis.all_reduce(torch.zeros(1), "block")
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors  # computed again, if need be, before the gradient
        ctx.axis.all_reduce(torch.zeros(1), "gradient")
        return grad * x.exp(), None


RELEASED = data_parallel(reshard_after_forward=True)


def log_of_a_stack(*transforms: Any, num_layers: int = 3) -> str:
    """W a gather of weights, B a block's body, G its gradient, R the reduction of gradients of its weights."""

    def run(mesh: Mesh) -> Tensor:
        program = lower(pipe(Program.of(None, mesh=mesh), *transforms))
        g = torch.Generator().manual_seed(0)
        spec_w = spec((4,), "embed", ZEROS)
        ws = [torch.randn(4, generator=g) / 9 for _ in range(num_layers)]
        layers = [{"w": shard(w, sharding_of(spec_w, mesh)).requires_grad_()} for w in ws]
        x = torch.ones(())
        x, *_ = program.ops.stack(program.ops.layer, block, layers, x, mesh["dp"], program.ops.gather)
        grads = torch.autograd.grad(x, [layer["w"] for layer in layers])
        want = [w.clone().requires_grad_() for w in ws]
        y = torch.ones(())
        for w in want:
            y = (y * (w * w).sum()).exp()
        for grad, expected in zip(grads, torch.autograd.grad(2 * y, want), strict=True):  # two ranks, two losses
            torch.testing.assert_close(grad.to_local(), local(shard(expected, sharding_of(spec_w, mesh))))
        return x.detach()

    world = run_virtual(Layout(dp=2), run)
    letters = {"weights": "W", "block": "B", "gradient": "G", "gradients": "R"}
    logs = {"".join(letters[c.site] for c in calls) for calls in world.calls}
    assert len(logs) == 1
    return logs.pop()


@pytest.mark.parametrize(
    ("transforms", "log"),
    [
        ((data_parallel(prefetch=False),), "WBWBWB GRGRGR"),
        ((data_parallel(),), "WWBWBB GRGRGR"),
        ((data_parallel(prefetch=False), remat("full")), "WBWBWB WBGR WBGR WBGR"),
        # the gather of the block before is under way while a block runs again
        ((data_parallel(), remat("full")), "WWBWBB WWBGR WBGR BGR"),
        ((remat("full"), data_parallel()), "WWBWBB WWBGR WBGR BGR"),
        ((data_parallel(), remat("full", every=2)), "WWBWBB WWBGR GR BGR"),
        ((data_parallel(prefetch=False), remat("full", every=2)), "WBWBWB WBGR GR WBGR"),
        ((data_parallel(keep_gathered=True), remat("full")), "WWBWBB BGR BGR BGR"),
        ((data_parallel(keep_gathered=True, prefetch=False), remat("full")), "WBWBWB BGR BGR BGR"),
        # two blocks and one: of a group the first two are gathered ahead in the forward, its first one in the backward
        ((data_parallel(), remat("uniform", num_layers=2)), "WWBB WB WWBGR BWBGRGR"),
        ((data_parallel(prefetch=False), remat("uniform", num_layers=2)), "WBWB WB WBGR WBWBGRGR"),
        ((data_parallel(keep_gathered=True), remat("uniform", num_layers=2)), "WWBB WB BGR BBGGRR"),
        ((data_parallel(), remat("block", num_layers=2)), "WWBWBB GR WWBGR BGR"),
        ((RELEASED,), "WWBWBB WWGR WGR GR"),
        ((data_parallel(reshard_after_forward=True, prefetch=False),), "WBWBWB GWR GWR GWR"),
        ((RELEASED, remat("full", every=2)), "WWBWBB WWBGR WGR BGR"),
        ((RELEASED, remat("full")), "WWBWBB WWBGR WBGR BGR"),
        ((RELEASED, offload("activations")), "WWBWBB WWGR WGR GR"),
    ],
)
def test_order_of_gathers(transforms: Sequence[Any], log: str) -> None:
    assert log_of_a_stack(*transforms) == log.replace(" ", "")


def test_blocks_that_are_alike_are_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Per program, whatever the number of blocks, passes and micro-batches; shapes and needs tell them apart."""
    made: list[int] = []
    make_plan = Gather._make_plan
    monkeypatch.setattr(Gather, "_make_plan", lambda self, ws: made.append(len(ws)) or make_plan(self, ws))
    specs = [{"w": spec((n, 2), "mlp embed", ZEROS), "b": spec((n,), "mlp", ZEROS)} for n in (4, 4, 4, 6)]

    mesh = recording_mesh(Layout(dp=2), 0)
    program = lower(pipe(Program.of(specs, mesh=mesh), data_parallel()))
    whole = tree.map(lambda leaf: torch.ones(leaf.shape), specs)
    params = tree.map(lambda x: x.detach().requires_grad_(), shard_params(whole, specs, mesh))
    for _ in range(2):
        layers, x = program.enter(params, params), torch.ones(())
        x, *_ = program.ops.stack(program.ops.layer, block, layers, x, mesh["dp"], program.ops.gather)
        torch.autograd.grad(x, [layer["w"] for layer in params])
    assert made == [2, 2]
    params[1]["b"] = params[1]["b"].detach()
    program.ops.gather(program.enter(params, params)[1])
    assert made == [2, 2, 2]


PER_LAYER = {
    "released": ((RELEASED,), 2, 1),
    "plain": ((data_parallel(),), 1, 1),
    "no prefetch": ((data_parallel(prefetch=False),), 1, 1),
    "remat": ((data_parallel(), remat("full")), 2, 1),
    "keep gathered": ((data_parallel(keep_gathered=True), remat("full")), 1, 1),
}


@pytest.mark.parametrize("name", PER_LAYER)
def test_collectives_of_one_more_decoder_layer(name: str) -> None:
    """A deeper model costs, per layer, one gather (two with remat) and one reduce-scatter, and no other collective."""
    transforms, num_gathers, num_sums = PER_LAYER[name]

    def count(num_layers: int) -> dict[tuple[str, str], int]:
        world = run_cell(
            Cell(layout=Layout(dp=2), name=name, transforms=transforms, batch="text", num_layers=num_layers)
        )
        calls = [(c.name, c.site) for c in world.calls[0] if c.site != "whole"]
        return {key: calls.count(key) for key in calls}

    shallow, deep = count(1), count(3)
    assert shallow.keys() == deep.keys()
    more = {key: deep[key] - shallow[key] for key in deep if deep[key] != shallow[key]}
    assert more == {("all_gather", "weights"): 2 * num_gathers, ("reduce_scatter", "gradients"): 2 * num_sums}


def test_the_hook_is_the_identity_on_one_device() -> None:
    program = lower(pipe(Program.of(None), data_parallel()))
    assert program.ops.stack is run_stack
    params = {"w": torch.ones(2)}
    assert program.ops.gather(params) is params
    with pytest.raises(ValueError, match=r"layout dp 2: no transform takes care of dp; add data_parallel\(\)"):
        virtual(Layout(dp=2), lambda mesh: lower(Program.of(None, mesh=mesh)))
