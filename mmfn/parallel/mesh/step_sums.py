"""What a step sums over ranks besides gradients: label counts, the gradient norm, metrics."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mmfn.parallel.mesh.layout import Mesh


def all_counts(counts_AN: Tensor, mesh: Mesh) -> tuple[Tensor, int]:
    """Label counts of all ranks with their own data, int64[D, A, N], and which of the D this rank is.

    `counts_AN`: of the A micro-batches of this rank, equally many on all. Ranks of one cp group share theirs, so their
    counts are added.
    """
    if mesh.layout.world == 1:
        return counts_AN[None], 0
    gathered = mesh["world"].all_gather(counts_AN[None], "counts")  # ranks in order: batches, and within one its shares
    counts_DAN = gathered.view(mesh["batch"].size, mesh["cp"].size, *counts_AN.shape).sum(1)
    return counts_DAN, mesh["batch"].index


def norm_and_sums(norm: Tensor, shares: Mapping[str, Tensor], mesh: Mesh) -> tuple[Tensor, dict[str, Tensor]]:
    """The global norm from the norm of this rank's shards, and the sums of shares of any shape: one all-reduce for all.

    Every shard is held by `replicate` ranks, so the sum of squares counts it as often. Dtypes are kept.
    """
    if mesh.layout.world == 1:
        return norm, dict(shares)
    dtype = torch.float32 if norm.device.type == "npu" else torch.float64  # what hccl can add up
    flat = [norm.to(dtype).square().view(1), *(x.to(dtype).reshape(-1) for x in shares.values())]
    summed = mesh["world"].all_reduce(torch.cat(flat), "metrics")
    squared, *totals = torch.split(summed, [x.numel() for x in flat])
    sums = {name: total.view(x.shape).to(x.dtype) for (name, x), total in zip(shares.items(), totals, strict=True)}
    return (squared[0] / mesh.layout.replicate).sqrt().to(norm.dtype), sums
