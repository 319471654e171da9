"""Where a run begins: at its first step, or behind a checkpoint of its own or of another (`checkpoint.resume`)."""

import math
import os
import secrets
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mmfn import tree
from mmfn.errors import UserError
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.host_values import gather_values, wait_for_all
from mmfn.train.build.optimizer import build_optimizer
from mmfn.train.build.run import Run
from mmfn.train.checkpoint import Checkpoint, DamagedError, fill_, newest
from mmfn.train.checkpoint.format import step_of
from mmfn.train.checkpoint.read import names
from mmfn.train.config.changes import Change, changes, refuse
from mmfn.train.config.load import Loaded
from mmfn.train.data.cursor import START, Cursor
from mmfn.train.run import folder as run_folder
from mmfn.train.run.folder import STATE
from mmfn.train.run.keeper import LOGS, without_optimizer
from mmfn.train.run.record import read_records
from mmfn.train.run.source import Source
from mmfn.train.step import init_state


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run begins: behind the steps of `cursor`.

    `has_run`: whether the same run took them, whose folder then stays; else it is to be made anew.
    `notes`: what is said of it. `earlier`: the settings of its steps so far, where the run goes on with others.
    """

    cursor: Cursor = START
    has_run: bool = False
    notes: tuple[str, ...] = ()
    earlier: str = ""


def resume_(run: Run, folder: Path) -> Start:
    """Where the run in `folder` begins, its state overwritten by that of a checkpoint if it is to go on from one.

    A folder with checkpoints goes on from them, whatever `checkpoint.resume` names: that is where its run began. All
    ranks call it before a file is written. Raises ValueError on all of them where no checkpoint is whole, and for one
    that is of another model, optimizer, data or order, or that leaves no step to take.
    """
    config, world = run.loaded.config, run.place.host["world"]
    has_run = _resumes_itself(run.loaded, world)
    if not has_run and config.checkpoint.resume in ("none", "auto"):
        if run.is_restored:
            raise UserError(f"the checkpoints in {folder / STATE} are gone since the run was begun; begin it again")
        return Start(notes=_notes_of_new_run(folder) if world.index == 0 else ())
    source = Source.of(config.checkpoint, folder, has_run=has_run)
    checkpoint, notes = _restore_(run, source)
    facts = checkpoint.manifest.facts
    cursor = run.loader.resume(dict(facts.cursor)) if source.cursor else START
    are_taken = source.has_run and has_records(folder, cursor.step)
    check_steps_left(checkpoint, config.train.num_steps, cursor.step, are_taken=are_taken)
    if source.has_run and cursor.step == config.train.num_steps:
        _check_idle(run, folder, checkpoint)
    wait_for_all(world, "resumed")  # before the first rank cuts the logs
    if source.has_run and world.index == 0:
        _set_damaged_aside(source.root, cursor.step)
    earlier = facts.config if source.has_run and changes(facts.config, run.loaded) else ""
    notes.append(f"resumed from {checkpoint.folder}")
    return Start(cursor=cursor, has_run=source.has_run, notes=tuple(notes), earlier=earlier)


def check_steps_left(checkpoint: Checkpoint, num_steps: int, step: int, *, are_taken: bool) -> None:
    """Raise ValueError unless a run of so many steps goes on behind `step`, or ends there, its own steps taken."""
    if step > num_steps or (step == num_steps and not are_taken):
        raise UserError(
            f"{checkpoint.folder} is behind step {step} but the run has {num_steps} steps; raise train.steps or "
            "train.epochs"
        )


def is_restored(loaded: Loaded, world: Axis) -> bool:
    """Whether a run will begin with the parameters of a checkpoint, the same on all ranks; they all call it."""
    return _resumes_itself(loaded, world) or loaded.config.checkpoint.resume not in ("none", "auto")


def _resumes_itself(loaded: Loaded, world: Axis) -> bool:
    """What the first rank sees."""
    found = run_folder.resumes_itself(loaded) if world.index == 0 else None
    return bool(gather_values(found, world, "resumed")[0])


def is_finished(loaded: Loaded, world: Axis) -> bool:
    """Whether the run folder holds a run with these settings that is complete, the same on all ranks; they all call it.

    With `output.overwrite` it is none, and where its last step diverged.
    """
    found = None
    if world.index == 0:
        folder, config = run_folder.locate(loaded.config.output.path), loaded.config
        is_looked_at = config.checkpoint.resume != "none" and not config.output.overwrite
        found = is_looked_at and run_folder.is_complete(folder) and _has_all_steps(folder, loaded)
    return bool(gather_values(found, world, "finished")[0])


def has_records(folder: Path, num_steps: int) -> bool:
    """Whether the log of a run has any of its first steps."""
    return any(True for _ in read_records(folder / LOGS[0], until=num_steps))


def _restore_(run: Run, source: Source) -> tuple[Checkpoint, list[str]]:
    """The newest whole checkpoint, with the run's state overwritten by it, and what is to be said.

    One whose damage shows when it is read is passed over as well.
    """
    world, below = run.place.host["world"], None
    skipped: list[str] = []
    while True:
        search = newest(source.root, world, name=source.name, below=below)
        skipped += search.skipped
        if search.checkpoint is None:
            raise source.none_whole(skipped)
        facts = search.checkpoint.manifest.facts
        changed = changes(facts.config, run.loaded)
        refuse(changed, search.checkpoint.folder, has_optimizer=source.optimizer)
        if source.cursor:
            run.loader.resume(dict(facts.cursor))
        try:
            notes = _fill_(run, search.checkpoint, source)
        except DamagedError as error:
            skipped.append(f"skipped {search.checkpoint.folder.name}: {error}")
            below = facts.step
            continue
        if changed:
            notes.append("settings that changed since: " + ", ".join(map(str, changed)))
        return search.checkpoint, [*skipped, *notes]


def _fill_(run: Run, checkpoint: Checkpoint, source: Source) -> list[str]:
    """Overwrite the parts of the run's state that are to go on; what is said of the others."""
    state, notes = run.state, []
    has_optimizer = any(path.startswith("opt/") for path in checkpoint.manifest.leaves)
    lacks_optimizer = not has_optimizer and any(path.startswith("opt/") for path in tree.paths(state))
    if lacks_optimizer and source.optimizer and not source.has_run:
        raise UserError(
            f"{checkpoint.folder} holds no state of the optimizer (checkpoint.save_optimizer=false); set "
            "checkpoint.load_optimizer=false to begin with a new one"
        )
    part: dict[str, Any] = dict(state)
    if lacks_optimizer or not source.optimizer:
        part = without_optimizer(state)
        notes.append("the optimizer begins anew")
    if not source.cursor:
        del part["step"]
        notes.append("the steps, the schedule and the order of data begin anew")
    fill_(part, checkpoint, run.place.host["world"], is_part=part.keys() != state.keys())
    if "opt" not in part:  # copies and averages are those of the parameters that it began with
        del state["opt"]
        optimizer = build_optimizer(run.loaded.config, run.specs, run.place.device)
        state["opt"] = init_state(state["params"], optimizer, run.specs, device=run.place.device)["opt"]
    return notes


