"""What a replay found, in a few lines for people and as JSON for scripts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from mmfn.train.run.replay.against import Against
from mmfn.train.run.replay.compare import Change
from mmfn.train.run.replay.history import Number
from mmfn.train.run.replay.other import LeafError
from mmfn.train.run.replay.steps import Again, Observation

BEGINNING = '{\n  "step": '  # of a replay as JSON
SHOWN = 3  # of a list, in lines
MEANING = {"lr": "the learning rate is another", "grad_norm": "the loss is the same: it is the backward pass"}


@dataclass(frozen=True, kw_only=True)
class Side:
    """What another program gave. `numbers`: of the run's own and of it; `gradients`: how far leaves are from each
    other, the farthest first, of which `passes` is explained."""

    name: str
    numbers: Mapping[str, tuple[float, float]]
    gradients: Sequence[LeafError]
    passes: float

    @property
    def apart(self) -> list[LeafError]:
        """Gradients that are farther off than is explained."""
        return [one for one in self.gradients if not one.error <= self.passes]


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a replay found; see `lines`.

    `apart`: numbers that are not those of the log, of the first step with any; `tolerance`: what passes. `again`: what
    ranks saw of data and checkpoint on their own, None where that was not looked at, as nothing is apart.
    `judged_by`: the table and dtype that ops were held against, "" where they were not.
    """

    step: int
    layout: str
    checkpoint: str | None
    seen: Sequence[Observation]
    apart: Sequence[Number]
    tolerance: float
    is_compiled: bool
    again: Sequence[Again] | None
    judged_by: str
    other: Side | None
    against: Against | None = None

    @property
    def is_same(self) -> bool:
        """Whether nothing was found, and another run that is put beside it is the same."""
        return not any(self._findings()) and (self.against is None or self.against.is_same)

    def lines(self) -> list[str]:
        """All that was found, for a person."""
        one = self.seen[0]
        lines = [*one.notes, self._verdict()]
        lines += [f"  {text}" for text in self._findings()]
        if self.judged_by and not any(seen.findings for seen in self.seen):
            calls, worst = sum(seen.watch.num_calls for seen in self.seen), _worst(self.seen)
            lines.append(f"{calls} calls of ops agree with {self.judged_by}, forward and backward{worst}")
        if self.is_compiled and (self.judged_by or any(seen.findings for seen in self.seen)):
            lines.append("ops were watched eager; the run compiled them, which rounds elsewhere")
        if self.other is not None:
            lines += self._beside(self.other)
        return [*lines, *(self.against.lines() if self.against is not None else ())]

    def to_json(self) -> str:
        """The same for a script; it begins with `BEGINNING`."""
        one = self.seen[0]
        ops = [{"rank": rank, **asdict(f)} for rank, seen in enumerate(self.seen) for f in seen.findings]
        content = {
            "step": self.step,
            "layout": self.layout,
            "checkpoint": self.checkpoint,
            "same": self.is_same,
            "log": [asdict(number) for number in self.apart],
            "again": None if self.again is None else [asdict(one) for one in self.again],
            "behind": None if one.behind is None else [asdict(change) for change in self._behind()],
            "not_finite": {
                "state": one.state_faults,
                "batch": one.batch_faults,
                "gradients": one.grad_faults,
            },
            "ops": ops,
            "updates": [{"rank": rank, **asdict(e)} for rank, seen in enumerate(self.seen) for e in seen.updates],
            "other": None if self.other is None else asdict(self.other),
            "against": None if self.against is None else asdict(self.against),
        }
        return json.dumps(_without_nan(content), indent=2) + "\n"

    def _verdict(self) -> str:
        one = self.seen[0]
        first, compared = self.step - len(one.steps) + 1, [numbers for numbers in one.steps if numbers]
        steps = f"step {self.step}" if first == self.step else f"steps {first} to {self.step}"
        start = f"from {self.checkpoint}" if self.checkpoint else "from its first step"
        if not compared:
            return f"{steps} {start}: the log has no record to compare with"
        if self.apart:
            return f"step {self.apart[0].step} is not what the log says ({start}, {self.layout}):"
        how = "bit for bit" if not self.tolerance else f"to rounding, {self.tolerance:g} of each number"
        is_whole = one.behind is not None and not self._behind() and not self.tolerance
        state = f", and so does the state behind step {self.step}" if is_whole else ""
        return f"{steps} {start} ({self.layout}): {'replays' if first == self.step else 'replay'} {how}{state}"

    def _behind(self) -> list[Change]:
        return [change for seen in self.seen for change in seen.behind or ()]

    def _findings(self) -> Iterator[str]:
        for number in self.apart[:SHOWN]:
            yield f"{number}{_meaning(number, self.apart)}"
        if self.apart and self.apart[0].step < self.step:
            yield f"look closer at that step: --step {self.apart[0].step}"
        yield from self._second_look()
        for number in self.seen[0].strayed[:SHOWN]:
            yield f"the step is not the same twice: {number.name} {number.found!r}, then {number.logged!r}"
        if (behind := self._behind()) and not self.tolerance:
            yield f"the state behind step {self.step} is not the run's:"
            yield from _shown([f"  {change}" for change in _farthest(behind)])
        for rank, seen in enumerate(self.seen):
            of_rank = f"rank {rank}: " if len(self.seen) > 1 else ""
            for what, faults in (("the state before it", seen.state_faults), ("its data", seen.batch_faults)):
                for path, count in faults[:SHOWN]:
                    yield f"{of_rank}{what}: {path} holds {count} numbers that are not finite"
            for i, finding in enumerate(seen.findings[:SHOWN]):
                yield f"{of_rank}{'first' if not i else 'then'}: {finding}"
            yield from (f"{of_rank}{error}" for error in seen.updates[:SHOWN])
            if seen.grad_faults and not seen.findings:
                path, count = seen.grad_faults[0]
                yield f"{of_rank}the gradient of {path} holds {count} numbers that are not finite"
        if self.other is not None:
            for one in self.other.apart[:SHOWN]:
                yield f"the gradient of {one}, differs from that by {self.other.name}"

    def _second_look(self) -> Iterator[str]:
        """What of data and checkpoint is not what it should be."""
        if self.again is None:
            return
        data = [change for one in self.again for change in one.data]
        if data:
            yield "the data are others when they are read again:"
            yield from _shown([f"  {change}" for change in data])
        if self.again[0].stored is None:
            return
        stored, start = [change for one in self.again for change in one.stored or ()], self.again[0].start
        if stored:
            yield f"{self.checkpoint} is not the state that the steps from {start} give:"
            yield from _shown([f"  {change}" for change in _farthest(stored)])
            return
        yield f"{self.checkpoint} is the state that the steps from {start} give, bit for bit"
        if not data:
            yield "the data are the same when they are read again, so that files, code or machine are others"

    def _beside(self, other: Side) -> list[str]:
        numbers = [f"{name} {a!r} and {b!r}" for name, (a, b) in other.numbers.items() if name in ("loss", "grad_norm")]
        lines = [f"as the run took it and by {other.name}: {', '.join(numbers)}"]
        if other.gradients and not other.apart:
            lines.append(f"gradients agree; the farthest: {other.gradients[0]}")
        return lines


def _without_nan(value: Any) -> Any:
    """The same with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _without_nan(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(x) for x in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _meaning(number: Number, apart: Sequence[Number]) -> str:
    if number.is_data:
        return ": the data are others"
    if number.name == "grad_norm" and any(other.name == "loss" for other in apart):
        return ""
    return f": {MEANING[number.name]}" if number.name in MEANING else ""


def _farthest(changes: Sequence[Change]) -> list[Change]:
    """Leaves by how much of them differs: those of one flipped bit first, which are the cause of others."""
    return sorted(changes, key=lambda change: (change.bit is None, change.count / change.total))


def _shown(lines: Sequence[str]) -> list[str]:
    more = len(lines) - SHOWN
    return [*lines[:SHOWN], *([f"  and {more} more"] if more > 0 else [])]


def _worst(seen: Sequence[Observation]) -> str:
    found = [one.watch.worst for one in seen if one.watch.worst is not None and one.watch.worst.error is not None]
    if not found:
        return ""
    worst = max(found, key=lambda f: f.error.ratio if f.error is not None else 0.0)
    assert worst.error is not None
    return f"; the farthest, at {worst.error.ratio:.0%} of what passes: {worst.site}, {worst.pass_}"
