"""What `resume_` refuses of a run that goes on, found by settings, manifests and logs: no weight is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmfn.batch import Batch, Sample
from mmfn.packing import Sizes
from mmfn.train.checkpoint import Checkpoint, newest
from mmfn.train.config.changes import changes, refuse
from mmfn.train.config.load import Loaded
from mmfn.train.config.schema import Config
from mmfn.train.data import Dataset, Loader
from mmfn.train.data.cursor import START, from_state
from mmfn.train.run import folder as run_folder
from mmfn.train.run.folder import STATE
from mmfn.train.run.keeper import LOGS
from mmfn.train.run.resume import check_steps_left, is_finished, is_restored, records_of, too_late
from mmfn.train.run.stored import ALONE, locate_saves, none_whole

LENGTH = ("train.steps", "train.epochs")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The checkpoint that a run begins behind. `has_run`: it is of the run itself; `optimizer`, `cursor`: go on too."""

    checkpoint: Checkpoint
    has_run: bool
    optimizer: bool
    cursor: bool


def find_origin(loaded: Loaded) -> Origin | str:
    """The newest whole checkpoint that a run begins behind, or in words why it begins behind none.

    Raises ValueError where one is asked for and none is whole.
    """
    config, section = loaded.config, loaded.config.checkpoint
    if is_finished(loaded, ALONE):
        return f"the run in {config.output.path!r} has taken its {config.train.steps} steps: nothing is left to train"
    if not is_restored(loaded, ALONE):
        return "the run begins at its first step"
    has_run = run_folder.resumes_itself(loaded)
    root, name = (run_folder.locate(config.output.path) / STATE, None) if has_run else locate_saves(section.resume)
    search = newest(root, ALONE, name=name)
    if search.checkpoint is None:
        raise none_whole(root, name, search.skipped, has_run=has_run)
    return Origin(
        checkpoint=search.checkpoint,
        has_run=has_run,
        optimizer=has_run or section.load_optimizer,
        cursor=has_run or section.load_cursor,
    )


def check_origin(origin: Origin, loaded: Loaded, order: Mapping[str, int | str]) -> str:
    """What the run goes on from, in words. `order`: of `Loader.fingerprint` what is known.

    Raises ValueError for settings that cannot change, other data or another order, and where no step is left to take.
    """
    folder, facts, steps = origin.checkpoint.folder, origin.checkpoint.manifest.facts, loaded.config.train.steps
    changed = changes(facts.config, loaded)
    if steps is None:  # the data say how many
        changed = [change for change in changed if change.setting not in LENGTH]
    refuse(changed, folder, has_optimizer=origin.optimizer)
    cursor = from_state(dict(facts.cursor), order) if origin.cursor else START
    if steps is not None and cursor.step >= steps:
        run = run_folder.locate(loaded.config.output.path)
        are_taken = origin.has_run and bool(records_of(run / LOGS[0], steps))
        check_steps_left(origin.checkpoint, steps, cursor.step, are_taken=are_taken)
        if changed and run_folder.is_complete(run):
            raise too_late(run, steps, changed)
    late = ", ".join(map(str, changed))
    return f"goes on from {folder}" + (f"; settings that changed since: {late}" if late else "")


def order_of(config: Config, dataset: Dataset | None) -> dict[str, int | str]:
    """What the settings and, where it is open, the data set say of `Loader.fingerprint`."""
    data, known = config.data, dict[str, int | str](seed=config.train.seed)
    if dataset is not None:  # the order is that of any loader of these data
        known = Loader(
            dataset, _pack_none, {}, batch_samples=1, token_buckets=[1], tower_buckets={}, seed=config.train.seed
        ).fingerprint
    if data.batch_tokens is None:
        return {**known, "batch_samples": data.batch_samples}
    known.pop("batch_samples", None)
    return {**known, "batch_tokens": data.batch_tokens, "long_samples": data.long_samples}


def _pack_none(samples: Sequence[Sample], sizes: Sizes) -> Batch:
    raise NotImplementedError("no step is packed")
