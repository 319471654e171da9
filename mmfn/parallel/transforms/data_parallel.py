"""`data_parallel`: parameters sharded over dp and cp (FSDP), replicated over the axis of that name (HSDP)."""

from dataclasses import replace

from mmfn.errors import UserError
from mmfn.parallel.program import Program, Transform, noted, uses
from mmfn.parallel.weights.gradient_sums import MOST_UNDER_WAY


def data_parallel(
    *,
    prefetch: bool = True,
    keep_gathered: bool = False,
    reshard_after_forward: bool = False,
    sums_under_way: int = MOST_UNDER_WAY,
) -> Transform:
    """Shard every parameter over dp * cp ranks, and sum gradients over all ranks.

    Placement of a dense leaf: (Replicate on replicate, Shard(0) on shard); of experts: Shard(1) on edp beside what
    `expert_parallel` does. Before a block runs its leaves are gathered in one bucket per dtype; the gradient comes back
    by one reduce-scatter over the same axis, and its sum over a step's micro-batches by one all-reduce over the
    replicas if there are any.

    `prefetch`: the next block's gather is under way while a block runs, forward and, where blocks gather again,
    backward. `keep_gathered`: with `remat`, whole weights of all blocks are kept from the forward, one gather per block
    instead of two. `reshard_after_forward`: without `remat` autograd keeps them; with this, those of a block go behind
    its forward and are gathered again in its backward, and nothing is computed again. `sums_under_way`: so many
    reduce-scatters run beside the backward of the blocks before, at most; 0: each is waited for. Each holds a block's
    gradients, whole. Graphs that have their gathers in them (`compiled`) wait for each.

    On one device nothing is gathered or summed, and the first three are for the copies of parameters that lie on the
    host (`offload`). Graphs that have their gathers in them keep what they like: with such, `reshard_after_forward` is
    refused when the program is lowered. Raises ValueError for it beside `keep_gathered`.
    """

    check_weights(keep_gathered=keep_gathered, reshard_after_forward=reshard_after_forward)

    def transform(program: Program) -> Program:
        layout = program.mesh.layout
        weights = replace(
            program.weights,
            prefetch=prefetch,
            keep_gathered=keep_gathered,
            reshard_after_forward=reshard_after_forward,
            sums_under_way=sums_under_way,
        )
        done = replace(program, weights=weights)
        if layout.world == 1:
            return done
        note = f"data_parallel: parameters over {layout.shard} ranks"
        note += f", {layout.replicate} replicas" if layout.replicate > 1 else ""
        note += ", next gather ahead" if prefetch else ""
        note += ", weights kept for the backward" if keep_gathered else ""
        note += ", weights released behind the forward" if reshard_after_forward else ""
        note += f", {sums_under_way} sums of gradients behind" if sums_under_way else ""
        return noted(uses(done, "dp", "replicate"), note)

    return transform


def check_weights(*, keep_gathered: bool, reshard_after_forward: bool) -> None:
    """Raise ValueError for whole weights that shall both stay and go."""
    if keep_gathered and reshard_after_forward:
        raise UserError("keep_gathered keeps whole weights and reshard_after_forward releases them; choose one of them")
