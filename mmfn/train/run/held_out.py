"""Held-out loss: cross entropy by data set and by what its samples are made of, over the ranks of any layout."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mmfn.batch import Sample
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.host_values import gather_values
from mmfn.train.data import Dataset, Workers, prefetch
from mmfn.train.data.processor import media_of
from mmfn.train.forward import Forward

AHEAD = Workers(number=1, ahead=1)  # a batch is read while the one before is computed
LossSums = dict[str, tuple[float, int]]
"""What was measured -> (cross entropy summed over its supervised tokens, their number)."""


def held_out_loss(
    forward: Forward, dataset: Dataset, *, batch_samples: int, on_batch: Callable[[], None] = lambda: None
) -> LossSums:
    """The loss of every entry of `dataset`, by "SET/MODALITY": `{"digits.json/image": (12.5, 40)}`.

    SET is the name of the data set's file, MODALITY the kinds of media in a sample, "text" or such as "image+video".
    The ranks of `forward` divide the entries, `batch_samples` at once, and all get the sums of all; the mean over any
    keys is the sum of sums over that of numbers. `on_batch` is called behind every batch, on all ranks. Raises
    BadSample, naming the sample that cannot be read.
    """
    names = set_names(dataset)
    found: LossSums = {}

    def read(indices: Sequence[int]) -> tuple[Sequence[int], list[Sample]]:
        return indices, [dataset.sample(i) for i in indices]

    for indices, samples in prefetch(read, shares(len(dataset), batch_samples, forward.axis), AHEAD):
        parts = [dataset.records.locate(i)[0] for i in indices]
        keys = [f"{names[part]}/{modality(sample)}" for part, sample in zip(parts, samples, strict=True)]
        found = add_sums([found, forward.loss_sums(samples, keys)])
        on_batch()
    return add_sums(gather_values(found, forward.axis, "held-out loss"))


def shares(num: int, at_once: int, axis: Axis) -> Iterator[Sequence[int]]:
    """This rank's part of `num` entries in batches; every rank gets as many, some of them empty at the end.

    >>> list(shares(7, 2, Axis(name="world", size=2, index=1)))
    [range(1, 5, 2), range(5, 7, 2)]
    """
    own = range(axis.index, num, axis.size)
    for first in range(0, -(-num // axis.size), at_once):
        yield own[first : first + at_once]


def modality(sample: Sample) -> str:
    """The kinds of media in a sample: "text" of one without, "audio+image" of one with both."""
    return "+".join(sorted(kind for kind, media in media_of(sample).items() if media)) or "text"


def set_names(dataset: Dataset) -> list[str]:
    """The names of the data sets that a dataset is made of: of their files, numbered where several have one."""
    names = [Path(subset.path).name for subset in dataset.subsets]
    several = {name for name, count in Counter(names).items() if count > 1}
    return [f"{name}#{place}" if name in several else name for place, name in enumerate(names)]


def add_sums(parts: Sequence[LossSums]) -> LossSums:
    """Sums and numbers added up key by key, in the order of the parts."""
    total: LossSums = {}
    for key, (value, number) in ((key, pair) for part in parts for key, pair in part.items()):
        before = total.get(key, (0.0, 0))
        total[key] = before[0] + value, before[1] + number
    return dict(sorted(total.items()))
