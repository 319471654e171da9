"""What a sample takes in a batch, and what it costs to compute: all that packing reads of it.

FLOPs are those of the forward: matrix products of the blocks by row, and attention by the pairs of rows that see each
other, as `mmfn.ops.flops` counts them. The backward costs about twice as much of both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mmfn import tree
from mmfn.batch import Sample, TowerKind
from mmfn.errors import UserError
from mmfn.packing import num_units
from mmfn.spec import EXPERTS, ParamSpec
from mmfn.tree import Tree


@dataclass(frozen=True, kw_only=True)
class Rate:
    """FLOPs of a stack of blocks: `per_row`, and `per_pair` of rows that attention brings together."""

    per_row: float = 1.0
    per_pair: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Rates:
    """FLOPs of the decoder, and of each tower by name."""

    decoder: Rate
    towers: Mapping[str, Rate]


def flop_rates(specs: Tree, towers: Mapping[str, TowerKind], experts_per_token: int) -> Rates:
    """The rates of a model, from the specs of its parameters (whole, not a rank's) and how its towers read.

    A matrix of n elements costs 2 n for each row. The decoder's blocks with attention are those with a projection back
    from its heads; a tower says itself where attention costs as much as its matrices (`TowerKind.matmul_rows`).
    """

    def per_row(stack: str) -> float:
        return sum(2.0 * _active(leaf, experts_per_token) for leaf in _matrices(specs, stack))

    from_heads = [leaf.shape[1] for leaf in _matrices(specs, "text") if leaf.axes == ("embed", "q_heads")]
    rows = {name: per_row(name) for name in towers}
    return Rates(
        decoder=Rate(per_row=per_row("text"), per_pair=4.0 * sum(from_heads)),
        towers={name: Rate(per_row=rows[name], per_pair=rows[name] / towers[name].matmul_rows) for name in towers},
    )


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of one sample: `sizes`, its tokens and the units of each tower, and `costs`, FLOPs of decoder and each tower."""

    sizes: tuple[int, ...]
    costs: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """The static sizes that a micro-batch may take: `tokens`, and by tower `units`.

    `towers`: how they read. `segment_multiple`: what samples are padded to. `max_tokens`: of a sample; None: as many as
    the largest bucket.
    """

    tokens: tuple[int, ...]
    units: Mapping[str, tuple[int, ...]]
    towers: Mapping[str, TowerKind]
    segment_multiple: int = 1
    max_tokens: int | None = None

    @staticmethod
    def of(
        token_buckets: Sequence[int],
        tower_buckets: Mapping[str, Sequence[int]],
        towers: Mapping[str, TowerKind],
        segment_multiple: int = 1,
        max_tokens: int | None = None,
    ) -> "Buckets":
        """Of tower buckets in inputs. Raises ValueError for a tower without buckets or buckets without a tower, and
        buckets that are not positive and strictly increasing, or not made of whole units.
        """
        if odd := sorted(tower_buckets.keys() ^ towers.keys()):
            raise UserError(
                f"tower_buckets has sizes for {', '.join(tower_buckets) or 'nothing'} but the model's towers are "
                f"{', '.join(towers) or 'none'}; {'add' if odd[0] in towers else 'remove'} {odd[0]!r}"
            )
        _check_buckets("token_buckets", token_buckets, 1)
        return Buckets(
            tokens=tuple(token_buckets),
            units=units_of(tower_buckets, towers),
            towers=towers,
            segment_multiple=segment_multiple,
            max_tokens=max_tokens,
        )

    @property
    def largest(self) -> tuple[int, ...]:
        """Of tokens, then of units of each tower."""
        return self.tokens[-1], *(sizes[-1] for sizes in self.units.values())

    def sizes(self, sample: Sample) -> tuple[int, ...]:
        """What a sample takes: tokens, with the padding at its end, and units of each tower."""
        tokens = -(-sample.tokens_T.numel() // self.segment_multiple) * self.segment_multiple
        return tokens, *(num_units(sample, kind) for kind in self.towers.values())

    def measure(self, sample: Sample, rates: Rates) -> Size:
        """Sizes and costs of a sample whose media may lie on the meta device."""
        tokens = sample.tokens_T.numel()
        decoder = rates.decoder.per_row * tokens + rates.decoder.per_pair * tokens * (tokens + 1) / 2
        costs = [_tower_cost(sample, kind, rates.towers[name]) for name, kind in self.towers.items()]
        return Size(sizes=self.sizes(sample), costs=tuple(round(x) for x in (decoder, *costs)))

    def excess(self, sample: Sample) -> str | None:
        """What a sample has more of than a micro-batch holds, and the fix; None for one that fits."""
        num_tokens = sample.tokens_T.numel()
        if self.max_tokens is not None and num_tokens > self.max_tokens:
            return (
                f"has {num_tokens} tokens but max_tokens is {self.max_tokens}; raise max_tokens, shorten the sample or "
                "lower the pixel budget of the processor"
            )
        names = ("tokens", *(f"inputs of {name}" for name in self.towers))
        inputs = (1, *(kind.inputs for kind in self.towers.values()))
        for what, size, largest, n in zip(names, self.sizes(sample), self.largest, inputs, strict=True):
            if size > largest:
                return (
                    f"has {size * n} {what} but the largest bucket holds {largest * n}; add a larger bucket for {what} "
                    "or remove the sample"
                )
        return None


def units_of(tower_buckets: Mapping[str, Sequence[int]], towers: Mapping[str, TowerKind]) -> dict[str, tuple[int, ...]]:
    """Buckets of those towers that have any, in inputs, as units.

    Raises ValueError unless they increase and are made of whole units.
    """
    kinds = {name: kind for name, kind in towers.items() if name in tower_buckets}
    for name, kind in kinds.items():
        _check_buckets(f"tower_buckets of {name!r}", tower_buckets[name], kind.inputs)
    return {name: tuple(n // kind.inputs for n in tower_buckets[name]) for name, kind in kinds.items()}


def _tower_cost(sample: Sample, kind: TowerKind, rate: Rate) -> float:
    """Each step in time of a medium attends to itself."""
    cost = 0.0
    for medium in sample.media(*kind.media):
        rows = medium.inputs_UF.shape[0] // kind.inputs * kind.rows
        cost += rows * (rate.per_row + rate.per_pair * rows / max(1, medium.grid[0]))
    return cost


def _matrices(specs: Tree, stack: str) -> list[ParamSpec]:
    leaves = [leaf for path, leaf in tree.items(specs) if path.startswith(f"{stack}/layers/")]
    return [leaf for leaf in leaves if len(leaf.shape) >= 2]


def _active(leaf: ParamSpec, experts_per_token: int) -> float:
    """Elements that a row is multiplied with."""
    share = experts_per_token / leaf.shape[0] if EXPERTS in leaf.axes else 1.0
    return leaf.numel * share


def _check_buckets(name: str, buckets: Sequence[int], multiple: int) -> None:
    positive = bool(buckets) and all(bucket > 0 for bucket in buckets)
    if not positive or any(b <= a for a, b in pairwise(buckets)):
        raise UserError(f"{name} must be positive and strictly increasing, got {list(buckets)}")
    for bucket in buckets:
        if bucket % multiple:
            raise UserError(
                f"{name} must be multiples of {multiple}, what makes a feature, got {bucket}; use "
                f"{-(-bucket // multiple) * multiple}"
            )
