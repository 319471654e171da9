"""Which rows of a square table of learned positions a patch reads, and how much of each (see `ops.interpolate`).

Legend: P patches, K taps of a patch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Taps = Callable[[Tensor, int, torch.dtype], tuple[Tensor, Tensor]]
"""(coords_P4, side of the table, dtype) -> (rows_PK: int64 of the flattened table, parts_PK in that dtype)

`coords_P4`: int32, row, column, height and width of the grid over which the table is stretched, in patches.
"""
CUBIC_A = -0.75
"""The slope of Keys' kernel at distance 1, as in `torch.nn.functional.grid_sample`."""


def bilinear(coords_P4: Tensor, side: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """4 taps, the corners of table and grid aligned. A grid of 4 over a table of 3 reads it at 0, 2/3, 4/3 and 2.

    Source: `get_vision_interpolation_indices_and_weights` in transformers 5.23.
    """
    index_P2, size_P2 = coords_P4[:, :2].to(dtype), coords_P4[:, 2:].to(dtype)
    source_P2 = index_P2 * (side - 1) / (size_P2 - 1).clamp(min=1)
    low_P2 = source_P2.floor()
    high_part_P2 = source_P2 - low_P2
    return _outer(low_P2[..., None] + torch.arange(2, device=low_P2.device), (1 - high_part_P2, high_part_P2), side)


def bicubic(coords_P4: Tensor, side: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """16 taps, the edges of table and grid aligned; taps beyond the border read what lies on it.

    A grid of 2 over a table of 4 reads it at 0.5 and 2.5. Source: Keys 1981, "Cubic convolution interpolation";
    `grid_sample` as `Glm4vMoeVisionEmbeddings` of transformers 5.23 calls it (not aligned at corners, border).
    """
    index_P2, size_P2 = coords_P4[:, :2].to(dtype), coords_P4[:, 2:].to(dtype)
    source_P2 = (index_P2 + 0.5) / size_P2 * side - 0.5
    low_P2 = source_P2.floor()
    t = source_P2 - low_P2
    parts = (_far(t + 1), _near(t), _near(1 - t), _far(2 - t))
    return _outer(low_P2[..., None] + torch.arange(-1, 3, device=low_P2.device), parts, side)


def _near(distance: Tensor) -> Tensor:
    """Keys' kernel up to distance 1."""
    return ((CUBIC_A + 2) * distance - (CUBIC_A + 3)) * distance * distance + 1


def _far(distance: Tensor) -> Tensor:
    """Keys' kernel from distance 1 to 2."""
    return ((CUBIC_A * distance - 5 * CUBIC_A) * distance + 8 * CUBIC_A) * distance - 4 * CUBIC_A


def _outer(taps_P2k: Tensor, parts_P2: tuple[Tensor, ...], side: int) -> tuple[Tensor, Tensor]:
    """k taps along rows times k along columns, each inside the table."""
    row_Pk, column_Pk = taps_P2k.long().clamp(0, side - 1).unbind(1)
    row_part_Pk, column_part_Pk = torch.stack(parts_P2, dim=-1).unbind(1)
    rows_PK = (row_Pk[:, :, None] * side + column_Pk[:, None, :]).flatten(1)
    return rows_PK, (row_part_Pk[:, :, None] * column_part_Pk[:, None, :]).flatten(1)
