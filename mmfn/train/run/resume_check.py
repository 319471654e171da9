"""What `resume_` refuses of a run that goes on, found by settings, manifests and logs: no weight is read."""

from collections.abc import Mapping

from mmfn import tree
from mmfn.errors import UserError
from mmfn.train.checkpoint import Checkpoint, newest
from mmfn.train.checkpoint.read import check_shapes
from mmfn.train.config.changes import changes, refuse
from mmfn.train.config.load import Loaded
from mmfn.train.config.schema import Config
from mmfn.train.data import Dataset
from mmfn.train.data.cursor import START, from_state
from mmfn.train.data.loader import order_facts
from mmfn.train.run import folder as run_folder
from mmfn.train.run.resume import check_steps_left, has_records, is_finished, is_restored, too_late
from mmfn.train.run.source import Source
from mmfn.train.run.stored import ALONE, PARAMS
from mmfn.tree import Tree

LENGTH = ("train.steps", "train.epochs")


def find_origin(loaded: Loaded) -> tuple[Source, Checkpoint] | str:
    """The newest whole checkpoint that a run begins behind, or in words why it begins behind none.

    Raises ValueError where one is asked for and none is whole.
    """
    config = loaded.config
    if is_finished(loaded, ALONE):
        return f"the run in {config.output.path!r} has taken its {config.train.steps} steps: nothing is left to train"
    if not is_restored(loaded, ALONE):
        return "the run begins at its first step"
    folder = run_folder.locate(config.output.path)
    source = Source.of(config.checkpoint, folder, has_run=run_folder.resumes_itself(loaded))
    search = newest(source.root, ALONE, name=source.name)
    if search.checkpoint is None:
        raise source.none_whole(search.skipped)
    return source, search.checkpoint


def check_origin(
    source: Source, checkpoint: Checkpoint, loaded: Loaded, order: Mapping[str, int | str], specs: Tree
) -> str:
    """What the run goes on from, in words. `order`: of `Loader.fingerprint` what is known. `specs`: its parameters.

    Raises ValueError for settings that cannot change, another model, other data or another order, and where no step is
    left to take.
    """
    folder, facts, steps = checkpoint.folder, checkpoint.manifest.facts, loaded.config.train.steps
    changed = changes(facts.config, loaded)
    if steps is None:  # the data say how many
        changed = [change for change in changed if change.setting not in LENGTH]
    refuse(changed, folder, has_optimizer=source.optimizer)
    try:
        check_shapes({f"{PARAMS}{path}": spec.shape for path, spec in tree.items(specs)}, checkpoint)
    except UserError as error:
        raise UserError(f"{folder} cannot be resumed from: {error}") from error
    cursor = from_state(dict(facts.cursor), order) if source.cursor else START
    if steps is not None and cursor.step >= steps:
        run = run_folder.locate(loaded.config.output.path)
        are_taken = source.has_run and has_records(run, steps)
        check_steps_left(checkpoint, steps, cursor.step, are_taken=are_taken)
        if changed and run_folder.is_complete(run):
            raise too_late(run, steps, changed)
    late = ", ".join(map(str, changed))
    return f"goes on from {folder}" + (f"; settings that changed since: {late}" if late else "")


def known_order(config: Config, dataset: Dataset | None) -> dict[str, int | str]:
    """What the settings and, where it is open, the data set say of `Loader.fingerprint`."""
    data, seed = config.data, config.train.seed
    facts = {"seed": seed} if dataset is None else order_facts(dataset, seed)
    if data.batch_tokens is None:
        assert data.batch_samples is not None, "a rule asks for one of the two"
        return {**facts, "batch_samples": data.batch_samples}
    return {**facts, "batch_tokens": data.batch_tokens, "long_samples": data.long_samples}
