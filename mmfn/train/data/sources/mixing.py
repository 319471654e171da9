"""Orders of data: which row stands at which place of an endless sequence, a pure function of the place.

Rows of several sources are numbered one after the other: those of the second begin where the first ends.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mmfn import rng
from mmfn.errors import UserError

MAX_BLOCK = 10_000
_EXACT = 1e-9


class Order(Protocol):
    """What stands where. Nothing is remembered: any place costs the same."""

    def rows(self, places_N: Tensor) -> Tensor:
        """Rows (int64[N]) at places (int64[N], from 0)."""


class Epochs:
    """All rows once, in random order, then once more in another, without end."""

    def __init__(self, size: int, seed: int) -> None:
        """Raises ValueError for less than one row."""
        self._permutation = rng.Permutation(size, seed, "epoch")

    def rows(self, places_N: Tensor) -> Tensor:
        """Rows at places: place `size * e + i` is the i-th of epoch e."""
        return self._permutation.walk(places_N)


class Mixture:
    """Sources in fixed shares. Each block of places has the same numbers of all of them, in an order of its own.

    With weights (3, 1) a block is 4 places, three of the first source and one of the second, and of each source the
    rows come in epochs of its own: all once in random order before any comes again.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        """`sizes`: rows of each source; `weights`: its share of the places, as any positive numbers.

        Raises ValueError for a weight so small that its source would have no place in a block of `MAX_BLOCK`.
        """
        self.counts = shares(weights)
        self.block = sum(self.counts)
        self._ends_S = torch.tensor(self.counts).cumsum(0)
        self._first_S = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        self._shuffle = rng.Permutation(self.block, seed, "block")
        self._permutations = [rng.Permutation(size, seed, "epoch", i) for i, size in enumerate(sizes)]

    def rows(self, places_N: Tensor) -> Tensor:
        """Rows at places."""
        blocks_N = places_N // self.block
        slots_N = self._shuffle.walk(places_N)  # those below the first end are the first source's, and so on
        sources_N = torch.bucketize(slots_N, self._ends_S, right=True)
        rows_N = torch.empty_like(slots_N)
        for source, (count, permutation) in enumerate(zip(self.counts, self._permutations, strict=True)):
            is_its = sources_N == source
            ordinals = blocks_N[is_its] * count + slots_N[is_its] - (self._ends_S[source] - count)
            rows_N[is_its] = self._first_S[source] + permutation.walk(ordinals)
        return rows_N


def shares(weights: Sequence[float]) -> list[int]:
    """Places of each source in the smallest block that gives exact shares, or in one of `MAX_BLOCK`.

    In that one the places that whole numbers leave over go to the largest remainders. Raises ValueError for a source
    that would have no place.

    >>> shares([0.75, 0.25])
    [3, 1]
    """
    weights_S = torch.tensor(weights, dtype=torch.float64)
    weights_S = weights_S / weights_S.sum()
    exact_BS = torch.arange(1, MAX_BLOCK + 1)[:, None] * weights_S
    is_exact_B = ((exact_BS - exact_BS.round()).abs() < _EXACT).all(1) & (exact_BS.round() >= 1).all(1)
    quotas_S = exact_BS[int(is_exact_B.to(torch.int8).argmax()) if is_exact_B.any() else -1]
    counts_S = torch.where(is_exact_B.any(), quotas_S.round(), quotas_S.floor()).to(torch.int64)
    left = round(float(quotas_S.sum())) - int(counts_S.sum())
    counts_S[(counts_S - quotas_S).argsort(stable=True)[:left]] += 1
    if (counts_S == 0).any():
        least = int(counts_S.argmin())
        raise UserError(
            f"weight {weights[least]} of data set {least} is less than one sample in {MAX_BLOCK}; raise or remove it"
        )
    return counts_S.tolist()
