"""What a deep stack of equal blocks does, from three traces of shallow ones. Exact, or refused.

Every figure of a step is affine in the number of repeated blocks, unless something is wrong: three depths in equal
steps tell (second differences are zero). A peak is a maximum over time and so only convex; therefore it is extended
stretch by stretch (one per block, forward and backward) and the largest is taken afterwards. Stretches near the front
of the stack are matched from the front, the last ones from the back; those between lie between the first and the last
of them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmfn.parallel.planning.trace import Mark, Peak, Trace

Stretch = tuple[str, int, str, int]  # phase, micro-batch, counted from where, blocks from there


@dataclass(frozen=True, kw_only=True)
class Depths:
    """Three depths to trace, `period` blocks apart; `front`: calls of a block before the repetition may grow, and
    `back` behind it."""

    first: int
    period: int
    front: int
    back: int

    @property
    def all(self) -> tuple[int, int, int]:
        """The number of blocks of each trace."""
        return self.first, self.first + self.period, self.first + 2 * self.period


def choose_depths(
    blocks: Sequence[Any], num_special: int, num_before: int, step: int = 1, num_behind: int = 0
) -> Depths | None:
    """Depths for a stack whose blocks are declared as `blocks`, or None where tracing all is as quick.

    `num_special`: blocks at the front that are treated differently. `num_before`: calls of blocks before this stack.
    `step`: behind them blocks are treated alike in periods of so many. `num_behind`: in the backward of a block
    something of so many later ones is still under way.
    """
    L = len(blocks)
    for period in range(step, L // 4 + 1, step):
        start = next((i for i in range(L - period) if blocks[i:-period] == blocks[i + period :]), L)
        least = max(start + period - 1, num_special) + 1  # from its first block on a kind holds what all of it share
        back = period + num_behind
        first = least + back + (L - least - back) % period
        if first + 2 * period < L:
            return Depths(first=first, period=period, front=num_before + first - back, back=back)
    return None


def extend(traces: Sequence[Trace], depths: Depths, num_before: int, num_blocks: int) -> Trace | None:
    """The trace of `num_blocks` blocks, or None where a figure is not affine in the depth."""
    steps = (num_blocks - depths.first) // depths.period
    tables = [
        [_Table(t.count), _Table(t.sent_bytes), _Table(t.exposed), _Table(t.flops), _Table(t.account)] for t in traces
    ]
    figures = [_affine(three, steps) for three in zip(*tables, strict=True)]
    placed = [_by_place(t.peaks, depths, num_before + n) for t, n in zip(traces, depths.all, strict=True)]
    ends = [{k: p for k, p in peaks.items() if k[2] != "middle"} for peaks in placed]
    if any(f is None for f in figures) or not ends[0].keys() == ends[1].keys() == ends[2].keys():
        return None
    peaks: dict[Mark, Peak] = {}
    for stretch in ends[0]:
        parts = _affine([_Table(e[stretch].parts) for e in ends], steps)
        if parts is None:
            return None
        phase, batch, side, offset = stretch
        index = offset if side == "front" else num_before + num_blocks + offset
        peaks[phase, batch, index] = Peak.of(parts)
    peaks |= _middle(placed, depths, num_before + num_blocks, steps)
    count, sent_bytes, exposed, flops, account = (Counter(f) for f in figures if f is not None)
    return Trace(count=count, sent_bytes=sent_bytes, exposed=exposed, flops=flops, account=account, peaks=peaks)


class _Table(dict[Any, int]):
    """Numbers by name; a name that is absent has 0."""

    def __missing__(self, key: Any) -> int:
        return 0


def _affine(three: Sequence[Mapping[Any, int]], steps: int) -> dict[Any, int] | None:
    """The tables continued by `steps` steps from the first, or None where they do not lie on a line."""
    a, b, c = three
    names = {name: None for table in three for name in table}  # in order
    if any(a[n] - 2 * b[n] + c[n] for n in names):
        return None
    return {n: a[n] + steps * (b[n] - a[n]) for n in names}


def _by_place(peaks: Mapping[Mark, Peak], depths: Depths, num_calls: int) -> dict[Stretch, Peak]:
    """Stretches by their place in the stack."""

    def place(mark: Mark) -> Stretch:
        phase, batch, index = mark
        if index < depths.front:
            return phase, batch, "front", index
        if index >= num_calls - depths.back:
            return phase, batch, "back", index - num_calls
        return phase, batch, "middle", index - depths.front

    return {place(mark): peak for mark, peak in peaks.items()}


def _middle(placed: Sequence[Mapping[Stretch, Peak]], depths: Depths, num_calls: int, steps: int) -> dict[Mark, Peak]:
    """The first and the last period between front and back, from traces that have one of them and two."""
    found: dict[Mark, Peak] = {}
    for (phase, batch, side, offset), one in placed[1].items():
        if side != "middle":
            continue
        for shift, index in (
            (0, depths.front + offset),
            (depths.period, num_calls - depths.back - depths.period + offset),
        ):
            two = placed[2][phase, batch, side, offset + shift]
            a, b = _Table(one.parts), _Table(two.parts)
            found[phase, batch, index] = Peak.of({n: a[n] + (steps - 1) * (b[n] - a[n]) for n in {**a, **b}})
    return found
