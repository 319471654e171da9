"""Which whole weights are alive, and when."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor

from mmfn.parallel.weights.buckets import Bucket


@contextmanager
def watched() -> Iterator[tuple[Callable[[], int], list[int]]]:
    """How many whole weights are alive, of those that were gathered within; and how many there were at each gather."""
    made: list[weakref.ref[Any]] = []
    counts: list[int] = []
    inner = Bucket.join

    def alive() -> int:
        return sum(reference() is not None for reference in made)

    def join(self: Bucket, gathered: Tensor) -> list[Tensor]:
        leaves = inner(self, gathered)
        made.extend(weakref.ref(leaf.untyped_storage()) for leaf in leaves)
        counts.append(alive())
        return leaves

    with patch.object(Bucket, "join", join):
        yield alive, counts
