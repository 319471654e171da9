"""Samples that are left out: what is recorded of each, and when there are too many.

What is skipped is a function of the data and the settings alone: a run that is resumed or replayed, with any number
of workers and ranks, skips the same.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mmfn.errors import UserError
from mmfn.train.data.bad import BadSample
from mmfn.train.data.entries import show
from mmfn.train.data.step_lines import cut_lines

BAD, TOO_LONG = "bad", "too_long"
KINDS = (BAD, TOO_LONG)
SHOWN = 3  # reasons that an error names
FEW = 1000  # of fewer samples, the share that is bad says little


@dataclass(frozen=True, kw_only=True)
class Skip:
    """A sample that is left out.

    `place`: in the order of data. `id`: its own, or its number. `row`: where it is stored. `kind`: one of `KINDS`.
    """

    place: int
    id: str
    row: str
    kind: str
    reason: str

    @staticmethod
    def of(place: int, error: BadSample, kind: str = BAD) -> "Skip":
        """The skip of what is wrong with a sample."""
        return Skip(place=place, id=error.id, row=error.place, kind=kind, reason=error.reason)

    def __str__(self) -> str:
        return f"sample {show(self.id)} of {self.row}: {self.reason}"


def count_kinds(skips: Iterable[Skip]) -> dict[str, int]:
    """How many there are of each kind, those of which there are none as well."""
    counts = Counter(skip.kind for skip in skips)
    return {kind: counts[kind] for kind in KINDS}


def check_share(skips: Sequence[Skip], num_bad: int, num_seen: int, size: int, most: float) -> None:
    """Raise ValueError where more than the share `most` of the samples seen is bad, or all, naming some of `skips`.

    `size`: of the data set. Fewer than a thousand samples, or fewer than there are, count as so many.
    """
    first = " | ".join(str(skip) for skip in skips[:SHOWN])
    if size <= num_seen == num_bad:
        raise UserError(f"none of the {size} samples can be used, and there is nothing to train on: {first}")
    if num_bad <= most * max(num_seen, min(size, FEW)):
        return
    raise UserError(
        f"{num_bad} of {num_seen} samples cannot be used, more than data.max_bad_share {most:g} allows: {first} - mend "
        "them, or raise data.max_bad_share (1: never stop)"
    )


class Ledger:
    """`skipped.jsonl`: one line for each skip, `{"step", "place", "id", "row", "kind", "reason"}`, by step and place.

    There is no file while nothing is skipped.
    """

    def __init__(self, path: Path, num_steps: int = 0) -> None:
        """Lines behind the first `num_steps` steps are removed: a run that goes on from there writes them again.

        So is a last line that a kill has cut short, which is of such a step. The file is replaced in one go.
        """
        self.path = path
        cut_lines(path, num_steps)

    def write(self, step: int, skips: Sequence[Skip]) -> None:
        """Add the skips of a step (from 1), in ASCII: an id may hold what no encoding takes, or what ends a line."""
        if not skips:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps({'step': step, **asdict(skip)})}\n" for skip in skips)
