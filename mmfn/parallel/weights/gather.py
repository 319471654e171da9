"""`Gather`: the `gather` hook of a program. It gives a block its weights, whole, and sums their gradients over ranks.

How a block gets its weights is one protocol: `start_copies` (those on the host), `start` (the all-gathers, behind
them), `take` (wait, and build what the block computes with), after which nothing of what was under way is kept. What
calls the first two ahead of time is in `prefetch`; a block alone does all three. What a block needs to know of its
leaves (buckets, cuts, dtypes) is planned once for all blocks that are alike.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmfn import tree
from mmfn.dtypes import wide
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.layout import Mesh
from mmfn.parallel.weights.buckets import Bucket, Cut, Issued, Like
from mmfn.parallel.weights.gradient_sums import GradientSums
from mmfn.parallel.weights.host_memory import HostMemory, counted_empty
from mmfn.parallel.weights.hosted import fetch_in_graph, stand_for
from mmfn.parallel.weights.sharding import Sharding, local, shard_shape, sharding_of
from mmfn.parallel.weights.streams import Arrival, SideStream
from mmfn.spec import ParamSpec
from mmfn.torch_private import local_tensor
from mmfn.tree import Tree

ALONE = Axis(name="alone")


@dataclass(frozen=True, eq=False)
class Place:
    """How a shard lies in its whole: gathered over `axis` as `cut` says; `shape` is its own. Equal ones are one."""

    axis: str
    cut: Cut
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Weight:
    """A leaf on its way to `Gather`.

    `leaf`: what autograd differentiates, on a mesh a DTensor. `place`: of its shard, None where the leaf is whole.
    `compute`: the dtype it is computed in, where that is not the program's. `host`: this rank's values, where they lie
    there; then `leaf` is a handle (`hosted.handles`). `sums`: where its gradient goes, under its `path`; without them
    autograd is given it, complete.
    """

    leaf: Tensor
    place: Place | None = None
    compute: torch.dtype | None = None
    host: Tensor | None = None
    sums: GradientSums | None = None
    path: str = ""


class Plan(NamedTuple):
    """What is the same for all blocks that are alike: their buckets, with the positions of the leaves in them, and the
    dtype that each leaf is computed in."""

    buckets: list[tuple[Bucket, list[int]]]
    dtypes: list[torch.dtype]


@dataclass(eq=False)
class BlockWeights:
    """The weights of one block, and what of them is under way: `copies` from the host, all-gathers, a list, which
    what is sent is packed for beside the computation.

    `on_take`: called with the whole weights when they are taken. `is_gathered_again`: the backward takes them too
    (`reshard`).
    """

    weights: list[Weight]
    structure: optree.PyTreeSpec
    plan: Plan
    copies: dict[int, Tensor] | None = None
    arrival: Arrival | None = None
    issued: list[Issued] | None = None
    packed: Arrival | None = None
    on_take: Callable[[Sequence[Tensor]], None] | None = None
    is_gathered_again: bool = False

    def arrived(self) -> dict[int, Tensor]:
        """The copies by position; what the current stream is given from here on may read and free them."""
        if self.arrival is not None:
            self.arrival.wait()
        copies, self.copies = self.copies or {}, None
        return copies

    def release(self) -> list[Issued] | None:
        """The all-gathers, which are kept here no longer, as they would keep whole weights alive."""
        if self.packed is not None:
            self.packed.wait()  # where a rank is alone on its axis, there is nothing else to wait for
        issued, self.issued = self.issued, None
        return issued


@dataclass(frozen=True, kw_only=True)
class Gather:
    """The hook: leaves as they lie -> whole tensors (experts: whole local experts) in the compute dtype.

    `compute`: dtype of leaves in computation, default their own; integers keep theirs. `reduce`: dtype in which
    gradients are summed, default float32, or float64 for what is computed in that. Gradients come back with the
    placement, layout and dtype of the leaf: summed over "shard" (experts: edp) by reduce-scatter and over "replicate"
    by all-reduce. Leaves that need no gradient go in a bucket of their own. With `is_sharded` leaves stay this rank's
    shards, and what computes with them has summed their gradients over "shard" itself. What lies on the host is copied
    to the device before, through `memory`; without one the copies are operators of a graph. Gathers that are started
    ahead are packed and sent on `side`, but for copies from the host, which the current stream has waited for.
    """

    mesh: Mesh
    compute: torch.dtype | None = None
    reduce: torch.dtype | None = None
    is_sharded: bool = False
    memory: HostMemory | None = None
    side: SideStream = field(default_factory=SideStream)
    places: dict[Any, Place] = field(default_factory=dict, init=False, repr=False, compare=False)
    plans: dict[Any, Plan] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, params: Tree | BlockWeights) -> Tree:
        """The weights of a block: of `Weight` leaves, of leaves as they are, or of those that are under way."""
        block = self.block(params)
        if self.memory is not None:
            self.start(block)
        return self.take(block)

    def place(self, spec: ParamSpec, path: str) -> Place | None:
        """Where this rank's shard of a parameter lies in it, None on one device."""
        if self.mesh.layout.world == 1:
            return None
        sharding = sharding_of(spec, self.mesh, path)
        return self._place(spec.shape, shard_shape(spec.shape, sharding), sharding)

    def block(self, params: Tree | BlockWeights) -> BlockWeights:
        """A block of which nothing is under way yet, or one as it is."""
        if isinstance(params, BlockWeights):
            return params
        leaves, structure = tree.flatten(params)
        weights = [x if isinstance(x, Weight) else self._weight(x) for x in leaves]
        return BlockWeights(weights, structure, self._plan(weights))

    def start_copies(self, block: BlockWeights) -> None:
        """Start the copies of what lies on the host, unless they or the all-gathers behind them are under way."""
        if self.memory is None or block.copies is not None or block.issued is not None:
            return
        away = {i: weight for i, weight in enumerate(block.weights) if weight.host is not None}
        block.copies = {i: counted_empty(w.host, w.leaf.device, "weights") for i, w in away.items()}
        block.arrival = self.memory.copy([(block.copies[i], w.host) for i, w in away.items() if w.host is not None])

    def start(self, block: BlockWeights) -> None:
        """Start the all-gathers of a block, behind its copies, unless they are under way."""
        if block.issued is not None:
            return
        self.start_copies(block)
        buckets, weights = block.plan.buckets, block.weights
        copies = block.arrived() if buckets else {}
        is_aside, device = bool(buckets and not copies), weights[0].leaf.device
        with self.side.behind_current(device) if is_aside else nullcontext():
            block.issued = [
                bucket.issue([copies.pop(i) if i in copies else local(weights[i].leaf) for i in members])
                for bucket, members in buckets
            ]
        if is_aside:
            block.packed = self.side.arrival(device)
        if copies:
            block.copies = copies

    def take(self, block: BlockWeights) -> Tree:
        """The whole weights. From here on nothing is under way, so that only their user keeps them alive."""
        (buckets, dtypes), weights = block.plan, block.weights
        leaves, copies, issued = [weight.leaf for weight in weights], block.arrived(), block.release()
        for i, weight in enumerate(weights):
            if weight.place is None and weight.host is not None:
                handle = weight.leaf
                leaves[i] = stand_for(handle, copies.pop(i)) if i in copies else fetch_in_graph(handle, weight.host)
        for number, (bucket, members) in enumerate(buckets):
            under_way = None if issued is None else issued[number]
            shards = [_shard(weights[i], is_copied=under_way is not None) for i in members]
            if shards[0].requires_grad:
                sums, paths = weights[members[0]].sums, [weights[i].path for i in members]
                gathered = _Gather.apply(bucket, under_way, sums, paths, *shards)  # type: ignore[no-untyped-call]
            else:  # torch's compiler confuses the arguments of a Function that needs no gradient
                gathered = bucket.gather(shards, under_way)
            for i, whole in zip(members, gathered, strict=True):
                leaves[i] = whole
        leaves = [x.to(dtype) for x, dtype in zip(leaves, dtypes, strict=True)]
        if block.on_take is not None:
            block.on_take(leaves)
        return tree.unflatten(block.structure, leaves)

    def _weight(self, leaf: Tensor) -> Weight:
        """A leaf that comes as it is."""
        if not isinstance(leaf, DTensor):
            return Weight(leaf)
        sharding = Sharding(mesh=leaf.device_mesh, placements=tuple(leaf.placements))
        return Weight(leaf, self._place(tuple(leaf.shape), tuple(local_tensor(leaf).shape), sharding))

    def _place(self, shape: tuple[int, ...], own: tuple[int, ...], sharding: Sharding) -> Place:
        dim = sharding.dim
        cut = Cut(shape=(*own[:dim], shape[dim], *own[dim + 1 :]), dim=dim, size=self.mesh[sharding.axis].size)
        place = Place(sharding.axis, cut, own)
        return place if torch.compiler.is_compiling() else self.places.setdefault((sharding.axis, cut, own), place)

    def _plan(self, weights: Sequence[Weight]) -> Plan:
        """The plan of leaves by their places, dtypes and need of a gradient, made once."""
        if torch.compiler.is_compiling():
            return self._make_plan(weights)
        key = (*[(w.place, w.compute, w.leaf.dtype, w.leaf.requires_grad) for w in weights],)
        plan = self.plans.get(key)
        if plan is None:
            plan = self.plans[key] = self._make_plan(weights)
        return plan

    def _make_plan(self, weights: Sequence[Weight]) -> Plan:
        """Leaves that are gathered over one axis, in one dtype and with or without a gradient share a bucket. Buckets
        are in the order of their first leaves."""
        dtypes = [self._dtype(weight) for weight in weights]
        groups: dict[tuple[Any, ...], dict[int, Place]] = {}
        for i, (weight, dtype) in enumerate(zip(weights, dtypes, strict=True)):
            if weight.place is not None:
                key = weight.place.axis, weight.leaf.requires_grad, dtype
                groups.setdefault(key, {})[i] = weight.place
        return Plan(
            [(self._bucket(axis, list(g.values()), dtype), list(g)) for (axis, _, dtype), g in groups.items()], dtypes
        )

    def _dtype(self, weight: Weight) -> torch.dtype:
        if weight.compute is not None:
            return weight.compute
        dtype = weight.leaf.dtype
        return self.compute or dtype if dtype.is_floating_point else dtype

    def _bucket(self, axis: str, places: Sequence[Place], dtype: torch.dtype) -> Bucket:
        cuts = [Cut(shape=p.shape, dim=p.cut.dim, size=1) if self.is_sharded else p.cut for p in places]
        return Bucket(
            axis=ALONE if self.is_sharded else self.mesh[axis],
            replicate=self.mesh["replicate"],
            cuts=tuple(cuts),
            compute=dtype,
            reduce=self.reduce or wide(dtype),
        )


