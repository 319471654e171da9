"""`expert_parallel`: a rank computes its own experts; the rows routed to them come from all ranks of ep, and go back.

Legend: R routed rows of a rank (U of them have an expert), S rows that arrive at it, D width, E experts, W ranks of ep,
G groups of the rows from one rank to another: one for each of the E / W experts there, and with a capacity a last one
of empty rows.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfn.errors import UserError
from mmfn.ops.custom import Context, function, operator
from mmfn.ops.eager import is_eager
from mmfn.ops.kernel import wrapping
from mmfn.parallel.mesh.axis import Axis, exchange
from mmfn.parallel.program import Program, Transform, noted, uses
from mmfn.parallel.weights.sharding import sizes_over
from mmfn.torch_private import assert_on_device, tell_compiler
from mmfn.tree import Tree

EXPERT_KINDS = ("dropless", "capacity")
Experts = Callable[[Tensor, Tensor, Tree], Tensor]  # ops.experts: (x_RD, counts_E, weights) -> y_RD


def expert_parallel(kind: str = "dropless", *, capacity: float | None = None, balanced: bool = False) -> Transform:
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

    The identity where ep is 1. Raises ValueError for an unknown kind, settings of the other kind, a capacity that is
    not positive, a model without experts, and ep that does not divide their number.
    """
    if kind not in EXPERT_KINDS:
        raise UserError(f"expert kind {kind!r} is unknown; use one of {', '.join(EXPERT_KINDS)}")
    if kind == "dropless" and capacity is not None:
        raise UserError(f"capacity is {capacity} but kind 'dropless' has none; leave it out or use kind 'capacity'")
    if kind == "capacity" and balanced:
        raise UserError("balanced has no effect with kind 'capacity', whose shapes are static; leave it out")
    if capacity is not None and not capacity > 0:
        raise UserError(f"capacity is {capacity} but must be positive; 1 is the even share of each rank's rows")

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
            spread = partial(dropless, base=ops.experts, axis=axis, balanced=balanced)
            ops = replace(ops, experts=wrapping(spread, ops.experts))
            return noted(replace(program, ops=ops), note)
        factor = min(capacity or axis.size, axis.size)
        note += f", room for {factor:g} times the even share of rows"
        note += ", nothing is dropped" if factor == axis.size else ", what is beyond it is dropped"
        ops = replace(
            ops,
            experts=wrapping(partial(fixed, base=ops.experts, axis=axis, factor=factor), ops.experts),
            kept=partial(kept_rows, num_ranks=axis.size, factor=factor),
        )
        return noted(replace(program, ops=ops), note)

    return transform


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
    x_RD: Tensor, counts_E: Tensor, weights: Tree, *, base: Experts, axis: Axis, balanced: bool = False
) -> Tensor:
    """`ops.experts` with weights of this rank's experts alone; every row of an expert is computed.

    See `expert_parallel`.
    """
    R, W = x_RD.shape[0], axis.size
    to_WG = counts_E.view(W, -1)
    from_WG = axis.all_to_all(to_WG, "expert counts")
    if balanced:
        sizes_out = sizes_in = _even(R, to_WG, from_WG)
    else:
        sizes_in, sizes_out = _read(torch.stack([to_WG.sum(1), from_WG.sum(1)]))
    arrived_SD = exchange(_first(x_RD, sum(sizes_in)), axis, "experts", sizes_out, sizes_in)
    y_SD = _by_expert(arrived_SD, from_WG, weights, base)
    return _with_rest(exchange(y_SD, axis, "experts", sizes_in, sizes_out), R)


def _first(x_RD: Tensor, used: int) -> Tensor:
    """The first rows. A compiler, which does not know how many there are, always gets a slice."""
    if torch.compiler.is_compiling():
        tell_compiler(used <= x_RD.shape[0])
    elif used == x_RD.shape[0]:
        return x_RD
    return x_RD.narrow(0, 0, used)


def _with_rest(y_UD: Tensor, num_rows: int) -> Tensor:
    """`num_rows` rows, zeros behind those there are."""
    if not torch.compiler.is_compiling() and y_UD.shape[0] == num_rows:
        return y_UD
    return torch.cat([y_UD, y_UD.new_zeros(num_rows - y_UD.shape[0], y_UD.shape[1])])


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
    arrived_SD = exchange(_pick(x_RD, row_S, slot_R), axis, "experts")
    y_SD = exchange(_by_expert(arrived_SD, from_WG, weights, base, has_empty=True), axis, "experts")
    return _pick(y_SD, slot_R, row_S)


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
    group_S = _labels(torch.arange(W * G, device=to_WG.device), to_WG, S)
    first_row_WG = F.pad((counts_E.cumsum(0) - counts_E).view(W, G - 1), (0, 1))
    first_slot_WG = to_WG.flatten().cumsum(0).view(W, G) - to_WG
    row_S = slots_S + (first_row_WG - first_slot_WG).flatten().index_select(0, group_S)
    is_empty_S = group_S % G == G - 1
    slot_R = torch.full((num_rows + 1,), -1, device=to_WG.device)
    slot_R = slot_R.scatter(0, torch.where(is_empty_S, num_rows, row_S), slots_S)[:num_rows]
    return row_S.masked_fill(is_empty_S, -1), slot_R


def _by_expert(arrived_SD: Tensor, from_WG: Tensor, weights: Tree, base: Experts, *, has_empty: bool = False) -> Tensor:
    """`base` for rows that lie by source rank, and by group within one: sorted by expert, computed, put back."""
    W, G = from_WG.shape
    S = arrived_SD.shape[0]
    group_S = _labels(torch.arange(G, device=from_WG.device).repeat(W), from_WG, S)
    order_S = group_S.argsort(stable=True)  # empty rows, the last group, go behind the last expert's
    place_S = torch.empty_like(order_S).scatter(0, order_S, torch.arange(S, device=order_S.device))
    counts_G = from_WG.sum(0)
    y_SD = base(_permute(arrived_SD, order_S, place_S), counts_G[:-1] if has_empty else counts_G, weights)
    return _permute(y_SD, place_S, order_S)


def _labels(values: Tensor, counts: Tensor, num_rows: int) -> Tensor:
    """`values[i]` repeated `counts[i]` times; told the sum, the host need not read it."""
    return values.repeat_interleave(counts.flatten(), output_size=num_rows)


def _permute(x_SD: Tensor, index_S: Tensor, inverse_S: Tensor) -> Tensor:
    """`x_SD[index_S]` of a permutation and its inverse: the gradient is a permutation too, and adds nothing up."""
    y_SD: Tensor = _rows(x_SD, index_S, inverse_S, False)
    return y_SD


def _pick(x_RD: Tensor, index_S: Tensor, inverse_R: Tensor) -> Tensor:
    """`_permute` of the rows that are in both; where an index is -1, zeros."""
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
