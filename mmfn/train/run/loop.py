"""The training loop: steps over prefetched data and a record of every step.

Metrics are read one step late: a step is started before the numbers of the one before are asked for. (On an accelerator
reading them still waits for the step that was started last.)
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

from mmfn import batch as packing
from mmfn.errors import UserError
from mmfn.parallel.mesh.host_values import gather_values
from mmfn.train.build.run import Run
from mmfn.train.config.schema import TrainSection
from mmfn.train.data.cursor import START, Cursor
from mmfn.train.data.skips import Skip
from mmfn.train.gradients import Metrics
from mmfn.train.objective import weigh_by
from mmfn.train.run.on_demand import Keep, OnDemand
from mmfn.train.run.record import Lap, Meter, StepRecord, facts_of, is_finite
from mmfn.train.step import State
from mmfn.train.watch import Watch

WriteSkips = Callable[[int, Sequence[Skip]], None]
HELD_OUT = "eval_loss"  # in the record of a step behind which the run was evaluated


class Task(Protocol):
    """What is done behind some steps, on all ranks; it returns what the step's record says of it.

    It must not change the state.
    """

    def is_due(self, step: int) -> bool: ...
    def __call__(self, state: State, cursor: Cursor) -> Mapping[str, float]: ...


def ignore(step: int, skips: Sequence[Skip]) -> None:
    """Of a rank that writes no files."""


def train(
    run: Run,
    emit: Callable[[StepRecord], None],
    write_skips: WriteSkips = ignore,
    *,
    start: Cursor = START,
    keep: Keep | None = None,
    tasks: Sequence[Task] = (),
    watch: Watch | None = None,
) -> State:
    """Take all steps and return the last state; the run's own is consumed. `emit(record)` is called once per step, and
    `write_skips(step, skips)` for each with samples that were left out, before it is computed.

    `start`: where the run's state and data are, default before the first step. `keep(state, cursor)` is called behind
    every step that it says is due, when its record is out; it must not change the state. What the `watch` of any rank
    is asked for is done behind the step that is under way, on all ranks.

    A record is a dict of numbers (`docs/metrics.md`): the step's number, its metrics, the counts of its data, its time.
    On a mesh counts are those of all ranks, `microbatches` the number each of them computes, and times this rank's.
    Raises ValueError on all ranks when too many samples are bad (`data.max_bad_share`), one step late when
    `train.max_skips` steps in a row were skipped, and for a metric that has the name of something else in a record.
    Raises `Stop` on all ranks where any was asked to stop.
    """
    config, watch = run.loaded.config, watch or Watch()
    num_steps, batch_index = config.train.num_steps, run.place.host["batch"].index
    records = _Records(emit, Meter.of(run, start.step), config.train)
    answer = OnDemand(keep, start, watch, "start it again" + " with output.overwrite=false" * config.output.overwrite)
    state, cursor = run.state, start
    shares = run.loader.steps(num_steps, start, watch=watch)

    for step in range(start.step + 1, num_steps + 1):
        watch.enter("data", step)
        waiting = time.perf_counter()
        share = next(shares)
        records.meter.waited(time.perf_counter() - waiting)
        facts = facts_of(step, share)
        if share.asked:
            records.finish()
            with records.meter.paused():
                answer(share.asked, state, cursor)
        if share.skips:
            write_skips(step, share.skips)
            run.loader.check_share(share)
        watch.enter("step", step)
        weighed = weigh_by(share.microbatches, run.objective, share.labels_DAN, batch_index)
        state, metrics = run.step(state, [packing.to(b, run.place.device) for b in weighed])
        lap = records.meter.lap()
        cursor, watch.is_saving = share.cursor, True
        records.finish()
        records.started = facts, metrics, lap
        due = [partial(task, state, cursor) for task in tasks if task.is_due(step)]
        loss = records.finish(due).get(HELD_OUT) if due else None
        if keep is not None and keep.is_due(step, loss):
            records.finish()
            watch.enter("save")
            with records.meter.paused():
                keep(state, cursor, loss)
    records.finish()
    answer(max(gather_values(watch.asked, run.place.host["world"], "asked")), state, cursor)
    return state


class _Records:
    """Finishes the record of the step that was started last."""

    def __init__(self, emit: Callable[[StepRecord], None], meter: Meter, section: TrainSection) -> None:
        self.emit, self.meter, self.section = emit, meter, section
        self.started: tuple[StepRecord, Metrics, Lap] | None = None

    def finish(self, tasks: Sequence[Callable[[], Mapping[str, float]]] = ()) -> StepRecord:
        """Read its metrics, do what is done behind the step, and emit its record, once; {} where that has been done."""
        record: StepRecord = {}
        if self.started is not None:
            record, self.started = self.meter.finish(*self.started), None
            with self.meter.paused():
                for task in tasks:
                    record |= task()
            self.emit(record)
            _check_skips(record, self.section)
        return record


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
