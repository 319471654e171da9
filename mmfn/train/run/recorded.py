"""A training with the files that grow while it goes on: metrics, skips, answers, made anew or cut to where it begins.

The first rank writes them. `train_recorded` is `loop.train` on any rank, with the checkpoints of its settings.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mmfn.train.build.run import Run
from mmfn.train.config.load import describe
from mmfn.train.data.skips import Ledger
from mmfn.train.data.step_lines import cut_lines
from mmfn.train.run import folder as run_folder
from mmfn.train.run.keeper import Keeper
from mmfn.train.run.loop import Task, WriteSkips, ignore, train
from mmfn.train.run.modes import collected, deterministic
from mmfn.train.run.progress import Progress
from mmfn.train.run.record import RATE_STEPS, StepRecord, Tally, notes, read_records
from mmfn.train.run.resume import Start
from mmfn.train.run.save import kinds_of
from mmfn.train.run.tasks import tasks_of
from mmfn.train.run.trackers import trackers
from mmfn.train.step import State
from mmfn.train.watch import Watch

Emit = Callable[[StepRecord], None]


def train_recorded(run: Run, folder: Path, progress: Progress, start: Start, watch: Watch) -> tuple[State, Tally]:
    """Take all steps from `start` on, and count them; the first rank shows and writes their records."""
    section, tally = run.loaded.config.train, Tally()
    logs = _logs(run, folder, progress, start, tally) if run.place.is_first else _no_logs()
    with (
        logs as (write, write_skips),
        _keeper(run, folder, start, watch) as keep,
        deterministic(section.deterministic),
        collected(section.gc_every) as collections,
    ):

        def emit(record: StepRecord) -> None:
            write(record)
            tally.add(record)

        tasks: list[Task] = [*collections, *tasks_of(run, folder, start.cursor, watch)]
        return train(run, emit, write_skips, start=start.cursor, keep=keep, tasks=tasks, watch=watch), tally


@contextmanager
def _logs(run: Run, folder: Path, progress: Progress, start: Start, tally: Tally) -> Iterator[tuple[Emit, WriteSkips]]:
    """What writes a step's record and its skips into the run folder, which is made or cut to where the run begins.

    The records before are the first of the `tally`.
    """
    has_previous = False
    if not start.has_run:
        has_previous = run_folder.make_room(folder)
    else:
        run_folder.drop_results(folder, kinds_of(run.loaded.config))
        for name in ("metrics.jsonl", run_folder.ANSWERS):
            cut_lines(folder / name, start.cursor.step)
        tally.last.extend(read_records(folder / "metrics.jsonl", start.cursor.step - RATE_STEPS))
        run_folder.keep_settings(folder, start.cursor.step, start.earlier)
    run_folder.write_text(folder / "config.yaml", describe(run.loaded))
    ledger = Ledger(folder / "skipped.jsonl", start.cursor.step)
    with (
        progress,
        open(folder / "metrics.jsonl", "a", encoding="utf-8") as log,
        trackers(run.loaded.config, folder, start.cursor.step, progress.say) as track,
    ):

        def write(record: StepRecord) -> None:
            numbers = {name: value if math.isfinite(value) else None for name, value in record.items()}
            log.write(json.dumps(numbers) + "\n")  # JSON has no NaN
            log.flush()
            track(record)
            progress.show(record, run.loss_terms)

        if has_previous:
            progress.say(f"the earlier run is kept in {folder / run_folder.PREVIOUS} until this one is complete")
        for note in (*start.notes, *notes(run)):
            progress.say(note)
        yield write, ledger.write


@contextmanager
def _no_logs() -> Iterator[tuple[Emit, WriteSkips]]:
    """Of a rank that writes no files."""
    yield (lambda record: None), ignore


def _keeper(run: Run, folder: Path, start: Start, watch: Watch) -> Keeper:
    """Of a run whose folder is the one it goes on in, or a new one."""
    return Keeper.of(run, folder, start.cursor.step if start.has_run else 0, watch)
