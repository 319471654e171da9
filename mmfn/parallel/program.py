"""`Program`: a model's parameter specs and the ops table it runs with. A transform is a function Program -> Program."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch

from mmfn.ops import Ops, portable
from mmfn.tree import Tree

COMPILE_KINDS = ("none", "layer", "step")
MAX_GRAPHS = 256  # distinct sets of shapes one function may be compiled for; torch's default of 8 is few for buckets


@dataclass(frozen=True, kw_only=True)
class Program:
    """How one rank runs a model.

    `compile` is "none", "layer" or "step" and `backend` the one torch.compile is given. `notes` say what each transform
    did.
    """

    specs: Tree
    ops: Ops
    compile: str = "none"
    backend: str | Callable[..., Any] = "inductor"
    notes: tuple[str, ...] = field(default=())

    @staticmethod
    def of(specs: Tree, ops: Ops | None = None) -> "Program":
        """The program of one device; `ops` defaults to `ops.portable()`."""
        return Program(specs=specs, ops=ops or portable())

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


def compiled(kind: str, backend: str | Callable[..., Any] = "inductor") -> Transform:
    """Compile a program: "layer" (one graph for all blocks of a stack, plus the update), "step" (one graph) or "none".

    Every distinct set of shapes (a bucket) compiles once; nothing is dynamic. "layer" replaces `ops.layer`, whose
    blocks keep running under `Program.compiling()`; "step" leaves the ops alone, the step being traced as a whole.
    Raises ValueError for another kind, and for "step" where this torch cannot trace `torch.autograd.grad`.
    """
    if kind not in COMPILE_KINDS:
        raise ValueError(f"compile kind {kind!r} is unknown; use one of {', '.join(COMPILE_KINDS)}")
    if kind == "step" and not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        raise ValueError(
            f"compile kind 'step' needs a torch whose compiler traces autograd.grad, got {torch.__version__}; "
            "use torch 2.11 or newer, or compile kind 'layer'"
        )

    def transform(program: Program) -> Program:
        if kind == "none":
            return program
        done = replace(program, compile=kind, backend=backend, notes=(*program.notes, f"compiled({kind!r})"))
        if kind == "step":
            return done
        inner = program.ops.layer

        def layer(block: Any, params: Tree, *xs: Any) -> tuple[torch.Tensor, Any]:
            return inner(block, params, *xs)

        return replace(done, ops=replace(program.ops, layer=done.jit(layer)))

    return transform
