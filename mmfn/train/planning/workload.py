"""What every rank of a plan is given in a step: samples of one length with an image each, packed like real ones."""

from dataclasses import dataclass
from typing import Any

from mmfn.batch import Batch
from mmfn.errors import UserError
from mmfn.models import Family
from mmfn.packing import Sizes


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every rank is given in a step.

    `tokens` per rank and micro-batch: a batch of cp ranks has cp times as many, cut into samples of `sample_tokens`
    (the last may be shorter). A sample starts with an image of `image_side` x `image_side` inputs of its encoder, if it
    has room; the side is rounded down to what the tower can merge. `segment_multiple`: see `mmfn.packing.Sizes`.
    """

    tokens: int
    sample_tokens: int = 4096
    image_side: int = 32
    micro_batches: int = 1
    segment_multiple: int = 1

    def __post_init__(self) -> None:
        least = {"tokens": 1, "sample_tokens": 1, "image_side": 0, "micro_batches": 1, "segment_multiple": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise UserError(f"{name} is {getattr(self, name)} but must be at least {lowest}; raise it")


def make_batch(family: Family, cfg: Any, workload: Workload, num_ranks: int) -> Batch:
    """The batch of `num_ranks` ranks that share one. What encoders read is meta where a recorder runs."""
    samples = [family.example(n, workload.image_side, cfg) for n in lengths_of(workload, num_ranks)]
    return family.pack(samples, cfg, Sizes(segment_multiple=workload.segment_multiple))


def lengths_of(workload: Workload, num_ranks: int) -> list[int]:
    """Tokens of each sample of a batch."""
    total, longest = workload.tokens * num_ranks, workload.sample_tokens
    return [longest] * (total // longest) + [total % longest] * (total % longest > 0)
