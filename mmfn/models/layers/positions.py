"""Multimodal rope positions of one sample, on the host. Legend: T tokens."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mmfn.batch import IMAGE, TEXT, VIDEO, Sample


def mrope(sample: Sample, merge_size: int) -> Tensor:
    """int64[3, T]: (temporal, height, width) positions, as Qwen3-VL counts them.

    Text advances all three by one. A visual block at `start` has height and width `start + row`, `start + column` in
    merged cells and the next token follows at `start + max(h, w) / merge_size`. Every temporal grid of a video is a
    block of its own (timestamps stand between them). Adjacent blocks are told apart by their grids, not by the text
    between them. Raises ValueError when a run of placeholders does not match its grids.

    Source: `Qwen3VLModel.get_rope_index` in transformers 5.23 (which needs a text token between two blocks).
    """
    blocks = {IMAGE: iter(m.grid for m in sample.images), VIDEO: _frames(sample)}
    kinds, lengths = torch.unique_consecutive(sample.kinds_T, return_counts=True)
    parts, start = [torch.zeros(3, 0, dtype=torch.int64)], 0
    for kind, length in zip(kinds.tolist(), lengths.tolist(), strict=True):
        if kind == TEXT:
            parts.append(torch.arange(start, start + length).expand(3, -1))
            start += length
            continue
        left = length
        while left > 0:
            t, h, w = next(blocks[kind], (0, 0, 0))
            rows, columns = h // merge_size, w // merge_size
            size = t * rows * columns
            if not 0 < size <= left:
                raise ValueError(
                    f"sample {sample.id!r} has a run of {length} visual placeholder tokens with {left} left where "
                    f"the next image or frame gives {size}; make the text and the media agree"
                )
            parts.append(torch.cartesian_prod(*map(torch.arange, (t, rows, columns))).T + start)
            start += max(rows, columns)
            left -= size
    return torch.cat(parts, dim=1)


def _frames(sample: Sample) -> Iterator[tuple[int, int, int]]:
    for media in sample.videos:
        t, h, w = media.grid
        yield from [(1, h, w)] * t
