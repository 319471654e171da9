"""Images and videos as a tower of merged patches: how they are laid on the host, and where their tokens are.

A frame (an image, or one step in time of a video) attends to itself alone. Legend: T tokens, P patches, N features.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from mmfn.batch import IMAGE, TEXT, VIDEO, Laid, Media, Sample, TowerKind
from mmfn.errors import UserError
from mmfn.models.layers.positions import Block

NAMES = {IMAGE: "image", VIDEO: "video"}


def tower_kind(merge_size: int, num_values: int, matmul_patches: int) -> TowerKind:
    """Patches in merge blocks of `merge_size`**2, each one feature. `matmul_patches`: `TowerKind.matmul_rows`."""
    merged = merge_size**2
    return TowerKind(
        media=(IMAGE, VIDEO),
        inputs=merged,
        rows=merged,
        features=1,
        values=num_values,
        segments_per_unit=(1,),
        matmul_rows=matmul_patches,
    )


def lay_frames(sample: Sample, merge_size: int, num_values: int) -> Laid:
    """The patches of a sample, images before videos, in merge-block order; `coords_P4` are row, column and grid size.

    Raises ValueError for media that do not fit the tower, and placeholders that do not fit the media.
    """
    media = sample.media(IMAGE, VIDEO)
    for medium in media:
        _check_grid(sample, medium, merge_size, num_values)
    _check_placeholders(sample, merge_size)
    frames = [h * w for m in media for t, h, w in [m.grid] for _ in range(t)]
    coords = [grid_coords(m.grid, merge_size) for m in media]
    return Laid(
        inputs=tuple(m.inputs_UF for m in media),
        coords_P4=torch.cat([torch.zeros(0, 4, dtype=torch.int32), *coords]),
        segments=(tuple(frames),),
        items=tuple(n // merge_size**2 for n in frames),
        index_T=_feature_index(sample, merge_size),
    )


def frame_blocks(sample: Sample, merge_size: int) -> Iterator[Block]:
    """The placeholders of each image and frame with their (0, row, column) in merged cells, as blocks of `mrope`.

    Adjacent frames are told apart by their grids, not by the text between them. Raises ValueError when a run of
    placeholders does not match its grids.
    """
    grids = {IMAGE: _grids(sample.images, is_video=False), VIDEO: _grids(sample.videos, is_video=True)}
    kinds, lengths = torch.unique_consecutive(sample.kinds_T, return_counts=True)
    tokens_T, first = torch.arange(sample.kinds_T.numel()), 0
    for kind, length in zip(kinds.tolist(), lengths.tolist(), strict=True):
        first, end = first + length, first + length
        place = end - length
        while kind != TEXT and place < end:
            t, h, w = next(grids[kind], (0, 0, 0))
            shape = (t, h // merge_size, w // merge_size)
            size = prod(shape)
            if not 0 < size <= (left := end - place):
                raise UserError(
                    f"sample {sample.id!r} has a run of {length} visual placeholder tokens with {left} left where the "
                    f"next image or frame gives {size}; make the text and the media agree"
                )
            yield tokens_T[place : place + size], _cells(shape)
            place += size


@lru_cache(maxsize=256)
def grid_coords(grid: tuple[int, int, int], merge_size: int) -> Tensor:
    """int32[P, 4]: row, column, height and width of every patch of a grid (time, height, width), in patches.

    In merge-block order (block row, block column, row, column). Shared between calls: never written.
    """
    t, h, w = grid
    row, col = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    blocks = (h // merge_size, merge_size, w // merge_size, merge_size)
    row, col = (x.reshape(blocks).transpose(1, 2).flatten() for x in (row, col))
    size = torch.tensor([h, w]).expand(h * w, 2)
    return torch.cat([row[:, None], col[:, None], size], dim=1).repeat(t, 1).to(torch.int32)


@lru_cache(maxsize=256)
def _cells(shape: tuple[int, int, int]) -> Tensor:
    """float32[3, M]: the place of every cell of a shape, row by row. Shared between calls: never written."""
    return torch.cartesian_prod(*map(torch.arange, shape)).T.float()


def _grids(media: Sequence[Media], *, is_video: bool) -> Iterator[tuple[int, int, int]]:
    for medium in media:
        t, h, w = medium.grid
        yield from [(1, h, w)] * t if is_video else [(t, h, w)]


def _feature_index(sample: Sample, merge_size: int) -> Tensor:
    """Features are numbered images before videos; -1 marks tokens without one."""
    index_T, first = torch.full_like(sample.kinds_T, -1), 0
    for kind in (IMAGE, VIDEO):
        is_kind_T = sample.kinds_T == kind
        index_T = torch.where(is_kind_T, is_kind_T.cumsum(0) + (first - 1), index_T)
        first += sum(m.inputs_UF.shape[0] for m in sample.media(kind)) // merge_size**2
    return index_T


def _check_grid(sample: Sample, medium: Media, merge_size: int, num_values: int) -> None:
    t, h, w = medium.grid
    shape = list(medium.inputs_UF.shape)
    if shape != [t * h * w, num_values] or h % merge_size or w % merge_size:
        raise UserError(
            f"sample {sample.id!r} has media with grid {medium.grid} and patches of shape {shape}, "
            f"not [t * h * w, {num_values}] with h and w multiples of {merge_size}; preprocess it for this model"
        )


def _check_placeholders(sample: Sample, merge_size: int) -> None:
    for kind, name in NAMES.items():
        media = sample.media(kind)
        places = int((sample.kinds_T == kind).sum())
        features = sum(m.inputs_UF.shape[0] for m in media) // merge_size**2
        if places != features:
            raise UserError(
                f"sample {sample.id!r} has {places} {name} placeholder tokens but its {len(media)} {name}s give "
                f"{features} features; make the text and the media agree"
            )
