"""Multimodal rope positions, on the host, by the one rule of all families.

Legend: T tokens, B blocks, M tokens of a block, or of all of them.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

Block = tuple[Tensor, Tensor]
"""(tokens_M: int64[M], which tokens of the sample are in it, increasing; places_3M: float32[3, M], their places)."""


def mrope(num_tokens: int, blocks: Iterable[Block], ends: Sequence[int] = (0, 1, 2)) -> Tensor:
    """float32[3, T], (temporal, height, width) positions: a block begins behind everything before it.

    A token's position is the start of its block plus its place in it, and a block starts at the largest position before
    it plus 1 (the first at 0). A token that is in none of `blocks` is a block of its own, at place 0: so text advances
    all three by one. `blocks`: in the order of their first tokens; no two share a token. `ends`: the coordinates whose
    largest place ends a block; with fewer than all three, the next one may start below positions of this one.

    >>> row_column = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1.0]])  # an image of 2 x 2 features
    >>> mrope(7, [(torch.arange(1, 5), row_column)])[1].tolist()  # text, the image, two more of text
    [0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 4.0]

    Source: the positions of every family's `get_rope_index` in transformers 5.23 follow from it.
    """
    blocks = list(blocks)
    if not blocks:
        return torch.arange(num_tokens).float().repeat(3, 1)
    lengths_B = torch.tensor([tokens_M.numel() for tokens_M, _ in blocks])
    tokens_M, places_3M = torch.cat([tokens for tokens, _ in blocks]), torch.cat([places for _, places in blocks], 1)
    firsts_B, ends_B = tokens_M[lengths_B.cumsum(0) - lengths_B], tokens_M[lengths_B.cumsum(0) - 1] + 1
    extents_B = torch.segment_reduce(places_3M[list(ends)].amax(0), "max", lengths=lengths_B)
    start, end, starts, behind = 0.0, 0, [], [0.0]  # where blocks start, and the text before the first and behind each
    for first, last, extent in zip(firsts_B.tolist(), ends_B.tolist(), extents_B.tolist(), strict=True):
        starts.append(start + first - end)
        start, end = starts[-1] + extent + 1, last
        behind.append(start)
    runs = torch.cat([firsts_B[:1], firsts_B.diff(), num_tokens - firsts_B[-1:]])  # text and what is ahead of it
    ends_T, behind_T = (x.repeat_interleave(runs) for x in (pad(ends_B, (1, 0)), torch.tensor(behind)))
    positions_3T = (torch.arange(num_tokens) - ends_T + behind_T).repeat(3, 1)
    positions_3T[:, tokens_M] = places_3M + torch.tensor(starts).repeat_interleave(lengths_B)
    return positions_3T
