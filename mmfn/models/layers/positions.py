"""Multimodal rope positions, on the host, by the one rule of all families.

Legend: T tokens, B blocks, M tokens of a block, or of all of them.
"""

import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmfn.batch import AUDIO, TEXT, VIDEO, Sample
from mmfn.errors import UserError

Block = tuple[Tensor, Tensor]
"""(tokens_M: int64[M], which tokens of the sample are in it, increasing; places_3M: float32[3, M], their places)."""


def mrope(num_tokens: int, blocks: Iterable[Block], ends: Sequence[int] = (0, 1, 2)) -> Tensor:
    """float32[3, T], (temporal, height, width) positions: a block begins behind the token before it.

    A token's position is the start of its block plus its place in it, and a block starts at the largest position of the
    token before it plus 1 (the first at 0). A token that is in none of `blocks` is a block of its own, at place 0: so
    text advances all three by one. `blocks`: in the order of their first tokens; no two share a token. `ends`: the
    coordinates whose largest place ends a block; with fewer than all three, the next one may start below positions of
    this one. Places may be fractions: sums are in float32, as in the reference. (The last token of an image or a video
    lies behind all of it; of a video and its sound, by turns in one block, the last token alone counts there too.)

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
    lasts_B = lengths_B.cumsum(0) - 1
    firsts_B, ends_B = tokens_M[lasts_B + 1 - lengths_B], tokens_M[lasts_B] + 1
    extents_B = places_3M[list(ends)][:, lasts_B].amax(0)
    start, end, starts, behind = 0.0, 0, [], [0.0]  # where blocks start, and the text before the first and behind each
    for first, last, extent in zip(firsts_B.tolist(), ends_B.tolist(), extents_B.tolist(), strict=True):
        starts.append(_float32(start + first - end))
        start, end = _float32(_float32(starts[-1] + extent) + 1), last
        behind.append(start)
    runs = torch.cat([firsts_B[:1], firsts_B.diff(), num_tokens - firsts_B[-1:]])  # text and what is ahead of it
    ends_T, behind_T = (x.repeat_interleave(runs) for x in (pad(ends_B, (1, 0)), torch.tensor(behind)))
    positions_3T = (torch.arange(num_tokens) - ends_T + behind_T).repeat(3, 1)
    positions_3T[:, tokens_M] = places_3M + torch.tensor(starts).repeat_interleave(lengths_B)
    return positions_3T


def _float32(x: float) -> float:
    """The nearest number that float32 has."""
    nearest: float = struct.unpack("f", struct.pack("f", x))[0]
    return nearest


def blocks_of(sample: Sample, places: Mapping[int, Iterable[Tensor]]) -> Iterator[Block]:
    """The placeholders of a sample as blocks of `mrope`, one for each of `places[kind]`: float32[3, M], in order.

    In a run of placeholders blocks lie one behind the other; but a video and its sound, one run of both kinds, are one
    block: they share their start, however they interleave. Raises ValueError where a run does not match its media.
    """
    left = {kind: iter(blocks) for kind, blocks in places.items()}
    kinds, lengths = torch.unique_consecutive(sample.kinds_T, return_counts=True)
    tokens_T, end = torch.arange(sample.kinds_T.numel()), 0
    pieces = zip(kinds.tolist(), lengths.tolist(), strict=True)
    for run, group in groupby(pieces, lambda piece: VIDEO if piece[0] == AUDIO else piece[0]):
        there: Counter[int] = Counter()
        for kind, length in group:
            there[kind] += length
        first, end = end, end + there.total()
        if len(there) > 1:
            yield tokens_T[first:end], _by_turns(sample, sample.kinds_T[first:end], there, left)
            continue
        while run != TEXT and first < end:
            places_3M = _next(sample, left[kind], end - first)
            yield tokens_T[first : first + places_3M.shape[1]], places_3M
            first += places_3M.shape[1]


def _by_turns(
    sample: Sample, kinds_M: Tensor, there: Mapping[int, int], left: Mapping[int, Iterator[Tensor]]
) -> Tensor:
    """Places of a run that is one medium of each of its kinds."""
    places_3M = torch.empty(3, len(kinds_M))
    for kind, number in sorted(there.items()):
        places_3M[:, kinds_M == kind] = _next(sample, left[kind], number, is_all=True)
    return places_3M


def _next(sample: Sample, left: Iterator[Tensor], number: int, *, is_all: bool = False) -> Tensor:
    """Places of the next medium. Raises ValueError where they do not fit the `number` of tokens left in a run."""
    places_3M = next(left, None)
    size = 0 if places_3M is None else places_3M.shape[1]
    if places_3M is None or not 0 < size <= number or (is_all and size < number):
        raise UserError(
            f"sample {sample.id!r} has a run of placeholder tokens with {number} left where the next image, frame, "
            f"video or clip gives {size}; make the text and the media agree"
        )
    return places_3M
