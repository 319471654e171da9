"""What a step sums over ranks besides gradients: label counts, the gradient norm, metrics."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mmfn.errors import UserError
from mmfn.parallel.mesh.axis import MismatchError
from mmfn.parallel.mesh.layout import Mesh


def all_counts(counts_AN: Tensor, mesh: Mesh) -> tuple[Tensor, int]:
    """Label counts of all ranks with their own data, int64[D, A, N], and which of the D this rank is.

    `counts_AN`: of the A micro-batches of this rank, equally many on all. Ranks of one cp group share theirs, so their
    counts are added. Raises ValueError where virtual ranks bring different numbers of either.
    """
    if mesh.layout.world == 1:
        return counts_AN[None], 0
    try:  # ranks in order: batches, and within one its shares
        gathered = mesh["world"].all_gather(counts_AN[None], "counts")
    except MismatchError as error:
        found = ", ".join(f"{shape[1]} of {shape[2]} on rank {rank}" for rank, shape in enumerate(error.shapes))
        raise UserError(
            f"ranks are given different micro-batches: {found} (micro-batches of segments); give every rank equally "
            "many, packed for one number of segments"
        ) from error
    counts_DAN = gathered.view(mesh["batch"].size, mesh["cp"].size, *counts_AN.shape).sum(1)
    return counts_DAN, mesh["batch"].index


def norm_and_sums(norm: Tensor, shares: Mapping[str, Tensor], mesh: Mesh) -> tuple[Tensor, dict[str, Tensor]]:
    """The global norm from the norm of this rank's shards, and the sums of shares of any shape: one all-reduce for all.

    Every shard is held by `replicate` ranks, so the sum of squares counts it as often. Dtypes are kept. Counts are
    exact, below 2**53 in all, also where ranks add up float32 alone: they travel in digits, whose sums are exact there.
    """
    if mesh.layout.world == 1:
        return norm, dict(shares)
    axis = mesh["world"]
    is_split = {name: not x.is_floating_point() and axis.widest == torch.float32 for name, x in shares.items()}
    parts = [digits(x, axis.size) if is_split[name] else x.to(axis.widest) for name, x in shares.items()]
    flat = [norm.to(axis.widest).square().view(1), *(part.reshape(-1) for part in parts)]
    summed = axis.all_reduce(torch.cat(flat), "metrics")
    squared, *totals = torch.split(summed, [x.numel() for x in flat])
    sums = {}
    for (name, x), part, total in zip(shares.items(), parts, totals, strict=True):
        whole = total.view(part.shape)
        sums[name] = (numbers(whole, axis.size) if is_split[name] else whole).to(x.dtype)
    return (squared[0] / mesh.layout.replicate).sqrt().to(norm.dtype), sums


def _bits(num_ranks: int) -> int:
    """Bits of a digit of which `num_ranks` add up to an exact float32: below 2**24."""
    return 24 - (num_ranks - 1).bit_length()


def digits(counts: Tensor, num_ranks: int) -> Tensor:
    """Counts from 0 to 2**53 as float32 digits in a last dim, lowest first, whose sums over `num_ranks` are exact.

    >>> digits(torch.tensor(2**22 + 3), num_ranks=4)
    tensor([3., 1., 0.])
    """
    bits = _bits(num_ranks)
    starts_N = torch.arange(0, 53, bits, device=counts.device)
    values: Tensor = (counts.long()[..., None] >> starts_N) & (2**bits - 1)
    return values.float()


def numbers(summed: Tensor, num_ranks: int) -> Tensor:
    """The sums of counts, int64, from those of their `digits`."""
    starts_N = torch.arange(0, 53, _bits(num_ranks), device=summed.device)
    total: Tensor = (summed.long() << starts_N).sum(-1)
    return total
