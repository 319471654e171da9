"""What generation remembers of every row, as data. Legend: T tokens, B rows, S columns, K kv heads, C channels.

The cache of a layer of attention is `{"k": k_BSKC, "v": v_BSKC}`; that of a recurrent layer has no columns. Dim 0 of
every leaf is the row. Keys and values are written in place, the one state in a model's forward pass that is: a copy for
every token would cost as much as attention reads.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmfn import tree
from mmfn.tree import Tree

WITH_COLUMNS = ("k", "v")  # the leaves that have a column for every token


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
    return [{name: torch.zeros(shape, dtype=dtype, device=device) for name in WITH_COLUMNS} for _ in range(num_layers)]


def write_(layer: Tree, slots: Slots, k_TKC: Tensor, v_TKC: Tensor) -> Tree:
    """The layer's cache, with the tokens' keys and values written to their slots in place."""
    for name, x_TKC in (("k", k_TKC), ("v", v_TKC)):
        layer[name].index_put_((slots.rows_T, slots.columns_T), x_TKC)
    return layer


def with_columns(layers: Sequence[Tree], num_columns: int) -> list[Tree]:
    """The caches with room for so many columns; those there are are copied, the others zero."""

    def grow(layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: pad(x, (0, 0, 0, 0, 0, num_columns - x.shape[1])) if name in WITH_COLUMNS else x
            for name, x in layer.items()
        }

    return [grow(layer) for layer in layers]


def with_rows(layers: Sequence[Tree], rows: Collection[int]) -> list[Tree]:
    """The caches of some rows alone, in that order."""
    index_B = torch.tensor(list(rows), device=tree.leaves(layers)[0].device)
    kept: list[Tree] = tree.map(lambda leaf: leaf.index_select(0, index_B), list(layers))
    return kept
