"""Rounding up or down at random, without a generator: the same on every layout, rank and rerun."""

import torch
from torch import Tensor

MIXERS = (0x7FEB352D, 0x846CA68B - 2**32)  # factors of a 32-bit hash, as signed numbers


def round_(narrow: Tensor, values: Tensor, count: Tensor) -> None:
    """Write `values` to `narrow`; to bfloat16 from float32 (float64 as its nearest), up with the probability of the
    lost part.

    The chance is a hash of the value itself and of `count`, the 0-D number of the update. So there is no generator's
    state, a shard rounds as the whole would, and what bfloat16 holds exactly stays as it is. Values must be finite.
    Source of the hash: "lowbias32", Wellons, Prospecting for hash functions (2018).
    """
    if narrow.dtype != torch.bfloat16 or values.dtype == torch.bfloat16:
        narrow.copy_(values)
        return
    bits = values.float().view(torch.int32)
    chance = _hash(bits ^ (count.to(torch.int32) * MIXERS[1])) & 0xFFFF
    narrow.copy_(((bits + chance) & ~0xFFFF).view(torch.float32))  # exact: the lower half is zero


def _hash(x: Tensor) -> Tensor:
    for factor, shift in zip(MIXERS, (16, 15), strict=True):
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 16)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Shift right, filling with zeros: torch's own repeats the sign."""
    return (x >> by) & ((1 << (32 - by)) - 1)
