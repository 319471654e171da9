"""`compiled`: torch.compile as a transform."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from mmfn import torch_private
from mmfn.errors import UserError
from mmfn.parallel.program import Program, Transform, noted

Backend = Callable[..., Any]  # (graph, example inputs) -> callable
COMPILE_KINDS = ("none", "layer", "step")


def compiled(kind: str, backend: str | Backend = "inductor") -> Transform:
    """Compile a program: "layer" (one graph for all blocks of a stack, plus the update), "step" (one graph) or "none".

    Every distinct set of shapes (a bucket) compiles once; nothing is dynamic. With "layer" the lowered `ops.layer` is
    compiled and runs under `Program.compiling()`. On several ranks, and where parameters lie on the host, blocks are
    given their weights, and are computed again, from outside of their graphs; those that keep some results (`remat`
    "selective") have their gathers and recomputation in them, as have all blocks on one device. "step" leaves the ops
    alone, the step being traced as a whole. Placements do not change.
    Raises ValueError for another kind, and for "step" where this torch cannot trace `torch.autograd.grad`.
    """
    if kind not in COMPILE_KINDS:
        raise UserError(f"compile kind {kind!r} is unknown; use one of {', '.join(COMPILE_KINDS)}")
    if kind == "step" and not torch_private.traces_autograd():
        raise UserError(
            f"compile kind 'step' needs a torch whose compiler traces autograd.grad, got {torch.__version__}; "
            "use torch 2.11 or newer, or compile kind 'layer'"
        )

    def transform(program: Program) -> Program:
        if kind == "none":
            return program
        chosen = marks_backward(backend) if kind == "step" else backend
        return noted(replace(program, compile=kind, backend=chosen), f"compiled({kind!r})")

    return transform


def marks_backward(backend: str | Backend) -> Backend:
    """`backend`, given graphs in which the backward of an autograd.Function is known to be one.

    A graph of a whole step holds both passes, and recomputation needs to know where the backward begins. torch (2.13)
    marks the nodes of autograd.grad but not those of a Function's backward, and then sees several backward passes.
    """
    inner: Backend = torch_private.compiler_backend(backend) if isinstance(backend, str) else backend

    def run(graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor], **options: Any) -> Any:
        for name, body in graph.named_modules():
            if isinstance(body, torch.fx.GraphModule) and "bwd_body" in name.rpartition(".")[2]:
                for node in body.graph.nodes:
                    node.meta["autograd_backward"] = True
        return inner(graph, inputs, **options)

    return run
