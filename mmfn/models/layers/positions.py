"""Multimodal rope positions, on the host, by the one rule of all families. Legend: T tokens, M tokens of a block."""

from collections.abc import Iterable

import torch
from torch import Tensor

Block = tuple[Tensor, Tensor]
"""(tokens_M: int64[M], which tokens of the sample are in it, increasing; places_3M: float32[3, M], their places)."""


def mrope(num_tokens: int, blocks: Iterable[Block]) -> Tensor:
    """float32[3, T], (temporal, height, width) positions: a block begins behind everything before it.

    A token's position is the start of its block plus its place in it, and a block starts at the largest position before
    it plus 1 (the first at 0). A token that is in none of `blocks` is a block of its own, at place 0: so text advances
    all three by one. `blocks`: in the order of their first tokens; no two share a token.

    >>> row_column = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1.0]])  # an image of 2 x 2 features
    >>> mrope(7, [(torch.arange(1, 5), row_column)])[1].tolist()  # text, the image, two more of text
    [0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 4.0]

    Source: the positions of every family's `get_rope_index` in transformers 5.23 follow from it.
    """
    positions_3T = torch.zeros(3, num_tokens)
    start, done = 0.0, 0  # of what comes next, and the tokens that have positions
    for tokens_M, places_3M in blocks:
        first = int(tokens_M[0])
        start = _text_(positions_3T, done, first, start)
        positions_3T[:, tokens_M] = places_3M + start
        start += float(places_3M.max()) + 1
        done = int(tokens_M[-1]) + 1
    _text_(positions_3T, done, num_tokens, start)
    return positions_3T


def _text_(positions_3T: Tensor, first: int, last: int, start: float) -> float:
    """Give the tokens from `first` to `last` (exclusive) positions from `start` on; what the next one starts at."""
    positions_3T[:, first:last] = torch.arange(last - first) + start
    return start + (last - first)
