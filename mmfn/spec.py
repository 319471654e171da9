"""`ParamSpec`: the one declaration of a parameter. Everything else about parameters is derived from trees of specs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmfn import rng, tree
from mmfn.dtypes import at_least
from mmfn.errors import UserError
from mmfn.tree import Tree


@dataclass(frozen=True, kw_only=True)
class Init:
    """How a leaf is drawn.

    `normal` (mean 0, `std`), `uniform` (between -`bound` and `bound`), `log_uniform` (the logarithm of a number between
    `least` and `bound`), `zeros` or `ones`.
    """

    kind: str
    std: float = 0.0
    bound: float = 0.0
    least: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in (kinds := ("normal", "uniform", "log_uniform", "zeros", "ones")):
            raise UserError(f"Init kind {self.kind!r} is unknown; use one of {', '.join(kinds)}")


EXPERTS = "experts"  # the logical axis over stacked experts, the first of their leaves
ZEROS, ONES = Init(kind="zeros"), Init(kind="ones")


def normal(std: float) -> Init:
    """Normal draw with mean 0 and the given standard deviation."""
    return Init(kind="normal", std=std)


def uniform(bound: float) -> Init:
    """Uniform draw between -`bound` and `bound`."""
    return Init(kind="uniform", bound=bound)


def log_uniform(least: float, bound: float) -> Init:
    """The logarithm of a uniform draw between `least` and `bound`."""
    return Init(kind="log_uniform", least=least, bound=bound)


@dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """One parameter: shape, a logical axis name per dim (`"embed"`, `"q_heads"`, ...), initial values and dtype.

    Where it lies on a mesh follows from its logical axes (`mmfn.parallel.weights.sharding.RULES` lists them all).

    `dtype`: what it has in memory and on disk where the model's is narrower (of a model in float64, float64); None, as
    most: the model's. `compute`: the dtype it is computed in, where that is not the program's (see
    `transforms.precision`). `parts`: matrices that are stacked
    along the rows, the dim before the last, as in a fused projection.

    A leaf changes in training in one of three ways:

    - by its gradient, as most;
    - by a rule, where `is_frozen` is true and `rule` names one: it has no gradient and no optimizer state, and the rule
      updates it from what a step counted (a bias that balances experts); it declares float32 or wider, in which small
      changes are not lost (in bfloat16 0.5 + 0.001 is 0.5);
    - not at all, where `is_frozen` is true alone (see `freeze`).

    >>> ParamSpec(shape=(8,), axes=("router",), init=ZEROS, dtype=torch.float32, is_frozen=True, rule="balance")
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Init
    dtype: torch.dtype | None = None
    is_frozen: bool = False
    rule: str = ""
    compute: torch.dtype | None = None
    parts: int = 1

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise UserError(f"shape {self.shape} has {len(self.shape)} dims but axes {self.axes} name {len(self.axes)}")
        if self.rule and not self.is_frozen:
            raise UserError(f"rule {self.rule!r} and a gradient would both update a leaf; set is_frozen=True")
        if self.rule and self.dtype not in (torch.float32, torch.float64):
            dtype = self.dtype or "the dtype of the model"
            raise UserError(
                f"rule {self.rule!r} updates a leaf of {dtype}, which may lose small changes; set dtype=torch.float32"
            )

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def spec(shape: Sequence[int], axes: str, init: Init, parts: int = 1) -> ParamSpec:
    """`spec((F, D), "mlp embed", normal(0.02))`: axes as one space-separated string."""
    return ParamSpec(shape=tuple(shape), axes=tuple(axes.split()), init=init, parts=parts)


