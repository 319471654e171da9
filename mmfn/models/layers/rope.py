"""Rotary angles: tables of cosines and sines, made once per forward pass.

Tables are float32 whatever the model's dtype, as in transformers: the angles of late positions need the mantissa.
Legend: T tokens, P patches, R rotated channel pairs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def inverse_frequencies(num_pairs: int, theta: float, device: torch.device) -> Tensor:
    """float32[num_pairs]: `theta ** -(2 i / (2 num_pairs))`. Source: Su et al. 2021, "RoFormer", section 3.2.2."""
    exponents = torch.arange(0, 2 * num_pairs, 2, dtype=torch.float32, device=device) / (2 * num_pairs)
    return 1.0 / theta**exponents


def interleaved(positions_3T: Tensor, sections: Sequence[int], theta: float) -> tuple[Tensor, Tensor]:
    """Interleaved multimodal rope: `(cos_TR, sin_TR)` float32, R = sum(sections).

    `positions_3T`: float32[3, T], (temporal, height, width). Of every three neighbouring pairs one follows each
    coordinate: pairs 1, 4, ... below `3 * sections[1]` the height, 2, 5, ... below `3 * sections[2]` the width, all
    others time. Source: `Qwen3VLTextRotaryEmbedding` in transformers 5.23.
    """
    pairs_R = torch.arange(sum(sections), device=positions_3T.device)
    is_height_R = (pairs_R % 3 == 1) & (pairs_R < 3 * sections[1])
    is_width_R = (pairs_R % 3 == 2) & (pairs_R < 3 * sections[2])
    axis_R = is_height_R + 2 * is_width_R
    return _angles(positions_3T, axis_R, theta)


def chunked(positions_3T: Tensor, sections: Sequence[int], theta: float) -> tuple[Tensor, Tensor]:
    """Multimodal rope in chunks: `(cos_TR, sin_TR)` float32, R = sum(sections).

    The first `sections[0]` pairs follow time, the next `sections[1]` the height, the others the width. Arguments as of
    `interleaved`. Source: `apply_multimodal_rotary_pos_emb` of Qwen2.5-VL in transformers 5.23.
    """
    ends_3 = torch.tensor(sections, device=positions_3T.device).cumsum(0)
    pairs_R = torch.arange(sum(sections), device=positions_3T.device)
    return _angles(positions_3T, torch.searchsorted(ends_3, pairs_R, right=True), theta)


def _angles(positions_3T: Tensor, axis_R: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of pairs that follow the coordinates `axis_R`."""
    angles_TR = positions_3T.float()[axis_R].T * inverse_frequencies(axis_R.numel(), theta, positions_3T.device)
    return angles_TR.cos(), angles_TR.sin()


def axial(coords_P4: Tensor, num_pairs: int, theta: float) -> tuple[Tensor, Tensor]:
    """Two-dimensional rope: `(cos_PR, sin_PR)` float32; the first half of R turns by row, the second by column.

    `coords_P4`: int32, (row, column, ...) in patches. `num_pairs` = R is even.
    Source: `Qwen3VLVisionRotaryEmbedding` in transformers 5.23.
    """
    frequencies = inverse_frequencies(num_pairs // 2, theta, coords_P4.device)
    angles_PR = (coords_P4[:, :2, None].float() * frequencies).flatten(1)
    return angles_PR.cos(), angles_PR.sin()
