"""`Program`: how one rank runs a model. A transform is a function Program -> Program.

A transform does one of two things: it adds a fact (a mesh is used, dtypes, how a batch is split) or it wraps one op.
What depends on several facts (the hooks `gather` and `psum`, the compiled block, the gather ahead) is built by `lower`,
once, last: so the order of transforms does not matter.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any

import torch

from mmfn import torch_private, tree
from mmfn.batch import Batch
from mmfn.errors import UserError
from mmfn.ops import Ops, portable
from mmfn.parallel.mesh.axis import psum
from mmfn.parallel.mesh.layout import Layout, Mesh, single_mesh
from mmfn.parallel.weights.gather import Gather, enter
from mmfn.parallel.weights.gradient_sums import MOST_UNDER_WAY, GradientSums
from mmfn.parallel.weights.host_memory import HostMemory
from mmfn.parallel.weights.prefetch import wrap_layer_with_gather, wrap_stack_with_gather, wrap_stack_with_prefetch
from mmfn.parallel.weights.reshard import wrap_stack_with_reshard
from mmfn.parallel.weights.sharding import dims_by_axis
from mmfn.tree import Tree

MAX_GRAPHS = 256  # distinct sets of shapes one function may be compiled for; torch's default of 8 is few for buckets


def whole_batch(batch: Batch) -> Batch:
    """The base of `Program.split`: a rank computes its whole batch."""
    return batch


def same_params(params: Tree, values: Tree, sums: GradientSums | None = None) -> Tree:
    """The base of `Program.enter`."""
    return params


def same_table(ops: Ops) -> Ops:
    """The base of `Program.watch`."""
    return ops


@dataclass(frozen=True, kw_only=True)
class WeightSettings:
    """How blocks get their weights, and how gradients are summed.

    `compute` and `reduce`: dtypes of gathered parameters and of gradient sums (None: the leaf's own, and float32 or
    wider). `prefetch`, `keep_gathered` and `reshard_after_forward`: when whole weights are made, and how long they stay
    (see `data_parallel`). `is_hosted`: parameters lie on the host. `is_head_sharded`: the loss takes a rank's rows of
    the head. `sums_under_way`: sums of gradients that are sent and not yet waited for, at most.
    """

    compute: torch.dtype | None = None
    reduce: torch.dtype | None = None
    prefetch: bool = True
    keep_gathered: bool = False
    reshard_after_forward: bool = False
    is_hosted: bool = False
    is_head_sharded: bool = False
    sums_under_way: int = MOST_UNDER_WAY


@dataclass(frozen=True, kw_only=True)
class Program:
    """How one rank runs a model.

    `mesh`: this rank's place; `uses`: the layout sizes that a transform has taken care of. `split(batch)`: this
    rank's share of a batch. `enter(params, values, sums)`: the parameters as a model that uses `ops` is given them,
    where `params` stand for `values` in autograd and `sums` (default: autograd itself) are given their gradients.
    `period` and `num_special`: blocks of the text are treated alike in periods of so many, behind so many that are
    not. `is_offloaded`: activations lie on the host. `is_selective`: blocks that are computed again keep some
    results. `compile` is "none", "layer" or "step" and `backend` the one torch.compile is given. `watch` is applied
    to the lowered table, last: a plan labels ops by it. `notes` say what each transform did.
    """

    specs: Tree
    ops: Ops
    mesh: Mesh = field(default_factory=single_mesh)
    uses: frozenset[str] = frozenset()
    split: Callable[[Batch], Batch] = whole_batch
    enter: Callable[..., Tree] = same_params
    weights: WeightSettings = field(default_factory=WeightSettings)
    period: int = 1
    num_special: int = 0
    is_offloaded: bool = False
    is_selective: bool = False
    compile: str = "none"
    backend: str | Callable[..., Any] = "inductor"
    watch: Callable[[Ops], Ops] = same_table
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(specs: Tree, ops: Ops | None = None, mesh: Mesh | None = None) -> "Program":
        """A program without transforms; `ops` defaults to `ops.portable()` and `mesh` to one device."""
        return Program(specs=specs, ops=ops or portable(), mesh=mesh or single_mesh())

    def jit(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn` as one graph with static shapes, compiled at its first call with each new set of shapes.

        One graph has sizes read on the host in it (torch's `fullgraph`), as those of an exchange of rows.
        """
        return torch.compile(fn, fullgraph=True, dynamic=False, backend=self.backend)

    @property
    def gathers_in_graphs(self) -> bool:
        """True where weights are gathered, and gradients summed, by operators of compiled graphs."""
        kept = self.weights.keep_gathered
        return gathers_in_graphs(self.compile, is_selective=self.is_selective, keep_gathered=kept)

    def gradient_sums(self) -> GradientSums | None:
        """What one step's gradients are summed by, None where that is part of a graph, or nothing is summed."""
        if self.mesh.layout.world == 1 or self.gathers_in_graphs:
            return None
        return GradientSums(most=self.weights.sums_under_way)

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """The context a program's functions run in: settings of torch's compiler, for the time of the call only.

        With "layer" a backward may compute elementwise operators again also where their result then goes to memory, as
        a factor of a product: a block keeps neither normed inputs nor swiglu's output, a fourth of what it would keep.
        """
        if self.compile == "none":
            yield
            return
        settings = {"recompile_limit": MAX_GRAPHS}
        if self.compile == "step":
            settings["trace_autograd_ops"] = True
        keeps = {"ban_recompute_materialized_backward": self.compile == "step"}
        with torch_private.compiler_settings(settings, keeps):
            yield