def init_params(specs: Tree, seed: int, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tree:
    """Random parameters; each leaf depends on (seed, its path) only, so adding a leaf changes no other.

    Draws are float32 on the CPU, then cast and moved: the same values on every device. `dtype`: of leaves that declare
    none, float32 by default.
    """

    def draw(path: str, leaf: ParamSpec) -> Tensor:
        init, value = leaf.init, torch.empty(leaf.shape)
        if init.kind == "normal":
            value.normal_(0.0, init.std, generator=rng.generator(seed, path))
        elif init.kind == "uniform":
            value.uniform_(-init.bound, init.bound, generator=rng.generator(seed, path))
        elif init.kind == "log_uniform":
            value.uniform_(init.least, init.bound, generator=rng.generator(seed, path)).log_()
        else:
            value.fill_(float(init.kind == "ones"))
        return value.to(device=device, dtype=at_least(leaf.dtype, dtype or torch.float32))

    return tree.map_with_path(draw, specs)


def meta_params(specs: Tree, dtype: torch.dtype | None = None) -> Tree:
    """Tensors on the meta device with the shapes and dtypes of `init_params`: no memory, no values."""
    dtype = dtype or torch.float32
    return tree.map(lambda s: torch.empty(s.shape, dtype=at_least(s.dtype, dtype), device="meta"), specs)


def model_dtype(params: Tree, specs: Tree) -> torch.dtype:
    """The dtype of a model: that of its leaves which declare none, the widest if they differ (float32 of none).

    `specs`: those of `params`; leaves that one of the two lacks are left out.
    """
    declared = {path: leaf.dtype for path, leaf in tree.items(specs)}
    dtypes = {leaf.dtype for path, leaf in tree.items(params) if declared.get(path, leaf.dtype) is None}
    return max(dtypes, key=lambda dtype: (dtype.itemsize, dtype == torch.float32), default=torch.float32)


def num_params(specs: Tree) -> int:
    """Total number of elements over all leaves."""
    return sum(s.numel for s in tree.leaves(specs))


def freeze(specs: Tree, patterns: Sequence[str]) -> Tree:
    """The specs with every leaf frozen whose path fully matches one of the regexes, beside those that are already.

    A step computes no gradient of a frozen leaf, sums none over ranks and keeps no optimizer state for it, and no rule
    updates it. Raises ValueError for a pattern that matches nothing and when no leaf is left to train.

    >>> freeze({"head": spec((2,), "embed", ONES), "norm": spec((2,), "embed", ONES)}, ["norm"])["norm"].is_frozen
    True
    """
    chosen = tree.mask(specs, [(pattern, True) for pattern in patterns], default=False)
    result = tree.map(lambda leaf, is_chosen: freeze_leaf(leaf) if is_chosen else leaf, specs, chosen)
    if not trained_paths(result):
        raise UserError(f"freezing {list(patterns)} leaves no parameter to train; leave one part out of it")
    return result


def freeze_leaf(leaf: ParamSpec) -> ParamSpec:
    """The leaf as training does not change it, by gradient or by a rule."""
    return replace(leaf, is_frozen=True, rule="")


def has_experts(specs: Tree) -> bool:
    """Whether a leaf, or one of a tree of specs, holds stacked experts."""
    return any(EXPERTS in leaf.axes for leaf in tree.leaves(specs))


def stacks(specs: Tree) -> dict[str, list[Tree]]:
    """The blocks of each stack of a model by its name, `NAME/layers` in the tree; those of the text last."""
    found = {name: part["layers"] for name, part in specs.items() if isinstance(part, dict) and "layers" in part}
    return dict(sorted(found.items(), key=lambda stack: stack[0] == "text"))


def trained_paths(specs: Tree) -> list[str]:
    """Paths of the leaves that a gradient trains, in path order."""
    return [path for path, leaf in tree.items(specs) if not leaf.is_frozen]


def rules_of(specs: Tree) -> dict[str, str]:
    """`{path: rule}` of the leaves that a rule updates, in path order."""
    return {path: leaf.rule for path, leaf in tree.items(specs) if leaf.rule}


def num_trained(specs: Tree) -> int:
    """Number of elements over the leaves that are not frozen."""
    return sum(leaf.numel for leaf in tree.leaves(specs) if not leaf.is_frozen)
