"""Key-value cache of generation, as data. Legend: T tokens, B rows, S columns, K kv heads, C channels.

A layer's cache is `{"k": k_BSKC, "v": v_BSKC}`. Nothing is written in place: `write` returns a new cache, which costs
one copy of the layer's keys and values per step, about what attention reads anyway.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmfn import tree
from mmfn.tree import Tree


@tree.register
@dataclass(frozen=True, kw_only=True)
class Slots:
    """Where the tokens of a call go: token t to `[rows_T[t], columns_T[t]]` (int64); `lengths_B` (int64) filled
    columns of every row afterwards.

    Padding tokens go to the last column, which no length ever reaches. In a prefill tokens attend within the packed
    call; in a decode step there is one token per row, in row order, and it attends to its row of the cache.
    """

    rows_T: Tensor
    columns_T: Tensor
    lengths_B: Tensor
    is_prefill: bool = field(metadata={"static": True})


@tree.register
@dataclass(frozen=True, kw_only=True)
class Cache:
    """The caches of all layers and where this call writes."""

    layers: Sequence[Tree]
    slots: Slots


def empty(
    num_layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> list[dict[str, Tensor]]:
    """Zero caches of `num_layers` layers; `shape` is (B, S, K, C), S counting the spare last column."""
    return [{name: torch.zeros(shape, dtype=dtype, device=device) for name in ("k", "v")} for _ in range(num_layers)]


def write(layer: Tree, slots: Slots, k_TKC: Tensor, v_TKC: Tensor) -> dict[str, Tensor]:
    """The layer's cache with the tokens' keys and values in their slots."""
    where = (slots.rows_T, slots.columns_T)
    return {"k": layer["k"].index_put(where, k_TKC), "v": layer["v"].index_put(where, v_TKC)}
