"""How the blocks of a stack get their whole weights: ahead of time, and kept for the backward or gathered again.

Both functions wrap `ops.stack`; `lower` applies them, as they need the finished `gather`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfn.parallel.gather import Gather, Pending
from mmfn.parallel.recompute import Recomputed
from mmfn.tree import Tree

Run = Callable[..., tuple[Tensor, Any]]
Stack = Callable[..., tuple[Tensor, list[Any]]]


def prefetched(stack: Stack, gather: Gather, *, in_backward: bool) -> Stack:
    """Start the all-gather of the next block before a block runs, so that the two overlap.

    `in_backward`: blocks that are computed again gather again; then the gather of the block before is started when the
    gradient reaches a block. There is at most one gather ahead, and each is taken by the block it is for. Eager only:
    what is under way is noted in `Pending`, which a graph cannot hold.
    """

    def ahead(run: Run, block: Any, layers: Sequence[Tree], x: Tensor, *xs: Any, **kwargs: Any) -> Any:
        pending = [Pending(params=params) for params in layers]
        behind = iter([*pending[1:], None])
        again: list[Pending] = []  # blocks to compute again, so far

        def run_ahead(block: Any, own: Pending, *xs: Any) -> tuple[Tensor, Any]:
            gather.issue(own)
            if (following := next(behind)) is not None:
                gather.issue(following)
            x, out = run(block, own, *xs)
            if in_backward and isinstance(block, Recomputed):
                again.append(own)
                x = _Issue.apply(x, gather, again[-2:])  # type: ignore[no-untyped-call]
            return x, out

        return stack(run_ahead, block, pending, x, *xs, **kwargs)

    return ahead


class _Issue(torch.autograd.Function):
    """The identity; when the gradient comes, the gathers of this block and of the one before are started."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: Gather, pending: Sequence[Pending]) -> Tensor:
        ctx.gather, ctx.pending = gather, pending
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        for pending in reversed(ctx.pending):
            ctx.gather.issue(pending)
        return grad, None, None


def kept(stack: Stack, gather: Gather) -> Stack:
    """Gather outside of the block: a recomputed block is given whole weights, which so stay until the backward."""

    def keep(run: Run, *args: Any, **kwargs: Any) -> Any:
        return stack(partial(_run_whole, run, gather), *args, **kwargs)

    return keep


def _run_whole(run: Run, gather: Gather, block: Any, params: Tree | Pending, *xs: Any) -> tuple[Tensor, Any]:
    return run(block, gather(params), *xs)
