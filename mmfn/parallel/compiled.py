"""`compiled`: torch.compile as a transform."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from mmfn.parallel.program import Program, Transform, noted
from mmfn.tree import Tree

COMPILE_KINDS = ("none", "layer", "step")


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
        done = noted(replace(program, compile=kind, backend=backend), f"compiled({kind!r})")
        if kind == "step":
            return done
        inner = program.ops.layer

        def layer(block: Any, params: Tree, *xs: Any) -> tuple[torch.Tensor, Any]:
            return inner(block, params, *xs)

        return replace(done, ops=replace(program.ops, layer=done.jit(layer)))

    return transform
