"""Segments as kernels of flash-linear-attention want them: cut into chunks, whose places are worked out on the device.

Legend: T tokens, N segments, B chunks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
"""Tokens of a chunk: what its functions take without being told."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Neighbouring segments that one call takes, and their tokens from `start` on, before `end`.

    `offsets_N`, on the device, and `host_N` begin at 0. `is_entered`, `is_left`: whether it is the first segment alone,
    which a state enters, or the last one alone, whose end state has a gradient.
    """

    start: int
    end: int
    offsets_N: Tensor
    host_N: Tensor
    is_entered: bool = False
    is_left: bool = False

    def of(self, *rows: Tensor) -> list[Tensor]:
        """Its tokens of packed rows, as a batch of one: [1, L, ...], dense."""
        return [x[None, self.start : self.end].contiguous() for x in rows]

    def chunks(self) -> Tensor:
        """The segment of every chunk and which of its chunks it is: int[B, 2]."""
        counts_N, num = -(-self.offsets_N.diff() // CHUNK), num_chunks(self.host_N)
        numbers_N = torch.arange(len(counts_N), device=counts_N.device)
        segment_B = torch.repeat_interleave(numbers_N, counts_N, output_size=num)
        first_N = counts_N.cumsum(0) - counts_N
        place_B = torch.arange(num, device=counts_N.device) - first_N[segment_B]
        return torch.stack([segment_B, place_B], 1).to(self.offsets_N.dtype)


def runs(offsets_N: Tensor, host_N: Tensor, *, is_entered: bool = False, is_left: bool = False) -> Iterator[Run]:
    """All segments with tokens in as few calls as can be: the first apart where it is entered, the last where left."""
    filled = host_N.diff().nonzero()[:, 0].tolist()
    if not filled:
        return
    first, last = filled[0], filled[-1]
    inner = {first + 1} if is_entered else set[int]()
    inner |= {last} if is_left else set()
    for a, b in pairwise(sorted({first, last + 1} | inner)):
        start, end = int(host_N[a]), int(host_N[b])
        if start == end:  # empty segments between the first and the last
            continue
        yield Run(
            start=start,
            end=end,
            offsets_N=offsets_N[a : b + 1] - start,
            host_N=host_N[a : b + 1] - start,
            is_entered=is_entered and a == first,
            is_left=is_left and b == last + 1,
        )


def num_chunks(host_N: Tensor) -> int:
    """Chunks of all segments, none of which spans two."""
    return int((-(-host_N.diff() // CHUNK)).sum())


def join(parts: list[Tensor], num_tokens: int) -> Tensor:
    """Results of runs, [1, L, ...] each, as one packed row, zeros behind it; `parts` must not be empty."""
    x_T = torch.cat(parts, 1)[0] if len(parts) > 1 else parts[0][0]
    return F.pad(x_T, (0, 0) * (x_T.ndim - 1) + (0, num_tokens - len(x_T))) if len(x_T) < num_tokens else x_T
