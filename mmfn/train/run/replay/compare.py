"""How far tensors are from each other: bit by bit where they should be the same, else beside what a dtype explains.

An op computed in float32 is not the one computed in float64. What its dtype explains is measured: the error that the
op it is held against makes in that dtype on the same inputs, or one rounding at the scale of the result.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

from mmfn import tree
from mmfn.parallel.weights.sharding import local
from mmfn.tree import Tree

LARGEST, NORM = 16.0, 4.0
"""Times what is explained, of the largest error of a tensor and of the norm of all its errors, that passes: kernels add
up in other orders, and keep other values between two operations, than the formulas they are held against."""
ALIKE = 4.0
"""Times that, where the expected tensor is of the same dtype: it errs as well, and nothing tells how much."""
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers of so many bytes


@dataclass(frozen=True, kw_only=True)
class Error:
    """How far a tensor is from the expected one.

    `largest`: of the errors of its elements, `at` the index where it is; `explained`: how large it may be by its
    dtype. `relative`: the norm of all errors over that of what is expected. `ulp`: `largest` in units in the last place
    of the value expected there. `ratio`: to what passes; above 1 the dtype does not explain it.
    """

    largest: float
    at: tuple[int, ...]
    explained: float
    relative: float
    ulp: float
    ratio: float


def measure(found: Tensor, expected: Tensor, noisy: Tensor, *, floor: float = 0.0, slack: float = 1.0) -> Error:
    """The error of `found` against `expected`, which is wider. `noisy`: the expected one computed in found's dtype.

    `floor`: the norm of what one rounding may change that no element's own size shows, as where terms cancel. `slack`:
    times what passes of other tensors.
    """
    eps, (want, error, noise) = torch.finfo(found.dtype).eps, _in_double(found, expected, noisy)
    if not found.numel():
        return Error(largest=0.0, at=(), explained=0.0, relative=0.0, ulp=0.0, ratio=0.0)
    place = int(error.abs().argmax())
    largest, norm, size = float(error.flatten()[place].abs()), float(error.norm()), float(want.norm())
    each, slack = floor / found.numel() ** 0.5, slack * (ALIKE if torch.finfo(expected.dtype).eps >= eps else 1.0)
    explained = LARGEST * slack * max(float(noise.abs().max()), eps * float(want.abs().max()), each)
    passes = NORM * slack * max(float(noise.norm()), eps * size / 2, floor)
    return Error(
        largest=largest,
        at=_index(place, found.shape),
        explained=explained,
        relative=norm / size if size else float(norm > 0),
        ulp=largest / _ulp(float(want.flatten()[place]), found.dtype),
        ratio=max(_ratio(largest, explained), _ratio(norm, passes)),
    )


def _in_double(found: Tensor, expected: Tensor, noisy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    want = expected.detach().double()
    return want, found.detach().double() - want, noisy.detach().double() - want


def _ratio(error: float, passes: float) -> float:
    if error == 0:
        return 0.0
    return error / passes if passes else float("inf")


def _ulp(value: float, dtype: torch.dtype) -> float:
    """The distance of a value to the next one of a dtype."""
    x, one = torch.tensor(abs(value), dtype=dtype), torch.tensor(float("inf"), dtype=dtype)
    return float(torch.nextafter(x, one).double() - x.double())


def _index(place: int, shape: Sequence[int]) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        index.append(place % size)
        place //= size
    return tuple(reversed(index))


@dataclass(frozen=True, kw_only=True)
class Change:
    """How a leaf differs from another of the same shape: in `count` of `total` elements, `at` the one farthest off.

    `value` is there and `other` in its place; `bit`: the only one that differs between them, None where several do.
    """

    path: str
    count: int
    total: int
    at: tuple[int, ...]
    value: float
    other: float
    bit: int | None

    def __str__(self) -> str:
        place = f"{self.path}{list(self.at) if self.at else ''}"
        text = f"{place} is {self.value!r} where {self.other!r} is expected"
        if self.bit is not None:
            text += f", bit {self.bit} flipped"
        return f"{text} ({self.count} of {self.total} elements differ)"


def changes(found: Tree, expected: Tree) -> Iterator[Change]:
    """The leaves of a tree that are not those of another of the same structure, bit for bit; of shards, this rank's."""
    for (path, leaf), other in zip(tree.items(found), tree.leaves(expected), strict=True):
        change = change_of(path, local(leaf), local(other))
        if change is not None:
            yield change


def change_of(path: str, found: Tensor, expected: Tensor) -> Change | None:
    """How one tensor differs from another, None where all bits are the same. One of another shape or dtype differs
    in all."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        text = f"{path} ({found.dtype}{list(found.shape)}, not {expected.dtype}{list(expected.shape)})"
        return Change(path=text, count=found.numel(), total=found.numel(), at=(), value=nan, other=nan, bit=None)
    found, expected = found.detach().cpu(), expected.detach().cpu()
    words, others = _words(found), _words(expected)
    differs = words != others
    count = int(differs.sum())
    if not count:
        return None
    far = (found.double() - expected.double()).abs().flatten().nan_to_num(nan=torch.inf, posinf=torch.inf)
    far = torch.where(differs, far, -1)
    place = int(far.argmax())
    mask = int(words[place]) ^ int(others[place])
    bits = [bit for bit in range(8 * found.itemsize) if mask >> bit & 1]
    return Change(
        path=path,
        count=count,
        total=found.numel(),
        at=_index(place, found.shape),
        value=found.flatten()[place].item(),
        other=expected.flatten()[place].item(),
        bit=bits[0] if len(bits) == 1 else None,
    )


def _words(x: Tensor) -> Tensor:
    """The elements as integers of their size."""
    flat = x.contiguous().view(-1)
    return flat.to(torch.uint8) if x.dtype == torch.bool else flat.view(WORDS[x.itemsize])
