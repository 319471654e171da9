"""Which tokens of a batch a context-parallel rank holds, and in which order.

| kind | order of the tokens on ring rank r of W, ulysses rank u of U |
|---|---|
| ulysses | the u-th of U equal parts of the row |
| ring | of every segment chunk r of 2W, then of every segment chunk 2W - 1 - r |
| usp | the u-th of U equal parts of ring rank r's tokens |
| gather | chunks r and 2W - 1 - r of the row's 2W |

Legend: T tokens of the whole row, N segments.
"""

from dataclasses import replace
from math import lcm

import torch
from torch import Tensor

from mmfn.batch import Batch, Segments, map_tokens
from mmfn.errors import UserError
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.layout import Layout, Mesh

CP_KINDS = ("ulysses", "ring", "usp", "gather")
PIECE_KINDS = ("ulysses", "gather")
"""Those that cut the row, and not every segment: what passes from token to token passes from piece to piece."""


def token_multiple(kind: str, layout: Layout) -> int:
    """What the number of tokens of a packed batch must be a multiple of."""
    if kind == "ulysses":
        return layout.cp
    return 2 * layout.cp if kind == "gather" else lcm(2 * layout.ring, layout.cp)


def segment_multiple(kind: str, layout: Layout) -> int:
    """What the length of every segment must be a multiple of: the `segment_multiple` of `mmfn.packing.Sizes`."""
    return 2 * layout.ring if kind in ("ring", "usp") and layout.ring > 1 else 1


def token_order(offsets_N: Tensor, num_tokens: int, kind: str, mesh: Mesh) -> Tensor:
    """Places in the whole row of this rank's tokens: int64[T / cp].

    Raises ValueError for a number of tokens, or a segment, that cannot be divided among the ranks.
    """
    layout, least = mesh.layout, token_multiple(kind, mesh.layout)
    if num_tokens % least:
        raise UserError(
            f"the batch has {num_tokens} tokens but context_parallel({kind!r}) over {layout} needs a multiple of "
            f"{least}; round the token bucket up to {-(-num_tokens // least) * least}"
        )
    if kind == "gather":
        return chunk_order(num_tokens, mesh["cp"])
    if kind == "ulysses":
        return torch.arange(num_tokens).chunk(layout.cp)[mesh["cp"].index]
    return ring_order(offsets_N, num_tokens, mesh["ring"]).chunk(layout.ulysses)[mesh["ulysses"].index]


def chunk_order(num_tokens: int, axis: Axis) -> Tensor:
    """Chunks r and 2W - 1 - r of the whole row."""
    chunks = torch.arange(num_tokens).chunk(2 * axis.size)
    return torch.cat([chunks[axis.index], chunks[-1 - axis.index]])


def pieces(kind: str, num_tokens: int, axis: Axis) -> tuple[tuple[int, int], ...]:
    """First and last (exclusive) place in the whole row of this rank's pieces: one, or two of kind "gather".

    `num_tokens`: of this rank.
    """
    if kind != "gather":
        return ((axis.index * num_tokens, (axis.index + 1) * num_tokens),)
    size = num_tokens // 2
    return tuple((i * size, (i + 1) * size) for i in (axis.index, 2 * axis.size - 1 - axis.index))


def cut(segments: Segments, start: int, end: int) -> Segments:
    """Those of the tokens from `start` to `end` alone, which lie on this rank."""
    return replace(segments.map(lambda offsets_N: offsets_N.clamp(start, end) - start), spread="")


def ring_order(offsets_N: Tensor, num_tokens: int, axis: Axis) -> Tensor:
    """Chunk r of every segment, then chunk 2W - 1 - r of every segment; padding behind the last is one more segment.

    Raises ValueError for a segment whose length is no multiple of 2W.
    """
    num_chunks = 2 * axis.size
    if bool((uneven_N := offsets_N.diff() % num_chunks != 0).any()):
        length = int(offsets_N.diff()[uneven_N][0])
        raise UserError(
            f"a segment has {length} tokens but a ring of {axis.size} ranks needs multiples of {num_chunks}; pack with "
            f"segment_multiple={num_chunks}"
        )
    bounds = torch.cat([offsets_N.long(), torch.tensor([num_tokens])])
    place = torch.arange(num_tokens // num_chunks)  # in the row made of one chunk of every segment
    segment = torch.searchsorted(bounds // num_chunks, place, right=True) - 1
    start, chunk = bounds[segment], bounds.diff()[segment] // num_chunks
    first = start + place - start // num_chunks
    return torch.cat([first + i * chunk for i in (axis.index, num_chunks - 1 - axis.index)])


def split_tokens(batch: Batch, kind: str, mesh: Mesh) -> Batch:
    """This rank's tokens of a batch on the host. `segments` keep the boundaries of the whole row; towers stay whole.

    Raises ValueError as `token_order` does.
    """
    order = token_order(batch.segments.host_N, batch.tokens_T.shape[0], kind, mesh)
    own = map_tokens(batch, lambda x: x[..., order])
    return replace(own, segments=replace(batch.segments, spread="cp"))
