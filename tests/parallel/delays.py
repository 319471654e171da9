"""A transport that does everything as late as it may: what a rank uses too early, or gives away too early, shows."""

import random
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mmfn.parallel.mesh.axis import Transport
from mmfn.parallel.mesh.layout import Mesh

LONGEST_S = 1e-3


@dataclass(eq=False)
class Late:
    """Sends what it is given only when its result is waited for, behind a random delay; until then the result is
    garbage. It keeps nothing alive: a tensor that is gone by then would have been sent from freed memory."""

    inner: Transport
    size: int
    delays: random.Random
    log: list[str]  # "send" and "wait" with the method, of all axes of a rank in order
    under_way: dict[int, tuple[Any, Callable[[Tensor], Tensor], str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def widest(self) -> torch.dtype:
        return self.inner.widest

    @property
    def is_traceable(self) -> bool:
        return self.inner.is_traceable

    def all_gather(self, x: Tensor, site: str) -> Tensor:
        return self._send("all_gather", x, self.size * x.shape[0], lambda x: self.inner.all_gather(x, site))

    def reduce_scatter(self, x: Tensor, site: str) -> Tensor:
        return self._send("reduce_scatter", x, x.shape[0] // self.size, lambda x: self.inner.reduce_scatter(x, site))

    def all_reduce(self, x: Tensor, site: str) -> Tensor:
        return self._send("all_reduce", x, x.shape[0], lambda x: self.inner.all_reduce(x, site))

    def all_to_all(self, x: Tensor, out_sizes: Sequence[int], in_sizes: Sequence[int], site: str) -> Tensor:
        return self._send(
            "all_to_all", x, sum(out_sizes), lambda x: self.inner.all_to_all(x, out_sizes, in_sizes, site)
        )

    def shift(self, x: Tensor, out_sizes: Sequence[int], in_sizes: Sequence[int], site: str) -> Tensor:
        return self._send("shift", x, sum(out_sizes), lambda x: self.inner.shift(x, out_sizes, in_sizes, site))

    def wait(self, x: Tensor) -> Tensor:
        sent, move, method = self.under_way.pop(x.data_ptr() or id(x))
        time.sleep(self.delays.uniform(0, LONGEST_S))
        given = sent()
        assert given is not None, f"what {method} sends was freed before it was waited for"
        self.log.append(f"wait {method}")
        return x.copy_(move(given))

    def _send(self, method: str, x: Tensor, num_rows: int, move: Callable[[Tensor], Tensor]) -> Tensor:
        self.log.append(f"send {method}")
        garbage = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max
        out = x.new_full((num_rows, *x.shape[1:]), garbage)
        self.under_way[out.data_ptr() or id(out)] = weakref.ref(x), move, method
        return out


def delayed(mesh: Mesh, seed: int, log: list[str]) -> Mesh:
    """A mesh of the same ranks, all of whose collectives are late."""
    delays = random.Random(f"{seed} {mesh['world'].index}")
    axes = {
        name: axis if axis.transport is None else replace(axis, transport=Late(axis.transport, axis.size, delays, log))
        for name, axis in mesh.axes.items()
    }
    return replace(mesh, axes=axes)
