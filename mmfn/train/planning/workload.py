"""What every rank of a plan is given in a step: samples of one length with an image each, packed like real ones."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isqrt
from typing import Any

from mmfn.batch import Batch
from mmfn.errors import UserError
from mmfn.models import Family
from mmfn.packing import Sizes, num_units
from mmfn.parallel.planning.trace import Recorder
from mmfn.train.config.schema import Config
from mmfn.train.data.sizes import units_of


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every rank is given in a step.

    `tokens` per rank and micro-batch: a batch of cp ranks has cp times as many, cut into samples of `sample_tokens`
    (the last may be shorter). A sample starts with an image of `image_side` x `image_side` inputs of its encoder, if it
    has room; the side is rounded down to what the tower can merge. `units`, `segment_multiple`: as of
    `mmfn.packing.Sizes`.
    """

    tokens: int
    sample_tokens: int = 4096
    image_side: int = 32
    micro_batches: int = 1
    units: Mapping[str, int] = field(default_factory=dict)
    segment_multiple: int = 1

    def __post_init__(self) -> None:
        least = {"tokens": 1, "sample_tokens": 1, "image_side": 0, "micro_batches": 1, "segment_multiple": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise UserError(f"{name} is {getattr(self, name)} but must be at least {lowest}; raise it")


def make_batch(family: Family, cfg: Any, workload: Workload, num_ranks: int) -> Batch:
    """The batch of `num_ranks` ranks that share one. What encoders read is meta where a recorder runs."""
    samples = [family.example(n, workload.image_side, cfg) for n in lengths_of(workload, num_ranks)]
    return family.pack(samples, cfg, Sizes(units=workload.units, segment_multiple=workload.segment_multiple))


def lengths_of(workload: Workload, num_ranks: int) -> list[int]:
    """Tokens of each sample of a batch."""
    total, longest = workload.tokens * num_ranks, workload.sample_tokens
    return [longest] * (total // longest) + [total % longest] * (total % longest > 0)


def largest_workload(config: Config, family: Family, cfg: Any, sample_tokens: int = 4096) -> Workload:
    """What a rank is given by the largest buckets of a config: what its memory must hold.

    Samples of `sample_tokens` or, where these are fewer, of `data.max_tokens` have images that fill the towers' buckets
    as far as they can. A step has the micro-batches of `data.batch_tokens`; with `data.batch_samples` it is not known
    how many, and two are taken, as gradients are then summed. Raises ValueError for buckets that training refuses.
    """
    data, layout = config.data, config.layout
    bucket = data.token_buckets[-1]
    whole = Workload(
        tokens=max(1, bucket // layout.cp),
        sample_tokens=min(sample_tokens, data.max_tokens or bucket, bucket),
        micro_batches=max(1, (data.batch_tokens or 0) // (bucket * layout.replicate * layout.dp))
        if data.batch_tokens
        else 2,
        units={name: units[-1] for name, units in units_of(data.tower_buckets, family.towers(cfg)).items()},
    )
    return replace(whole, image_side=_largest_side(whole, layout.cp, family, cfg))


def _largest_side(workload: Workload, num_ranks: int, family: Family, cfg: Any) -> int:
    """The largest image that every sample can have within the units of the towers; 0: none."""
    kinds, lengths = family.towers(cfg), Counter(lengths_of(workload, num_ranks))

    def fits(side: int) -> bool:
        used: Counter[str] = Counter()
        with Recorder(is_fake=True):
            for length, count in lengths.items():
                sample = family.example(length, side, cfg)
                used.update({name: count * num_units(sample, kind) for name, kind in kinds.items()})
        return all(used[name] <= room for name, room in workload.units.items()) and used.total() > 0

    most = max((units * kinds[name].inputs for name, units in workload.units.items()), default=0)
    low, high = 0, isqrt(most // lengths.total()) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
