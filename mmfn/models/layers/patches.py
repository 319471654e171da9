"""Images and videos as a tower of merged patches: how they are laid on the host, and where their tokens are.

A frame (an image, or one step in time of a video) attends to itself alone, in some towers only to windows of itself.
Legend: T tokens, P patches, N features (a cell of merged patches each), M of them, K steps in time.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmfn.batch import AUDIO, IMAGE, VIDEO, Laid, Media, Sample, TowerKind
from mmfn.errors import UserError
from mmfn.models.layers.positions import Block, blocks_of

NAMES = {IMAGE: "image", VIDEO: "video"}


def tower_kind(merge_size: int, num_values: int, matmul_patches: int, num_lists: int = 1) -> TowerKind:
    """Patches in merge blocks of `merge_size`**2, each one feature. `matmul_patches`: `TowerKind.matmul_rows`.

    `num_lists`: of segments, each one block or more: 1 for frames alone, 2 for windows and frames.
    """
    merged = merge_size**2
    return TowerKind(
        media=(IMAGE, VIDEO),
        inputs=merged,
        rows=merged,
        features=1,
        values=num_values,
        segments_per_unit=(1,) * num_lists,
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


def lay_windows(sample: Sample, merge_size: int, num_values: int, window: int) -> Laid:
    """`lay_frames` with the patches of a frame window by window, and two lists of segments: windows and frames.

    `window`: cells on a side of one. Both lists are of patches that lie together, so no row moves on the device, and
    `index_T` leads back to the order of the tokens. Raises as `lay_frames` does.
    """
    laid = lay_frames(sample, merge_size, num_values)
    media = sample.media(IMAGE, VIDEO)
    orders = [torch.zeros(0, dtype=torch.int64)]
    windows: list[int] = []
    for medium in media:
        order_M, lengths = _window_order(medium.grid, merge_size, window)
        orders.append(order_M)
        windows += lengths

    def reorder(x: Tensor, order_M: Tensor) -> Tensor:
        return x.reshape(-1, merge_size**2, x.shape[1])[order_M].flatten(0, 1)

    firsts = torch.tensor([0, *(order_M.numel() for order_M in orders)]).cumsum(0).tolist()
    order_N = torch.cat([order_M + first for order_M, first in zip(orders, firsts, strict=False)])
    places_N = pad(order_N.argsort(), (1, 0), value=-1)
    return replace(
        laid,
        inputs=tuple(reorder(m.inputs_UF, order_M) for m, order_M in zip(media, orders[1:], strict=True)),
        coords_P4=reorder(laid.coords_P4, order_N),
        segments=(tuple(windows), *laid.segments),
        index_T=places_N[laid.index_T + 1],
    )


def frame_blocks(sample: Sample, merge_size: int) -> Iterator[Block]:
    """The placeholders of each image and frame with their (0, row, column) in merged cells, as blocks of `mrope`.

    Adjacent frames are told apart by their grids, not by the text between them. Raises ValueError when a run of
    placeholders does not match its grids.
    """
    images = (_cells(_shape(m, merge_size)) for m in sample.images)
    frames = (_cells((1, *_shape(m, merge_size)[1:])) for m in sample.videos for _ in range(m.grid[0]))
    return blocks_of(sample, {IMAGE: images, VIDEO: frames})


def media_blocks(
    sample: Sample, merge_size: int, times: Callable[[Media], Tensor], sounds: Iterable[Tensor] = ()
) -> Iterator[Block]:
    """`frame_blocks` with a whole video as one block of (time, row, column); `times`: float32[K], of its K steps.

    `sounds`: the places of each clip, float32[3, M]; a video and its sound are one block (`positions.blocks_of`).
    """

    def video(medium: Media) -> Tensor:
        cells_3M = _cells(_shape(medium, merge_size))
        return torch.cat([times(medium)[cells_3M[:1].long()], cells_3M[1:]])

    images = (_cells(_shape(m, merge_size)) for m in sample.images)
    return blocks_of(sample, {IMAGE: images, VIDEO: map(video, sample.videos), AUDIO: sounds})


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


@lru_cache(maxsize=256)
def _window_order(grid: tuple[int, int, int], merge_size: int, window: int) -> tuple[Tensor, tuple[int, ...]]:
    """(int64[M], the cells of a grid frame by frame, windows row by row, cells row by row; patches of each window).

    Shared between calls: never written.
    """
    t, rows, columns = grid[0], grid[1] // merge_size, grid[2] // merge_size
    cells = torch.arange(rows * columns).view(rows, columns)
    windows = [part.flatten() for band in torch.split(cells, window) for part in torch.split(band, window, 1)]
    order_M = (torch.arange(t)[:, None] * cells.numel() + torch.cat(windows)).flatten()
    return order_M, tuple(part.numel() * merge_size**2 for part in windows) * t


def _shape(medium: Media, merge_size: int) -> tuple[int, int, int]:
    t, h, w = medium.grid
    return t, h // merge_size, w // merge_size


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
