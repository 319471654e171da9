"""`Reader`: samples by their place in the order of data, and what becomes of those that cannot be used."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, Protocol

import torch

from mmfn.batch import IGNORE, Sample
from mmfn.errors import UserError
from mmfn.train.data.bad import BadSample
from mmfn.train.data.sizes import Buckets, Rates, Size
from mmfn.train.data.skips import BAD, TOO_LONG, Skip
from mmfn.train.data.sources.mixing import Order

LongPolicy = Literal["skip", "cut", "stop"]


class Samples(Protocol):
    """What a loader needs of a data set; called from several threads, or from other processes, at once.

    All raise `BadSample` for a sample that cannot be used. `measure`: the sample with media on the meta device, of the
    same shapes. `beginnings`: shorter conversations, the longest first, each of which ends with an answer of the
    assistant. `place`: where a sample is stored. `fingerprints`: of its files, others when these change.
    """

    @property
    def fingerprints(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def order(self, seed: int) -> Order: ...
    def place(self, index: int) -> str: ...
    def sample(self, index: int) -> Sample: ...
    def measure(self, index: int) -> Sample: ...
    def beginnings(self, index: int, *, is_measured: bool) -> Iterator[Sample]: ...


def check_learned(sample: Sample, place: str) -> None:
    """Raises BadSample for a sample without a label. `place`: where it is stored."""
    if not bool((sample.labels_T != IGNORE).any()):
        raise BadSample(
            sample.id,
            place,
            "it has nothing to learn; give it an answer of the assistant that is learned, or remove it",
        )


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Reads samples and applies the policies. It has no state, so that any worker may have a copy.

    `long_samples`: of samples that no micro-batch holds, "skip", "cut" to the longest beginning of the conversation
    that fits and ends with an answer, or "stop" with an error.
    """

    dataset: Samples
    order: Order
    buckets: Buckets
    rates: Rates
    long_samples: LongPolicy = "skip"

    def indices(self, places: Sequence[int]) -> list[int]:
        """The samples at places of the order of data."""
        found: list[int] = self.order.rows(torch.tensor(places, dtype=torch.int64)).tolist()
        return found

    def read(
        self, places: list[int], sizes: Mapping[int, tuple[int, ...]] = MappingProxyType({})
    ) -> tuple[list[Sample], list[Skip], int]:
        """The samples at places, numbered by them, those that are left out, and how many were cut.

        `sizes`: what was measured of them; a sample that has others is left out, as its files are not what they say.
        Raises ValueError for a long sample where that is the policy.
        """
        samples, skips, num_cut = [], [], 0
        for place, index in zip(places, self.indices(places), strict=True):
            sample, is_cut = self._take(place, index, is_measured=False)
            if not isinstance(sample, Skip) and self.buckets.sizes(sample) != sizes.get(
                place, self.buckets.sizes(sample)
            ):
                reason = "its media have other sizes than their headers say; write the files anew"
                sample, is_cut = Skip.of(place, BadSample(sample.id, self.dataset.place(index), reason)), False
            num_cut += is_cut
            if isinstance(sample, Skip):
                skips.append(sample)
            else:
                samples.append(replace(sample, number=place))
        return samples, skips, num_cut

    def measure(self, places: list[int]) -> dict[int, Size | Skip]:
        """The sizes of the samples at places, or why they are left out, as far as that is known without their media."""
        found: dict[int, Size | Skip] = {}
        for place, index in zip(places, self.indices(places), strict=True):
            sample, _ = self._take(place, index, is_measured=True)
            found[place] = sample if isinstance(sample, Skip) else self.buckets.measure(sample, self.rates)
        return found

    def check(self, index: int) -> Skip | None:
        """Why a sample of the data set would be left out, its media read; None for a good one."""
        sample, _ = self._take(index, index, is_measured=False)
        return sample if isinstance(sample, Skip) else None

    def _take(self, place: int, index: int, *, is_measured: bool) -> tuple[Sample | Skip, bool]:
        """A sample, or why there is none, and whether it was cut."""
        try:
            sample = self.dataset.measure(index) if is_measured else self.dataset.sample(index)
            check_learned(sample, self.dataset.place(index))
            excess = self.buckets.excess(sample)
            if excess is None:
                return sample, False
            if self.long_samples == "cut":
                beginnings = self.dataset.beginnings(index, is_measured=is_measured)
                if beginning := next((x for x in beginnings if self.buckets.excess(x) is None), None):
                    return beginning, True
        except BadSample as error:
            return Skip.of(place, error, BAD), False
        if self.long_samples == "stop":
            raise UserError(f"sample {sample.id!r} of {self.dataset.place(index)} {excess}")
        return Skip.of(place, BadSample(sample.id, self.dataset.place(index), f"it {excess}"), TOO_LONG), False
