"""`Program`: how one rank runs a model. A transform is a function Program -> Program.

A transform does one of two things: it adds a fact (a mesh is used, dtypes, how a batch is split) or it wraps one op.
What depends on several facts (the hooks `gather` and `psum`, the compiled block, the gather ahead) is built by `lower`,
once, last: so the order of transforms does not matter.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any

import torch
import torch._functorch.config

from mmfn import tree
from mmfn.batch import Batch
from mmfn.errors import UserError
from mmfn.ops import Ops, portable
from mmfn.parallel.mesh.axis import psum
from mmfn.parallel.mesh.layout import Layout, Mesh, single_mesh
from mmfn.parallel.weights.gather import Gather, typed
from mmfn.parallel.weights.host_memory import HostMemory
from mmfn.parallel.weights.prefetch import kept, prefetched
from mmfn.tree import Tree

MAX_GRAPHS = 256  # distinct sets of shapes one function may be compiled for; torch's default of 8 is few for buckets


def whole_batch(batch: Batch) -> Batch:
    """The base of `Program.split`: a rank computes its whole batch."""
    return batch


def same_params(params: Tree) -> Tree:
    """The base of `Program.enter`."""
    return params


def same_table(ops: Ops) -> Ops:
    """The base of `Program.watch`."""
    return ops


@dataclass(frozen=True, kw_only=True)
class Program:
    """How one rank runs a model.

    `mesh`: this rank's place; `uses`: the layout sizes that a transform has taken care of. `split(batch)`: this rank's
    share of a batch. `enter(params)`: the parameters as a model that uses `ops` is given them. `compute_dtype` and
    `reduce_dtype`: of gathered parameters and of gradient sums (None: the leaf's own, and the compute dtype).
    `is_head_sharded`: the loss takes a rank's rows of the head. `prefetch` and `keep_gathered`: when whole weights are
    made (see `data_parallel`). `period` and `num_special`: blocks of the text are treated alike in periods of so many,
    behind so many that are not. `is_offloaded`: activations lie on the host; `is_hosted`: parameters do.
    `compile` is "none", "layer" or "step" and `backend` the one torch.compile is given;
    `compiler`: settings of torch's compiler that the program's ops need. `watch` is applied to the lowered table, last:
    a plan labels ops by it. `notes` say what each transform did.
    """

    specs: Tree
    ops: Ops
    mesh: Mesh = field(default_factory=single_mesh)
    uses: frozenset[str] = frozenset()
    split: Callable[[Batch], Batch] = whole_batch
    enter: Callable[[Tree], Tree] = same_params
    compute_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    is_head_sharded: bool = False
    prefetch: bool = True
    keep_gathered: bool = False
    period: int = 1
    num_special: int = 0
    is_offloaded: bool = False
    is_hosted: bool = False
    compile: str = "none"
    backend: str | Callable[..., Any] = "inductor"
    compiler: Mapping[str, bool] = field(default_factory=dict)
    watch: Callable[[Ops], Ops] = same_table
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(specs: Tree, ops: Ops | None = None, mesh: Mesh | None = None) -> "Program":
        """A program without transforms; `ops` defaults to `ops.portable()` and `mesh` to one device."""
        return Program(specs=specs, ops=ops or portable(), mesh=mesh or single_mesh())

    def jit(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn` as one graph with static shapes, compiled at its first call with each new set of shapes."""
        return torch.compile(fn, fullgraph=True, dynamic=False, backend=self.backend)

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """The context a program's functions run in: the compiler settings they need, for the time of the call only.

        With "layer" a backward may compute elementwise operators again also where their result then goes to memory, as
        a factor of a product: a block keeps neither normed inputs nor swiglu's output, a fourth of what it would keep.
        """
        if self.compile == "none":
            yield
            return
        settings = {"recompile_limit": MAX_GRAPHS, **self.compiler}
        if self.compile == "step":
            settings["trace_autograd_ops"] = True
        keeps = torch._functorch.config.patch(ban_recompute_materialized_backward=self.compile == "step")
        with torch._dynamo.config.patch(settings), keeps:
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

    Raises ValueError when the mesh has an axis of several ranks that no transform has taken care of.
    """
    layout = program.mesh.layout
    for name, transform in NEEDED.items():
        is_needed = getattr(layout, name) > 1 or (name == "dp" and layout.world > 1)  # it sums the gradients of all
        if is_needed and name not in program.uses:
            raise UserError(f"layout {layout}: no transform takes care of {name}; add {transform}")
    moved = [what for what, yes in (("activations", program.is_offloaded), ("parameters", program.is_hosted)) if yes]
    check_one_graph(program.compile, is_head_sharded=program.is_head_sharded, moved=moved)
    ops = program.ops
    if program.compile == "layer":
        ops = replace(ops, layer=program.jit(ops.layer))
    dtypes = [spec.compute for spec in tree.leaves(program.specs)]
    if any(dtypes):
        program = replace(program, enter=partial(typed, dtypes=dtypes))
    if layout.world > 1 or program.is_hosted or program.compute_dtype is not None or any(dtypes):
        gather = Gather(mesh=program.mesh, compute=program.compute_dtype, reduce=program.reduce_dtype)
        if program.is_hosted and (program.compile == "none" or program.keep_gathered):  # else it is part of a graph
            gather = replace(gather, memory=HostMemory())
        gather_head = replace(gather, is_sharded=program.is_head_sharded)
        stack = _weights_in_time(program, ops.stack, gather)
        ops = replace(ops, gather=gather, gather_head=gather_head, stack=stack)
    if layout.world > 1:
        ops = replace(ops, psum=partial(psum, axis=program.mesh["world"], site="statistics"))
    return replace(program, ops=program.watch(ops))


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


def _weights_in_time(program: Program, stack: Callable[..., Any], gather: Gather) -> Callable[..., Any]:
    """`ops.stack` with gathers ahead, and outside of blocks, as the program's facts say."""
    if program.mesh.layout.world == 1 and not program.is_hosted:
        return stack
    is_outside = program.keep_gathered and program.compile != "step"
    if program.prefetch and (is_outside or program.compile == "none"):
        stack = prefetched(stack, gather, in_backward=not program.keep_gathered)
    return kept(stack, gather) if program.keep_gathered else stack


NEEDED = {
    "replicate": "data_parallel()",
    "dp": "data_parallel()",
    "cp": "context_parallel()",
    "ep": "expert_parallel()",
}
assert set(NEEDED) | {"ulysses"} == set(Layout.__dataclass_fields__), "every size of a layout has a transform"
