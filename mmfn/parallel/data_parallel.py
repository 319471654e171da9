"""`data_parallel`: parameters sharded over dp and cp (FSDP), replicated over the axis of that name (HSDP)."""

from mmfn.parallel.program import Program, Transform, noted, uses


def data_parallel() -> Transform:
    """Shard every parameter over dp * cp ranks, and sum gradients over all ranks.

    Placement of a dense leaf: (Replicate on replicate, Shard(0) on shard); of experts: Shard(1) on edp beside what
    `expert_parallel` does. Before a block runs its leaves are gathered in one bucket per dtype; the gradient comes back
    by one reduce-scatter over the same axis, and one all-reduce over the replicas if there are any.
    """

    def transform(program: Program) -> Program:
        layout = program.mesh.layout
        if layout.world == 1:
            return program
        note = f"data_parallel: parameters over {layout.shard} ranks"
        note += f", {layout.replicate} replicas" if layout.replicate > 1 else ""
        return noted(uses(program, "dp", "replicate"), note)

    return transform
