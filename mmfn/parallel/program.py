"""`Program`: a model's parameter specs and the ops table it runs with. A transform is a function Program -> Program."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch

from mmfn.ops import Ops, portable
from mmfn.tree import Tree

COMPILE_KINDS = ("none", "layer", "step")


@dataclass(frozen=True, kw_only=True)
class Program:
    """How one rank runs a model. `compile` is "none", "layer" or "step"; `notes` say what each transform did."""

    specs: Tree
    ops: Ops
    compile: str = "none"
    notes: tuple[str, ...] = field(default=())

    @staticmethod
    def of(specs: Tree, ops: Ops | None = None) -> "Program":
        """The program of one device; `ops` defaults to `ops.portable()`."""
        return Program(specs=specs, ops=ops or portable())


Transform = Callable[[Program], Program]


def pipe(program: Program, *transforms: Transform) -> Program:
    """Apply transforms left to right."""
    return reduce(lambda p, transform: transform(p), transforms, program)


def compiled(kind: str) -> Transform:
    """Compile a program: "layer" (one graph for all blocks of a stack, plus the update), "step" (one graph) or "none".

    Every distinct set of shapes (a bucket) compiles once; nothing is dynamic. Raises ValueError for another kind.
    """
    if kind not in COMPILE_KINDS:
        raise ValueError(f"compile kind {kind!r} is unknown; use one of {', '.join(COMPILE_KINDS)}")

    def transform(program: Program) -> Program:
        if kind == "none":
            return program
        note = f"compiled({kind!r})"
        if kind == "step":
            return replace(program, compile=kind, notes=(*program.notes, note))
        inner = program.ops.layer

        def layer(block: Any, params: Tree, *xs: Any) -> tuple[torch.Tensor, Any]:
            return inner(block, params, *xs)

        run = torch.compile(layer, fullgraph=True, dynamic=False)
        return replace(program, ops=replace(program.ops, layer=run), compile=kind, notes=(*program.notes, note))

    return transform