Transform = Callable[[Program], Program]


def pipe(program: Program, *transforms: Transform) -> Program:
    """Apply transforms left to right."""
    return reduce(lambda p, transform: transform(p), transforms, program)


def uses(program: Program, *names: str) -> Program:
    """The program with layout sizes marked as taken care of."""
    return replace(program, uses=program.uses | set(names))


def noted(program: Program, note: str) -> Program:
    """The program with one more line about what was done."""
    return replace(program, notes=(*program.notes, note))


def lower(program: Program) -> Program:
    """The program with the hooks that depend on its facts.

    Raises ValueError when the mesh has an axis of several ranks that no transform has taken care of, for facts that
    exclude each other, and for a leaf with a logical axis that no rule of placement knows.
    """
    _check(program)
    ops, weights, is_alone = program.ops, program.weights, program.mesh.layout.world == 1
    if program.compile == "layer":
        ops = replace(ops, layer=program.jit(ops.layer))
    items = tree.items(program.specs)
    dtypes = [spec.compute for _, spec in items]
    if not is_alone or weights.is_hosted or weights.compute is not None or any(dtypes):
        gather = Gather(mesh=program.mesh, compute=weights.compute, reduce=weights.reduce)
        if weights.is_hosted and not program.gathers_in_graphs:
            gather = replace(gather, memory=HostMemory())
        places = [gather.place(spec, path) for path, spec in items]
        enter_all = partial(enter, places=places, dtypes=dtypes, is_hosted=weights.is_hosted)
        gather_head = replace(gather, is_sharded=weights.is_head_sharded)
        ops = _weights_in_time(program, replace(ops, gather=gather, gather_head=gather_head), gather)
        program = replace(program, enter=enter_all)
    if not is_alone:
        ops = replace(ops, psum=partial(psum, axis=program.mesh["world"], site="statistics"))
    return replace(program, ops=program.watch(ops))


def _check(program: Program) -> None:
    """Raise ValueError as `lower` does."""
    layout, weights = program.mesh.layout, program.weights
    for name, transform in NEEDED.items():
        is_needed = getattr(layout, name) > 1 or (name == "dp" and layout.world > 1)  # it sums the gradients of all
        if is_needed and name not in program.uses:
            raise UserError(f"layout {layout}: no transform takes care of {name}; add {transform}")
    for path, spec in tree.items(program.specs):
        dims_by_axis(spec, path)
    moved = [what for what, yes in (("activations", program.is_offloaded), ("parameters", weights.is_hosted)) if yes]
    if weights.reshard_after_forward and program.gathers_in_graphs:
        raise UserError(
            f"reshard_after_forward releases what eager blocks saved but the graphs of compiled({program.compile!r}) "
            "have their gathers in them; use compiled('layer') without selective remat"
        )
    check_one_graph(program.compile, is_head_sharded=weights.is_head_sharded, moved=moved)
    transport = program.mesh["world"].transport
    if program.compile != "none" and transport is not None and not transport.is_traceable:
        raise UserError(
            f"compiled({program.compile!r}) needs real ranks, started with torchrun: virtual ones are threads of one "
            "process, whose collectives are no part of a graph; leave compiled out"
        )


def check_one_graph(compile: str, *, is_head_sharded: bool = False, moved: Sequence[str] = ()) -> None:
    """Raise ValueError for what is no part of the one graph of compiled("step"). `moved`: what lies on the host."""
    if compile != "step":
        return
    if is_head_sharded:
        raise UserError("a step with a sharded head is no single graph; use compiled('layer') or gather the head")
    if moved:
        raise UserError(
            f"offload({moved[0]!r}) moves memory between the blocks of a step but compiled('step') makes it one graph; "
            "use compiled('layer')"
        )


def gathers_in_graphs(compile: str, *, is_selective: bool, keep_gathered: bool) -> bool:
    """True where blocks cannot be compiled without their gathers: what of a block is kept is a matter of its graph."""
    return compile == "step" or (compile == "layer" and is_selective and not keep_gathered)


def _weights_in_time(program: Program, ops: Ops, gather: Gather) -> Ops:
    """The table with gathers ahead, and outside of blocks, as the program's facts say."""
    weights, layer, stack = program.weights, ops.layer, ops.stack
    if program.mesh.layout.world == 1 and not weights.is_hosted:
        return ops
    if not program.gathers_in_graphs:
        if program.compile == "layer" and not weights.keep_gathered:
            layer = wrap_layer_with_gather(layer, gather)
        if weights.prefetch:
            stack = wrap_stack_with_prefetch(stack, gather, in_backward=not weights.keep_gathered)
        if weights.reshard_after_forward:
            stack = wrap_stack_with_reshard(stack, gather, program.watch(ops).gather)
    stack = wrap_stack_with_gather(stack, gather) if weights.keep_gathered else stack
    return replace(ops, layer=layer, stack=stack)


NEEDED = {
    "replicate": "data_parallel()",
    "dp": "data_parallel()",
    "cp": "context_parallel()",
    "ep": "expert_parallel()",
}
assert set(NEEDED) | {"ulysses"} == set(Layout.__dataclass_fields__), "every size of a layout has a transform"
