"""`ParamSpec`: the one declaration of a parameter. Everything else about parameters is derived from trees of specs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfn import rng, tree
from mmfn.tree import Tree


@dataclass(frozen=True, kw_only=True)
class Init:
    """How a leaf is drawn: `normal` (mean 0, `std`), `zeros` or `ones`."""

    kind: str
    std: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("normal", "zeros", "ones"):
            raise ValueError(f"Init kind {self.kind!r} is unknown; use 'normal', 'zeros' or 'ones'")


ZEROS, ONES = Init(kind="zeros"), Init(kind="ones")


def normal(std: float) -> Init:
    """Normal draw with mean 0 and the given standard deviation."""
    return Init(kind="normal", std=std)


@dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """One parameter: shape, a logical axis name per dim (`"embed"`, `"q_heads"`, ...), initial values and dtype."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Init
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(
                f"shape {self.shape} has {len(self.shape)} dims but axes {self.axes} name {len(self.axes)}"
            )

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def spec(shape: Sequence[int], axes: str, init: Init) -> ParamSpec:
    """`spec((F, D), "mlp embed", normal(0.02))`: axes as one space-separated string."""
    return ParamSpec(shape=tuple(shape), axes=tuple(axes.split()), init=init)


def init_params(specs: Tree, seed: int, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tree:
    """Random parameters; each leaf depends on (seed, its path) only, so adding a leaf changes no other.

    Draws are float32 on the CPU, then cast and moved: the same values on every device.
    """

    def draw(path: str, leaf: ParamSpec) -> Tensor:
        if leaf.init.kind == "normal":
            value = torch.empty(leaf.shape).normal_(0.0, leaf.init.std, generator=rng.generator(seed, path))
        else:
            value = torch.full(leaf.shape, float(leaf.init.kind == "ones"))
        return value.to(device=device, dtype=dtype or leaf.dtype)

    return tree.map_with_path(draw, specs)


def meta_params(specs: Tree, dtype: torch.dtype | None = None) -> Tree:
    """Tensors on the meta device with the shapes of the specs: no memory, no values."""
    return tree.map(lambda s: torch.empty(s.shape, dtype=dtype or s.dtype, device="meta"), specs)


def num_params(specs: Tree) -> int:
    """Total number of elements over all leaves."""
    return sum(s.numel for s in tree.leaves(specs))
