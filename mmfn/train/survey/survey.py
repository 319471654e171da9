"""A survey of a data set: every row measured once, in a stream, on several threads."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from mmfn.batch import Sample
from mmfn.models import Family
from mmfn.train.data.bad import BadSample
from mmfn.train.data.reader import check_learned
from mmfn.train.survey.counts import Counts, Row, row_of
from mmfn.train.survey.fill import BUDGETS, Fill, Fills, Plan

AHEAD = 64  # rows a thread may be ahead of the slowest


class Measurable(Protocol):
    """What a survey needs of a data set; called from several threads at once."""

    def __len__(self) -> int: ...

    def measure(self, index: int) -> Sample: ...

    def place(self, index: int) -> str: ...


@dataclass(kw_only=True)
class Survey:
    """What was seen. `inputs`: of each tower, how many inputs of its encoder make a unit."""

    counts: Counts = field(default_factory=Counts)
    fills: list[Fill] = field(default_factory=list)
    inputs: dict[str, int] = field(default_factory=dict)


def survey(
    dataset: Measurable,
    family: Family,
    cfg: Any,
    plan: Plan,
    *,
    budgets: Sequence[int] = BUDGETS,
    workers: int = 1,
    show: Callable[[int, int], None] | None = None,
) -> Survey:
    """Measure all rows; what a row is skipped for is counted. `show(done, total)` is called after every row."""
    counts, fills = Counts(), Fills(plan, budgets)
    total = len(dataset)

    def measure(index: int) -> Row | BadSample:
        try:
            sample = dataset.measure(index)
            check_learned(sample, dataset.place(index))
            return row_of(sample, family, cfg)
        except BadSample as error:
            return error

    for done, row in enumerate(_in_order(measure, total, workers), start=1):
        if isinstance(row, BadSample):
            counts.skip(row)
        else:
            counts.add(row)
            fills.add({"tokens": row.tokens, **row.units})
        if show is not None:
            show(done, total)
    fills.flush()
    inputs = {name: kind.inputs for name, kind in family.towers(cfg).items()}
    return Survey(counts=counts, fills=fills.fills, inputs=inputs)


def _in_order(measure: Callable[[int], Row | BadSample], total: int, workers: int) -> Iterator[Row | BadSample]:
    """`measure` of all rows in order, a bounded number of them ahead."""
    if workers < 1:
        yield from map(measure, range(total))
        return
    indices = iter(range(total))
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="mmfn-survey") as pool:
        pending: deque[Future[Row | BadSample]] = deque()
        try:
            pending.extend(pool.submit(measure, i) for i in islice(indices, workers * AHEAD))
            while pending:
                row = pending.popleft().result()
                pending.extend(pool.submit(measure, i) for i in islice(indices, 1))
                yield row
        finally:
            pool.shutdown(cancel_futures=True)
