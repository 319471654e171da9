"""`expert_parallel`: a rank computes its own experts; the rows routed to them come from all ranks of ep, and go back.

Legend: R routed rows of a rank (U of them have an expert), S rows that arrive at it, D width, E experts, W ranks of ep,
G groups of the rows from one rank to another: one for each of the E / W experts there, and with a capacity a last one
of empty rows.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfn.errors import UserError
from mmfn.ops import Ops
from mmfn.ops.custom import operator
from mmfn.ops.eager import is_eager
from mmfn.ops.exchange import KERNEL as UNFUSED
from mmfn.ops.exchange import Experts, ExpertsOverRanks, by_expert, labels, pick
from mmfn.ops.kernel import wrapping
from mmfn.parallel.mesh.axis import Axis, exchange
from mmfn.parallel.mesh.collective import Collective
from mmfn.parallel.program import Program, Transform, noted, uses
from mmfn.parallel.weights.sharding import sizes_over
from mmfn.torch_private import assert_on_device
from mmfn.tree import Tree

EXPERT_KINDS = ("dropless", "capacity")


def expert_parallel(
    kind: str = "dropless",
    *,
    capacity: float | None = None,
    balanced: bool = False,
    fused: bool = False,
    num_chosen: int | None = None,
) -> Transform:
    """Spread experts over the ranks of ep, and exchange routed rows around `ops.experts`.

    Placement of an expert leaf: (Replicate on replicate, Shard(1) on edp, Shard(0) on ep). It is gathered over edp and
    stays cut on ep: rows move, not experts. The op gives an expert's gradient summed over the rows of all ep ranks;
    what is left, the sum over edp and replicate, is `gather`'s. A row's gradient travels the row's way back.

    "dropless": a rank sends every row that has an expert; rows of padding, behind them, stay, and give zeros. A layer
    costs one all-to-all of counts, one host read of how many rows go to and come from each rank, and an all-to-all of
    rows there, back, and each again in the backward; remat repeats the forward's part, unless it saves "exchange".
    Compiled, row counts are unknowns of one graph.

    "capacity": a rank sends `ceil(capacity * R / W)` rows to every rank, empty ones included: static shapes and no host
    read, for the same collectives. `capacity` is a factor of the even share: at W, the default, nothing can be dropped,
    and W times the memory is reserved; below, rows beyond it are dropped: each expert of a crowded rank loses the same
    share of its rows, the last ones, and a dropped row gives zeros (its token keeps the residual). `ops.kept` tells the
    model how many rows are left, which reports the others as the metric `dropped`. All ranks must have the same R.

    `balanced` (dropless): take equal parts instead of the host read, for plans, which have no values to read. Where
    there are values and rows are not spread evenly, the device raises.

    `fused` (dropless): rows are exchanged as the table says (`ops.experts_over_ranks`), whose operators may multiply
    the rows that they exchange. The host reads the rows of each expert in its one read. A table that has no such
    operators exchanges as without. `num_chosen`: experts of a token, which operators may limit.

    The identity where ep is 1. Raises ValueError for an unknown kind, settings of the other kind, a capacity that is
    not positive, a model without experts, and ep that does not divide their number.
    """
    check_experts(kind, capacity=capacity, balanced=balanced, fused=fused)

    def transform(program: Program) -> Program:
        axis = program.mesh["ep"]
        if axis.size == 1:
            return program
        num_experts = _num_experts(program)
        note = (
            f"expert_parallel({kind!r}): {num_experts} experts, {num_experts // axis.size} on each of {axis.size} ranks"
        )
        ops, program = program.ops, uses(program, "ep")
        if kind == "dropless":
            note += ", rows taken to be spread evenly" if balanced else ""
            note += ", exchange fused with products where the table has it" if fused else ""
            return noted(replace(program, ops=_with_dropless(ops, axis, balanced, fused, num_chosen)), note)
        factor = min(capacity or axis.size, axis.size)
        note += f", room for {factor:g} times the even share of rows"
        note += ", nothing is dropped" if factor == axis.size else ", what is beyond it is dropped"
        experts = wrapping(partial(fixed, base=ops.experts, axis=axis, factor=factor), ops.experts)
        ops = replace(ops, experts=experts, kept=partial(kept_rows, num_ranks=axis.size, factor=factor))
        return noted(replace(program, ops=ops), note)

    return transform


def _with_dropless(ops: Ops, axis: Axis, balanced: bool, fused: bool, num_chosen: int | None) -> Ops:
    """The table with experts over the ranks of an axis, whose operators are those of what it is made of."""
    over_ranks = ops.experts_over_ranks if fused else UNFUSED
    experts = partial(dropless, base=ops.experts, axis=axis, balanced=balanced)
    experts = partial(experts, over_ranks=over_ranks, num_chosen=num_chosen)
    return replace(ops, experts=wrapping(experts, ops.experts, over_ranks))


def check_experts(kind: str, *, capacity: float | None = None, balanced: bool = False, fused: bool = False) -> None:
    """Raise ValueError for settings of `expert_parallel` that do not go together."""
    if kind not in EXPERT_KINDS:
        raise UserError(f"expert kind {kind!r} is unknown; use one of {', '.join(EXPERT_KINDS)}")
    if kind == "dropless" and capacity is not None:
        raise UserError(f"capacity is {capacity} but kind 'dropless' has none; leave it out or use kind 'capacity'")
    if kind == "capacity" and balanced:
        raise UserError("balanced has no effect with kind 'capacity', whose shapes are static; leave it out")
    if kind == "capacity" and fused:
        raise UserError(
            "fused needs the rows of each expert on the host, which kind 'capacity' never reads; use 'dropless'"
        )
    if capacity is not None and not capacity > 0:
        raise UserError(f"capacity is {capacity} but must be positive; 1 is the even share of each rank's rows")


def _num_experts(program: Program) -> int:
    """The number of experts, or ValueError where they cannot be spread over ep."""
    ep = program.mesh.layout.ep
    found = sizes_over(program.specs, "ep")
    if not found:
        raise UserError(f"layout {program.mesh.layout}: ep is {ep} but the model has no experts; set ep to 1")
    for path, num_experts in found.items():
        if num_experts % ep:
            fitting = ", ".join(str(n) for n in range(1, num_experts + 1) if num_experts % n == 0)
            raise UserError(
                f"layout {program.mesh.layout}: ep {ep} must divide the {num_experts} experts of {path}; use one of "
                f"{fitting}"
            )
    return next(iter(found.values()))


def dropless(
    x_RD: Tensor,
    counts_E: Tensor,
    weights: Tree,
    *,
    base: Experts,
    axis: Axis,
    balanced: bool = False,
    over_ranks: ExpertsOverRanks = UNFUSED,
    num_chosen: int | None = None,
) -> Tensor:
    """`ops.experts` with weights of this rank's experts alone; every row of an expert is computed.

    `over_ranks`: `ops.experts_over_ranks`. See `expert_parallel`.
    """
    to_WG = counts_E.view(axis.size, -1)
    routes = EpRoutes(
        axis=axis,
        to_WG=to_WG,
        from_WG=axis.all_to_all(to_WG, "expert counts"),
        num_rows=x_RD.shape[0],
        is_balanced=balanced,
        num_chosen=num_chosen,
    )
    return over_ranks(x_RD, weights, routes, base)


@dataclass(frozen=True, kw_only=True)
class EpRoutes:
    """`mmfn.ops.exchange.Routes` over ep. `num_rows`: of this rank; `is_balanced`: they are spread evenly."""

    axis: Axis
    to_WG: Tensor
    from_WG: Tensor
    num_rows: int
    is_balanced: bool
    num_chosen: int | None

    @property
    def size(self) -> int:
        """See `Routes`."""
        return self.axis.size

    @property
    def index(self) -> int:
        """See `Routes`."""
        return self.axis.index

    @property
    def group(self) -> str:
        """See `Routes`."""
        return "" if self.axis.transport is None else self.axis.transport.name

    def by_rank(self) -> tuple[list[int], list[int]]:
        """See `Routes`."""
        if self.is_balanced:
            sizes = _even(self.num_rows, self.to_WG, self.from_WG)
            return sizes, sizes
        to_W, from_W = _read(torch.stack([self.to_WG.sum(1), self.from_WG.sum(1)]))
        return to_W, from_W

    def by_expert(self) -> tuple[list[int], list[int]]:
        """See `Routes`."""
        if self.is_balanced:
            raise UserError(
                "rows that are taken to be spread evenly over ranks say nothing of experts; use fused=False"
            )
        to_E, from_E = _read(torch.stack([self.to_WG.flatten(), self.from_WG.flatten()]))
        return to_E, from_E

    def exchange(self, x_RD: Tensor, out_sizes: Sequence[int], in_sizes: Sequence[int]) -> Tensor:
        """See `Routes`."""
        return exchange(x_RD, self.axis, "experts", out_sizes, in_sizes)

    def exchanging(self) -> AbstractContextManager[None]:
        """See `Routes`."""
        return Collective("all_to_all", self.axis.name, "experts")


def _read(sizes_2W: Tensor) -> list[list[int]]:
    """The values, on the host. To what watches operators the copy is one; a compiler reads by operators of its own."""
    if not torch.compiler.is_compiling() and not is_eager(sizes_2W):
        sizes_2W = HOST_COPY.traced(sizes_2W)
    values: list[list[int]] = sizes_2W.tolist()
    return values


def _host_copy(x: Tensor) -> Tensor:
    """A complete copy in the host's memory."""
    return x.to("cpu", copy=True)


