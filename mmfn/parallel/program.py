"""`Program`: how one rank runs a model. A transform is a function Program -> Program.

A transform does one of two things: it adds a fact (a mesh is used, dtypes, how a batch is split) or it wraps one op.
What depends on several facts, the hooks `gather` and `psum`, is built by `lower`, once, last: so the order of
transforms does not matter.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any

import torch

from mmfn.batch import Batch
from mmfn.ops import Ops, portable
from mmfn.parallel.axis import psum
from mmfn.parallel.gather import make_gather
from mmfn.parallel.mesh import Layout, Mesh, single_mesh
from mmfn.tree import Tree

MAX_GRAPHS = 256  # distinct sets of shapes one function may be compiled for; torch's default of 8 is few for buckets


def whole_batch(batch: Batch) -> Batch:
    """The base of `Program.split`: a rank computes its whole batch."""
    return batch


@dataclass(frozen=True, kw_only=True)
class Program:
    """How one rank runs a model.

    `mesh`: this rank's place; `uses`: the layout sizes that a transform has taken care of. `split(batch)`: this rank's
    share of a batch. `compute_dtype` and `reduce_dtype`: of gathered parameters and of gradient sums (None: the leaf's
    own, and the compute dtype). `compile` is "none", "layer" or "step" and `backend` the one torch.compile is given.
    `notes` say what each transform did.
    """

    specs: Tree
    ops: Ops
    mesh: Mesh = field(default_factory=single_mesh)
    uses: frozenset[str] = frozenset()
    split: Callable[[Batch], Batch] = whole_batch
    compute_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    compile: str = "none"
    backend: str | Callable[..., Any] = "inductor"
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(specs: Tree, ops: Ops | None = None, mesh: Mesh | None = None) -> "Program":
        """A program without transforms; `ops` defaults to `ops.portable()` and `mesh` to one device."""
        return Program(specs=specs, ops=ops or portable(), mesh=mesh or single_mesh())

    def jit(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn` as one graph with static shapes, compiled at its first call with each new set of shapes."""
        return torch.compile(fn, fullgraph=True, dynamic=False, backend=self.backend)

    def compiling(self) -> AbstractContextManager[Any]:
        """The context a program's functions run in: the compiler settings they need, for the time of the call only."""
        if self.compile == "none":
            return nullcontext()
        settings = {"recompile_limit": MAX_GRAPHS}
        if self.compile == "step":
            settings["trace_autograd_ops"] = True
        patch: AbstractContextManager[Any] = torch._dynamo.config.patch(settings)
        return patch


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
    """The program with `gather` and `psum` built from its facts.

    Raises ValueError when the mesh has an axis of several ranks that no transform has taken care of.
    """
    layout = program.mesh.layout
    for name, transform in NEEDED.items():
        if getattr(layout, name) > 1 and name not in program.uses:
            raise ValueError(
                f"layout {layout}: {name} is {getattr(layout, name)} but no transform uses it; {transform}"
            )
    ops = program.ops
    if program.uses or program.compute_dtype is not None:
        ops = replace(ops, gather=make_gather(program.mesh, program.compute_dtype, program.reduce_dtype))
    if layout.world > 1:
        ops = replace(ops, psum=partial(psum, axis=program.mesh["world"], site="statistics"))
    return replace(program, ops=ops)


NEEDED = {
    "replicate": "add data_parallel()",
    "dp": "add data_parallel()",
    "cp": "add context_parallel() and data_parallel(), over which parameters are sharded",
    "ep": "add expert_parallel()",
}
assert set(NEEDED) | {"ulysses"} == set(Layout.__dataclass_fields__), "every size of a layout has a transform"
