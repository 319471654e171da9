"""How the blocks of a stack get their whole weights: ahead of time, once for both passes or once for each, and outside
of the graphs of compiled blocks.

The functions wrap `ops.stack` and `ops.layer`; `lower` applies them, as they need the finished `gather`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfn.parallel.weights.gather import BlockWeights, Gather
from mmfn.parallel.weights.recompute import Recomputed
from mmfn.tree import Tree

Run = Callable[..., tuple[Tensor, Any]]
Params = BlockWeights | list[BlockWeights]  # a block's, or those of a group of blocks that are run as one (see `remat`)
Stack = Callable[..., Any]  # `ops.stack`


def wrap_stack_with_prefetch(stack: Stack, gather: Gather, *, in_backward: bool) -> Stack:
    """Start the all-gather of the next block before a block runs, so that the two overlap.

    `in_backward`: blocks that are computed again gather again, as do those whose weights were released (`reshard`);
    then the gather of the block before is started when the gradient reaches a block. There is at most one gather ahead,
    and each is taken by the block it is for; in a group of blocks that are run as one, it is that of the second block,
    or (backward) of the first. Outside of graphs only: what is under way is written down in `BlockWeights`, which a
    graph cannot hold. Where parameters lie on the host their copies are started with the gather on one device, and one
    block before it on several, so that the gather does not wait.
    """
    is_on_several = gather.mesh.layout.world > 1

    def run_stack(run: Run, block: Any, layers: Sequence[Tree], x: Tensor, *xs: Any, **kwargs: Any) -> Any:
        blocks = [gather.block(params) for params in layers]
        rest = list(blocks)  # to run, from the next one on
        again: list[BlockWeights] = []  # to gather again, so far

        def run_ahead(block: Any, params: Params, *xs: Any) -> tuple[Tensor, Any]:
            members = params if isinstance(params, list) else [params]
            _start(gather, rest, is_on_several)
            del rest[: len(members)]
            x, out = run(block, params, *xs)
            is_gathered_again = isinstance(block, Recomputed) or members[0].is_gathered_again
            if in_backward and is_gathered_again and x.requires_grad:  # a frozen stack has no backward
                again.append(members[0])
                x = on_gradient(x, partial(_start, gather, again[-1:-4:-1], is_on_several))
            return x, out

        return stack(run_ahead, block, blocks, x, *xs, **kwargs)

    return run_stack


def _start(gather: Gather, blocks: Sequence[BlockWeights], is_on_several: bool) -> None:
    """Start the gathers of two blocks, and the copies for that of the third."""
    for block in blocks[:2]:
        gather.start(block)
    for block in blocks[2:3] if is_on_several else ():
        gather.start_copies(block)


def on_gradient(x: Tensor, call: Callable[[], None]) -> Tensor:
    """The identity; `call()` when the gradient comes, before it goes on. Nothing where x needs none."""
    y: Tensor = _OnGradient.apply(x, call) if x.requires_grad else x  # type: ignore[no-untyped-call]
    return y


class _OnGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Callable[[], None]) -> Tensor:
        ctx.call = call
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.call()
        return grad, None


def wrap_stack_with_gather(stack: Stack, gather: Gather) -> Stack:
    """Gather outside of the block: a recomputed block is given whole weights, which so stay until the backward."""

    def run_stack(run: Run, *args: Any, **kwargs: Any) -> Any:
        def run_whole(block: Any, params: Tree | Params, *xs: Any) -> tuple[Tensor, Any]:
            return run(block, _gathered(gather, params), *xs)

        return stack(run_whole, *args, **kwargs)

    return run_stack


def wrap_layer_with_gather(layer: Run, gather: Gather) -> Run:
    """Gather outside of compiled blocks, so that gathers run ahead of them, and sums of gradients behind them.

    A block that is computed again is so with its gather, as in eager execution: what is compiled is the block alone.
    Not for blocks that keep some results, which is a matter of their graphs.
    """

    def run_whole(block: Any, params: Tree | Params, *xs: Any) -> tuple[Tensor, Any]:
        return layer(block, _gathered(gather, params), *xs)

    def run(block: Any, params: Tree | Params, *xs: Any) -> tuple[Tensor, Any]:
        again = Recomputed(partial(run_whole, block.block)) if isinstance(block, Recomputed) else None
        out: tuple[Tensor, Any] = again(params, *xs) if again else run_whole(block, params, *xs)
        return out

    return run


def _gathered(gather: Gather, params: Tree | Params) -> Any:
    return [gather(member) for member in params] if isinstance(params, list) else gather(params)