def _check_idle(run: Run, folder: Path, checkpoint: Checkpoint) -> None:
    """Raise ValueError on all ranks where settings changed but a complete run has taken all of its steps before."""
    is_complete = gather_values(run_folder.is_complete(folder), run.place.host["world"], "resumed")[0]
    changed = changes(checkpoint.manifest.facts.config, run.loaded)
    if is_complete and changed:
        raise too_late(folder, run.loaded.config.train.num_steps, changed)


def too_late(folder: Path, num_steps: int, changed: list[Change]) -> UserError:
    """Of settings that changed when all steps of a run were taken."""
    late = ", ".join(map(str, changed))
    return UserError(
        f"the run in {folder} has taken its {num_steps} steps, which {late} comes too late for; "
        "raise train.steps or train.epochs, or set output.overwrite=true to train anew"
    )


def _set_damaged_aside(root: Path, step: int) -> None:
    """Rename the checkpoints behind a step, none of which is whole: their steps are taken, and saved, again."""
    for name in names(root):
        if (step_of(name) or 0) > step:
            os.rename(root / name, root / f"{name}.damaged-{secrets.token_hex(4)}")


def _notes_of_new_run(folder: Path) -> tuple[str, ...]:
    return ("the earlier run left no checkpoint; it begins at its first step again",) if _has_begun(folder) else ()


def _has_begun(folder: Path) -> bool:
    return (folder / LOGS[0]).exists() and not run_folder.is_complete(folder) and not names(folder / STATE)


def _has_all_steps(folder: Path, loaded: Loaded) -> bool:
    num_steps = loaded.config.train.steps or 0  # unknown: none
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    last = [*islice(read_records(folder / LOGS[0], num_steps - 1), 2)]
    is_last = [record["step"] for record in last] == [num_steps] and math.isfinite(last[0]["loss"])
    return is_last and not changes(text, loaded, is_whole=True)
