"""The training loop: steps over prefetched data and a record of every step.

Metrics are read one step late: a step is started before the numbers of the one before are asked for. (On an accelerator
reading them still waits for the step that was started last.)
"""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from mmfn import batch as packing
from mmfn.errors import UserError
from mmfn.train.build.run import Run
from mmfn.train.config.schema import TrainSection
from mmfn.train.data import Agreed, agree, prefetch
from mmfn.train.gradients import Metrics
from mmfn.train.objective import weigh_by
from mmfn.train.step import State

RATE_STEPS = 20  # tokens per second are measured over so many steps
StepRecord = dict[str, Any]  # what `train` says of a step


def train(run: Run, emit: Callable[[StepRecord], None]) -> State:
    """Take all steps and return the last state; the run's own is consumed. `emit(record)` is called once per step.

    A record holds `step` (from 1), every 0-D metric of the step: `loss`, its terms if it has several and what else a
    model counts (see `objective.loss_fn`), `grad_norm`, `lr`, `skipped` (1: loss or gradients were not finite or a
    spike, nothing changed), `in_a_row` (skipped steps up to this one); the counts of its data (`tokens`, `supervised`,
    `media_tokens`, `samples`, `microbatches`, `padding` as a share), `wait_s` (time it waited for data), `step_s`,
    `tokens_per_s` (no padding, over the last steps) and `eta_s`.
    On a mesh counts are those of all ranks, `microbatches` the number each of them computes, and times this rank's.
    Raises ValueError on all ranks, one step late, when `train.max_skips` steps in a row were skipped, and for a metric
    that has the name of something else in a record.
    """
    config = run.loaded.config
    num_steps = config.train.steps
    batch_axis, empty = run.place.host["batch"], run.loader.empty()
    meter = _Meter(num_steps)
    state, started = run.state, None
    shares = prefetch(run.loader.share, 0, num_steps, workers=config.data.workers, ahead=config.data.ahead)

    def finish(facts: StepRecord, metrics: Metrics) -> None:
        record = meter.finish(facts, metrics)
        emit(record)
        _check_skips(record, config.train)

    for step in range(1, num_steps + 1):
        asked = time.perf_counter()
        share = agree(next(shares), batch_axis, empty)
        facts = _facts(step, share, time.perf_counter() - asked)
        weighed = weigh_by(share.microbatches, run.objective, share.labels_DAN, batch_axis.index)
        state, metrics = run.step(state, [packing.to(b, run.place.device) for b in weighed])
        if started is not None:
            finish(*started)
        started = facts, metrics
    if started is not None:
        finish(*started)
    return state


class _Meter:
    """Turns a step's metrics into numbers (waiting for the device) and its time into rates."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.last = time.perf_counter()
        self.first = 0.0  # when the first step was done: it may have compiled, so it says nothing about the rest
        self.window: deque[tuple[int, float]] = deque(maxlen=RATE_STEPS)

    def finish(self, facts: StepRecord, metrics: Metrics) -> StepRecord:
        """The complete record of a step that was started earlier."""
        numbers = numbers_of({name: x for name, x in metrics.items() if name != "tokens"})  # `supervised` says that
        now = time.perf_counter()
        step_s, self.last = now - self.last, now
        self.first = self.first or now
        self.window.append((facts["tokens"], step_s))
        tokens, seconds = map(sum, zip(*self.window, strict=True))
        done = facts["step"] - 1
        per_step_s = (now - self.first) / done if done else step_s
        times = {
            "step_s": round(step_s, 6),
            "tokens_per_s": round(tokens / seconds, 1),
            "eta_s": round((self.num_steps - facts["step"]) * per_step_s, 1),
        }
        others = {**facts, **times}
        if clash := sorted(numbers.keys() & others.keys()):
            raise UserError(f"the model has a loss or a stat {clash[0]!r}, which a record needs; give it another name")
        return {"step": facts["step"], **numbers, **others}


def numbers_of(metrics: Metrics) -> dict[str, float]:
    """The 0-D metrics as numbers, whole ones of whole dtypes, by one copy from each device that some lie on."""
    devices: dict[torch.device, list[str]] = {}
    for name, x in metrics.items():
        if x.ndim == 0:
            devices.setdefault(x.device, []).append(name)
    found: dict[str, float] = {}
    for names in devices.values():
        found |= zip(names, torch.stack([metrics[name].to(torch.float64) for name in names]).tolist(), strict=True)
    return {
        name: found[name] if x.is_floating_point() else int(found[name]) for name, x in metrics.items() if x.ndim == 0
    }


def _facts(step: int, share: Agreed, wait_s: float) -> StepRecord:
    counts = share.counts
    return {
        "step": step,
        "samples": counts.samples,
        "microbatches": len(share.microbatches),
        "tokens": counts.tokens,
        "supervised": counts.supervised_tokens,
        "media_tokens": counts.media_tokens,
        "padding": round(counts.padding_share, 4),
        "wait_s": round(wait_s, 6),
    }


def _check_skips(record: StepRecord, section: TrainSection) -> None:
    """Raise ValueError where too many steps in a row were skipped to hope for better ones."""
    if record["in_a_row"] < section.max_skips:
        return
    fix = "lower optimizer.lr, check weights and data, or raise train.max_skips"
    if is_finite(record):
        fix = (
            f"it was a spike, so raise train.spike_factor ({section.spike_factor:g}), change train.spike_window "
            f"({section.spike_window}; 0 looks for no spikes), lower optimizer.lr, or raise train.max_skips"
        )
    raise UserError(
        f"{record['in_a_row']} steps in a row were skipped, the last of them step {record['step']} with loss "
        f"{record['loss']:.4g} and gradient norm {record['grad_norm']:.4g}; {fix}"
    )


def is_finite(record: StepRecord) -> bool:
    return math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])