def enter(
    params: Tree,
    values: Tree,
    sums: GradientSums | None = None,
    *,
    places: Sequence[Place | None],
    dtypes: Sequence[torch.dtype | None],
    is_hosted: bool,
) -> Tree:
    """Parameters as `Gather` wants them, with what is known of each: `Program.enter` of a lowered program.

    `values`: the parameters themselves, which lie on the host where `is_hosted` and `params` are their handles.
    `sums`: where gradients of what is gathered go.
    """
    leaves, structure = tree.flatten(params)
    hosts = [local(x) for x in tree.leaves(values)] if is_hosted else [None] * len(leaves)
    if sums is None:
        return tree.unflatten(structure, map(Weight, leaves, places, dtypes, hosts))
    return tree.unflatten(structure, map(Weight, leaves, places, dtypes, hosts, repeat(sums), tree.paths(params)))


def _shard(weight: Weight, *, is_copied: bool) -> Tensor:
    """This rank's shard, outside of any DTensor; of what lies on the host its handle, if the copy was sent already."""
    leaf = weight.leaf
    assert isinstance(leaf, DTensor), "what has a place is sharded"
    shard = leaf.to_local(grad_placements=leaf.placements)
    return shard if weight.host is None or is_copied else fetch_in_graph(shard, weight.host)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        bucket: Bucket,
        issued: Issued | None,
        sums: GradientSums | None,
        paths: Sequence[str],
        *shards: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.bucket, ctx.sums, ctx.paths = bucket, sums, paths
        ctx.like = [Like(x.shape[c.dim], x.dtype, x.device) for x, c in zip(shards, bucket.cuts, strict=True)]
        return tuple(bucket.gather(shards, issued))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.sums is None:
            return None, None, None, None, *ctx.bucket.sum_gradients(grads, ctx.like)
        ctx.sums.add(ctx.bucket, ctx.paths, ctx.like, grads)
        return (None,) * (4 + len(grads))
