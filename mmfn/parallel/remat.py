"""`remat`: activations of a block are computed again in the backward instead of being kept."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy

from mmfn.parallel.program import Program, Transform, noted
from mmfn.parallel.recompute import Recomputed

REMAT_KINDS = ("none", "full", "selective")
OPERATORS = {
    "attention": (
        "mmfn::attention",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
    ),
    "experts": ("mmfn::grouped_linear",),
    "matmul": ("aten::mm", "aten::addmm", "aten::bmm"),
}
"""What "selective" can keep: the name of an op -> the torch operators whose results are its own."""


def remat(kind: str, *, save: Sequence[str] = (), every: int = 1) -> Transform:
    """Compute the blocks of every stack again in the backward: "full", "selective" (all but some ops) or "none".

    `save`: names in `OPERATORS` whose results "selective" keeps. `every`: of n blocks only the first is computed again.
    Placements do not change. A block gathers its weights in its first line, so they are gathered again as well and
    never kept (`data_parallel(keep_gathered=True)` keeps them); the gradient is reduced once, as without.
    Raises ValueError for an unknown kind or op, and for settings the kind does not use.
    """
    _check(kind, save, every)
    policy = partial(_policy, _overloads(save)) if save else None

    def transform(program: Program) -> Program:
        if kind == "none":
            return program
        inner = program.ops.stack

        def stack(run: Any, block: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, list[Any]]:
            again = Recomputed(block, policy)
            if every == 1:
                return inner(run, again, *args, **kwargs)
            index = count()

            def run_some(block: Any, *args: Any) -> tuple[Tensor, Any]:
                out: tuple[Tensor, Any] = run(block if next(index) % every else again, *args)
                return out

            return inner(run_some, block, *args, **kwargs)

        note = (
            f"remat({kind!r}" + (f", save={list(save)}" if save else "") + (f", every={every})" if every > 1 else ")")
        )
        return noted(replace(program, ops=replace(program.ops, stack=stack)), note)

    return transform


def _policy(kept: frozenset[Any], ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE


def _overloads(save: Sequence[str]) -> frozenset[Any]:
    """The default overloads of operators this torch has."""
    names = [name.split("::") for op in save for name in OPERATORS[op]]
    packets = [getattr(getattr(torch.ops, space), name, None) for space, name in names]
    return frozenset(packet.default for packet in packets if packet is not None)


def _check(kind: str, save: Sequence[str], every: int) -> None:
    if kind not in REMAT_KINDS:
        raise ValueError(f"remat kind {kind!r} is unknown; use one of {', '.join(REMAT_KINDS)}")
    if unknown := [name for name in save if name not in OPERATORS]:
        raise ValueError(f"remat cannot save {unknown[0]!r}; it knows {', '.join(OPERATORS)}")
    if (kind == "selective") != bool(save):
        raise ValueError(f"remat kind {kind!r} got save={list(save)}; name what to save, and only for 'selective'")
    if every < 1 or (kind == "none" and every > 1):
        raise ValueError(f"remat kind {kind!r} got every={every}; it must be at least 1, and 1 for 'none'")