HOST_COPY = operator("mmfn::host_copy", _host_copy, lambda x: torch.empty_like(x, device="cpu"))


def _even(num_rows: int, to_WG: Tensor, from_WG: Tensor) -> list[int]:
    """Equal sizes for all ranks, checked on the device where there are values."""
    W = to_WG.shape[0]
    if num_rows % W:
        raise UserError(f"{num_rows} routed rows are not divisible by ep {W}, so they cannot be balanced; plan others")
    is_even = (torch.stack([to_WG, from_WG]).sum(2) == num_rows // W).all()
    assert_on_device(is_even, "balanced experts got rows that are not spread evenly; use balanced=False")
    return [num_rows // W] * W


def fixed(x_RD: Tensor, counts_E: Tensor, weights: Tree, *, base: Experts, axis: Axis, factor: float) -> Tensor:
    """`ops.experts` with weights of this rank's experts alone and static shapes. See `expert_parallel`."""
    R, W = x_RD.shape[0], axis.size
    room = _room(R, W, factor)
    kept_WE = kept_rows(counts_E, R, num_ranks=W, factor=factor).view(W, -1)
    to_WG = torch.cat([kept_WE, room - kept_WE.sum(1, keepdim=True)], 1)
    from_WG = axis.all_to_all(to_WG, "expert counts")
    row_S, slot_R = _slots(counts_E, to_WG, R, room)
    arrived_SD = exchange(pick(x_RD, row_S, slot_R), axis, "experts")
    y_SD = exchange(by_expert(arrived_SD, from_WG, weights, base, has_empty=True), axis, "experts")
    return pick(y_SD, slot_R, row_S)


def _room(num_rows: int, num_ranks: int, factor: float) -> int:
    """Rows that a rank sends to each rank: `factor` times the even share, rounded up."""
    return min(ceil(factor * num_rows / num_ranks), num_rows)


def kept_rows(counts_E: Tensor, num_rows: int, *, num_ranks: int, factor: float) -> Tensor:
    """`ops.kept` under a capacity: how many of the `counts_E` rows are computed; int64[E].

    Where more rows go to a rank than there is room for, all of its experts keep the same share of their rows.
    """
    room = _room(num_rows, num_ranks, factor)
    ends_WE = counts_E.view(num_ranks, -1).cumsum(1)
    kept_ends_WE = ends_WE * room // ends_WE[:, -1:].clamp(min=room)
    return kept_ends_WE.diff(dim=1, prepend=torch.zeros_like(ends_WE[:, :1])).flatten()


def _slots(counts_E: Tensor, to_WG: Tensor, num_rows: int, room: int) -> tuple[Tensor, Tensor]:
    """`(row_S, slot_R)`: which row fills each of the W * room slots, and which slot each row fills; -1 for none."""
    W, G = to_WG.shape
    S = W * room
    slots_S = torch.arange(S, device=to_WG.device)
    group_S = labels(torch.arange(W * G, device=to_WG.device), to_WG, S)
    first_row_WG = F.pad((counts_E.cumsum(0) - counts_E).view(W, G - 1), (0, 1))
    first_slot_WG = to_WG.flatten().cumsum(0).view(W, G) - to_WG
    row_S = slots_S + (first_row_WG - first_slot_WG).flatten().index_select(0, group_S)
    is_empty_S = group_S % G == G - 1
    slot_R = torch.full((num_rows + 1,), -1, device=to_WG.device)
    slot_R = slot_R.scatter(0, torch.where(is_empty_S, num_rows, row_S), slots_S)[:num_rows]
    return row_S.masked_fill(is_empty_S, -1), slot_R
