"""Counts over a data set that is read as a stream: nothing here grows with the number of its rows.

Lengths are counted exactly, each by its value; of what is skipped, kinds of reasons and the first few of each.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmfn.batch import AUDIO, IGNORE, IMAGE, VIDEO, Sample
from mmfn.models import Family
from mmfn.packing import num_units
from mmfn.train.data.bad import BadSample

KINDS = {"image": IMAGE, "video": VIDEO, "audio": AUDIO}
EXAMPLES = 3  # of a reason why samples are skipped
REASONS = 200  # kinds of them that are told apart
_DETAIL = re.compile(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|\([^)]*\)|\d+(\.\d+)?")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one sample adds. `units`: of each tower; `media`: by kind, how many tokens stand for each of its media."""

    tokens: int
    trained: int
    units: Mapping[str, int]
    media: Mapping[str, Sequence[int]]


def row_of(sample: Sample, family: Family, cfg: Any) -> Row:
    """The numbers of a sample, whose media need no inputs (they may lie on the meta device)."""
    media = {kind: sample.media(number) for kind, number in KINDS.items()}
    return Row(
        tokens=sample.tokens_T.numel(),
        trained=int((sample.labels_T != IGNORE).sum()),
        units={name: num_units(sample, tower) for name, tower in family.towers(cfg).items()},
        media={kind: [family.data.num_tokens(kind, x, cfg) for x in items] for kind, items in media.items() if items},
    )


@dataclass(kw_only=True)
class Reason:
    """Samples that are skipped for one kind of reason, and the first sentences that said so."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Counts:
    """All rows so far. `tokens`, `units[tower]`, `media[kind]`: value -> how many samples or media have it."""

    rows: int = 0
    trained: int = 0
    tokens: Counter[int] = field(default_factory=Counter)
    units: dict[str, Counter[int]] = field(default_factory=dict)
    media: dict[str, Counter[int]] = field(default_factory=dict)
    text_only: int = 0
    reasons: dict[str, Reason] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        """One more row that can be used."""
        self.rows += 1
        self.trained += row.trained
        self.tokens[row.tokens] += 1
        self.text_only += not row.media
        for name, num in row.units.items():
            self.units.setdefault(name, Counter())[num] += 1
        for kind, tokens in row.media.items():
            self.media.setdefault(kind, Counter()).update(tokens)

    def skip(self, sample: BadSample) -> None:
        """One more row that cannot be used."""
        self.rows += 1
        kind = _DETAIL.sub("…", " ".join(sample.reason.split()))
        if kind not in self.reasons and len(self.reasons) >= REASONS:
            kind = "other reasons"
        reason = self.reasons.setdefault(kind, Reason())
        reason.count += 1
        if len(reason.examples) < EXAMPLES:
            reason.examples.append(" ".join(str(sample).split()))

    @property
    def samples(self) -> int:
        """Rows that can be used."""
        return self.tokens.total()

    @property
    def skipped(self) -> int:
        """Rows that cannot."""
        return self.rows - self.samples


def total(counter: Mapping[int, int]) -> int:
    """The sum of all that was counted."""
    return sum(value * count for value, count in counter.items())


def percentile(counter: Mapping[int, int], share: float) -> int:
    """The least value that at least a `share` of what was counted does not exceed; 0 where nothing was.

    >>> percentile({1: 3, 10: 1}, 0.75), percentile({1: 3, 10: 1}, 0.76)
    (1, 10)
    """
    need, seen = share * sum(counter.values()), 0
    for value in sorted(counter):
        seen += counter[value]
        if seen >= need:
            return value
    return 0


def histogram(counter: Mapping[int, int]) -> list[tuple[int, int, int]]:
    """`(low, high, count)` for the ranges [low, high) between powers of two, from the first to the last with any.

    >>> histogram({0: 1, 3: 2, 9: 1})
    [(0, 1, 1), (1, 2, 0), (2, 4, 2), (4, 8, 0), (8, 16, 1)]
    """
    by_power: Counter[int] = Counter()
    for value, count in counter.items():
        by_power[value.bit_length()] += count
    if not by_power:
        return []
    return [(low, high, by_power[power]) for power, low, high in _ranges(min(by_power), max(by_power))]


def _ranges(first: int, last: int) -> Iterator[tuple[int, int, int]]:
    for power in range(first, last + 1):
        yield power, (1 << power) >> 1, 1 << power
