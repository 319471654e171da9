"""Experts that lie on several ranks: rows travel to their experts, are computed there, and travel back.

    rank 0 has rows for experts 0 0 1 | 2 3     (two experts a rank: the bar is where rank 1's begin)
    rank 1 has rows for experts   0   | 3
    rank 0 gets 0 0 1 0, sorts them by expert (0 0 0 1), computes, and sends back what it was sent, in that order

Which rows go where `expert_parallel` knows, and the ranks move them: `Routes` is what an entry of the table is told of
both. The base form exchanges, sorts and calls the table's `experts`. A table of a device whose operators exchange rows
and multiply them at once has a form of its own (`mmfn/ops/npu/exchange.py`).

Legend: R routed rows of a rank (U of them have an expert), S rows that arrive at it, D width, E experts, W ranks,
G groups of the rows from one rank to another: one for each of the E / W experts there, and with a capacity a last one
of empty rows.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from mmfn.ops.custom import Context, function
from mmfn.ops.kernel import Kernel
from mmfn.torch_private import tell_compiler
from mmfn.tree import Tree

Experts = Callable[[Tensor, Tensor, Tree], Tensor]  # ops.experts: (x_RD, counts_E, weights) -> y_RD


class Routes(Protocol):
    """Where the rows of a rank go, and what arrives at it.

    `size`, `index`: of the W ranks, and of this one among them; `group`: the name of their process group. `from_WG`:
    int64[W, E / W] on the device, how many rows come from each rank for each expert here. `num_chosen`: experts of a
    token, where that is known.
    """

    @property
    def size(self) -> int: ...
    @property
    def index(self) -> int: ...
    @property
    def group(self) -> str: ...
    @property
    def from_WG(self) -> Tensor: ...
    @property
    def num_chosen(self) -> int | None: ...

    def by_rank(self) -> tuple[list[int], list[int]]:
        """How many rows go to each rank, and come from it. The host waits for the device: to be asked for once."""
        ...

    def by_expert(self) -> tuple[list[int], list[int]]:
        """The same for each expert: W * E / W numbers, those of one rank side by side. Instead of `by_rank`."""
        ...

    def exchange(self, x_RD: Tensor, out_sizes: Sequence[int], in_sizes: Sequence[int]) -> Tensor:
        """Part i of the rows to rank i, cut by `in_sizes`, with a gradient that travels back."""
        ...

    def exchanging(self) -> AbstractContextManager[None]:
        """Around an operator that exchanges rows by itself, so that a rank which waits in it can say where it is."""
        ...


class ExpertsOverRanks(Protocol):
    """See `experts_over_ranks`."""

    def __call__(self, x_RD: Tensor, weights: Tree, routes: Routes, experts: Experts) -> Tensor: ...


def experts_over_ranks(x_RD: Tensor, weights: Tree, routes: Routes, experts: Experts) -> Tensor:
    """`ops.experts` over the ranks of `routes`; y_RD, the results of this rank's rows.

    `x_RD`: floating[R, D] sorted by expert; behind the rows of experts lies padding, which stays and gives zeros.
    `weights`: those of this rank's E / W experts, as `experts` takes them, which is the table's op. An expert's
    gradient is summed over the rows of all ranks; a row's travels the row's way back. One host read, of `routes`.
    """
    to_W, from_W = routes.by_rank()
    arrived_SD = routes.exchange(first_rows(x_RD, sum(to_W)), from_W, to_W)
    y_SD = by_expert(arrived_SD, routes.from_WG, weights, experts)
    return with_padding(routes.exchange(y_SD, to_W, from_W), x_RD.shape[0])


def first_rows(x_RD: Tensor, used: int) -> Tensor:
    """The first rows. A compiler, which does not know how many there are, always gets a slice."""
    if torch.compiler.is_compiling():
        tell_compiler(used <= x_RD.shape[0])
    elif used == x_RD.shape[0]:
        return x_RD
    return x_RD.narrow(0, 0, used)


def with_padding(y_UD: Tensor, num_rows: int) -> Tensor:
    """`num_rows` rows, zeros behind those there are."""
    if not torch.compiler.is_compiling() and y_UD.shape[0] == num_rows:
        return y_UD
    return torch.cat([y_UD, y_UD.new_zeros(num_rows - y_UD.shape[0], y_UD.shape[1])])


def by_expert(
    arrived_SD: Tensor, from_WG: Tensor, weights: Tree, experts: Experts, *, has_empty: bool = False
) -> Tensor:
    """`experts` for rows that lie by source rank, and by group within one: sorted by expert, computed, put back."""
    W, G = from_WG.shape
    S = arrived_SD.shape[0]
    group_S = labels(torch.arange(G, device=from_WG.device).repeat(W), from_WG, S)
    order_S = group_S.argsort(stable=True)  # empty rows, the last group, go behind the last expert's
    place_S = torch.empty_like(order_S).scatter(0, order_S, torch.arange(S, device=order_S.device))
    counts_G = from_WG.sum(0)
    y_SD = experts(_permute(arrived_SD, order_S, place_S), counts_G[:-1] if has_empty else counts_G, weights)
    return _permute(y_SD, place_S, order_S)


def labels(values: Tensor, counts: Tensor, num_rows: int) -> Tensor:
    """`values[i]` repeated `counts[i]` times; told the sum, the host need not read it."""
    return values.repeat_interleave(counts.flatten(), output_size=num_rows)


def _permute(x_SD: Tensor, index_S: Tensor, inverse_S: Tensor) -> Tensor:
    """`x_SD[index_S]` of a permutation and its inverse: the gradient is a permutation too, and adds nothing up."""
    y_SD: Tensor = _rows(x_SD, index_S, inverse_S, False)
    return y_SD


def pick(x_RD: Tensor, index_S: Tensor, inverse_R: Tensor) -> Tensor:
    """`x_RD[index_S]` of the rows that are in both, by an index and its inverse; where an index is -1, zeros."""
    y_SD: Tensor = _rows(x_RD, index_S, inverse_R, True)
    return y_SD


def _take(x_RD: Tensor, index_S: Tensor, has_holes: bool) -> Tensor:
    if not has_holes:
        return x_RD.index_select(0, index_S)
    return x_RD.index_select(0, index_S.clamp(min=0)).masked_fill_((index_S < 0)[:, None], 0)


def _take_rows(ctx: Context, x_RD: Tensor, index_S: Tensor, inverse_R: Tensor, has_holes: bool) -> Tensor:
    ctx.save_for_backward(inverse_R)
    ctx.settings = has_holes
    return _take(x_RD, index_S, has_holes)


def _put_back(ctx: Context, dy_SD: Tensor) -> tuple[Tensor | None, ...]:
    (inverse_R,) = ctx.saved_tensors
    return _take(dy_SD, inverse_R, ctx.settings), None, None, None


_rows = function(_take_rows, _put_back)
KERNEL = Kernel(experts_over_ranks)
