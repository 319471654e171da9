"""What a rank sees of a step that is taken again, and what it sees on its own where the log disagrees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mmfn import tree
from mmfn.batch import Batch
from mmfn.errors import UserError
from mmfn.parallel.mesh.layout import Mesh
from mmfn.parallel.weights.hosted import to_device
from mmfn.train.build.run import Run
from mmfn.train.config import changes as settings
from mmfn.train.config.load import Loaded
from mmfn.train.data.cursor import State as CursorState
from mmfn.train.optim import Leaves
from mmfn.train.run.replay.compare import Change, change_of
from mmfn.train.run.replay.history import History, Number, numbers_of_step
from mmfn.train.run.replay.judge import Judge
from mmfn.train.run.replay.passes import differentiate, not_finite, weigh_share, whole_copies, whole_grads
from mmfn.train.run.replay.programs import lower_program, plain
from mmfn.train.run.replay.update import UpdateError, expected_params, has_formula, update_errors
from mmfn.train.run.replay.walk import NextStep, begin_, compare_state, prepare_rank, take
from mmfn.train.run.replay.watch import Finding, Watch
from mmfn.tree import Tree


@dataclass(frozen=True, kw_only=True)
class Look:
    """How closely a step is looked at. `judge`: what its ops are held against; `has_snapshot`: keep what it starts from
    and its gradients, whole, for another program."""

    judge: Judge | None = None
    has_snapshot: bool = False


@dataclass(kw_only=True)
class Observation:
    """What a rank saw. `steps`: the numbers of each step beside those of the log.

    Of the step asked about: `state_faults`, `batch_faults`, `grad_faults`, leaves that are not finite; `watch`, of its
    ops; `numbers` of its watched pass, and `strayed`, those that the step itself gives otherwise; the `cursor` before
    it and this rank's `batches`; with a snapshot whole `params` and `grads` (first rank). `behind`: how the state
    behind it differs from the checkpoint of that step, None where there is none; `updates`, leaves that it makes
    otherwise than the optimizer's formula does.
    """

    start: str
    notes: tuple[str, ...]
    steps: list[list[Number]] = field(default_factory=list)
    watch: Watch = field(default_factory=Watch)
    state_faults: list[tuple[str, int]] = field(default_factory=list)
    batch_faults: list[tuple[str, int]] = field(default_factory=list)
    grad_faults: list[tuple[str, int]] = field(default_factory=list)
    numbers: Mapping[str, float] = field(default_factory=dict)
    strayed: list[Number] = field(default_factory=list)
    updates: list[UpdateError] = field(default_factory=list)
    behind: list[Change] | None = None
    cursor: CursorState = field(default_factory=dict)
    params: Tree = None
    grads: Leaves = field(default_factory=dict)
    batches: Sequence[Batch] = ()

    @property
    def findings(self) -> list[Finding]:
        """Of ops, in the order they were called."""
        return self.watch.findings


def see(mesh: Mesh, loaded: Loaded, history: History, step: int, look: Look) -> Observation:
    """Take the steps of a run up to `step` from its newest checkpoint before, and look at the last of them.

    All ranks call it. Where the run has a checkpoint behind the step, the state is compared with it. Raises ValueError
    for a step that the run has not, and for a state or data that are not the run's.
    """
    run = prepare_rank(loaded, mesh)
    world, num_steps = run.place.host["world"], run.loaded.config.train.num_steps
    if not 1 <= step <= num_steps:
        raise UserError(f"--step is {step} but the run has steps 1 to {num_steps}; choose one of them")
    checkpoint, notes = history.start(step - 1, world)
    start = begin_(run, checkpoint)
    notes = (*notes, *start.notes)
    history.check_settings(start.cursor.step, step)
    if checkpoint is not None and (changed := settings.changes(checkpoint.manifest.facts.config, run.loaded)):
        said = f"{checkpoint.folder.name} was saved with other settings: {', '.join(map(str, changed))}"
        notes = (*notes, said)
    if checkpoint is None and (later := history.newest(world)) is not None:
        run.loader.resume(dict(later.manifest.facts.cursor))  # which refuses other data
    seen = Observation(start=str(checkpoint.folder) if checkpoint else "its first step", notes=notes)
    records = {record["step"]: record for record in history.records(start.cursor.step, step)}
    for taken in take(run, run.state, start.cursor, step):
        expected = _look(run, taken, look, seen) if taken.step == step else {}
        found = taken.go()
        if expected and not found["skipped"]:
            seen.updates = update_errors(taken.state, expected)
        seen.steps.append(numbers_of_step(records.get(taken.step), found, taken.facts))
        state = taken.state
    if loaded.config.train.compile == "none":
        twice = numbers_of_step({"step": step, **found}, seen.numbers)
        seen.strayed = [number for number in twice if not number.is_same]
    stored = history.behind(step, world)
    if stored is not None:
        seen.behind = compare_state(state, stored, run)
    return seen


@dataclass(frozen=True, kw_only=True)
class Again:
    """What a rank saw on its own, without what it saw before: how the tensors of the step's data and the checkpoint
    before it are others than they should be. `stored`: None where no steps lead to the checkpoint; `start`: where those
    began."""

    data: list[Change]
    stored: list[Change] | None = None
    start: str = ""


def see_again(
    mesh: Mesh, loaded: Loaded, history: History, seen: Sequence[Observation], checkpoint: int | None
) -> Again:
    """Read the data of a step again, and take the steps that lead to `checkpoint`, from the one before. All ranks call
    it; `seen`: what they saw of the step."""
    run = prepare_rank(loaded, mesh)
    world, own = run.place.host["world"], seen[mesh["world"].index]
    before = run.loader.resume(dict(own.cursor))
    data = data_changes(own.batches, weigh_share(run, next(run.loader.steps(before.step + 1, before))))
    stored = None if checkpoint is None else history.behind(checkpoint, world)
    if checkpoint is None or stored is None:
        return Again(data=data)
    first, _ = history.start(checkpoint - 1, world)
    for taken in take(run, run.state, begin_(run, first).cursor, checkpoint):
        taken.go()
        state = taken.state
    start = str(first.folder) if first else "its first step"
    return Again(data=data, stored=compare_state(state, stored, run, is_stored=True), start=start)


def data_changes(found: Sequence[Batch], expected: Sequence[Batch]) -> list[Change]:
    """The tensors of a rank's micro-batches that are not those of a second reading of the same data, bit for bit."""
    changes = []
    for i, (batch, other) in enumerate(zip(found, expected, strict=False)):  # where they are not alike, shapes tell
        for (path, x), y in zip(tree.items(batch), tree.leaves(other), strict=True):
            if (change := change_of(f"micro-batch {i}: {path}", x, y)) is not None:
                changes.append(change)
    return changes


def _look(run: Run, taken: NextStep, look: Look, seen: Observation) -> Leaves:
    """The pass of a step before it is taken, watched; it changes nothing.

    Returns what the step should make of the leaves, where ops are judged and the optimizer has a formula.
    """
    state, mesh = taken.state, run.place.mesh
    seen.state_faults = list(not_finite({name: state[name] for name in ("params", "opt")}))
    seen.batch_faults = list(not_finite(list(taken.batches)))
    seen.watch = Watch(look.judge)
    program = lower_program(run, plain(run.loaded.config), seen.watch)
    params = to_device(state["params"], run.place.device)
    one = differentiate(run, program, params, taken.batches, state["step"])
    seen.grad_faults, seen.numbers = list(not_finite(one.grads)), one.numbers
    seen.cursor, seen.batches = run.loader.state(taken.cursor), taken.batches
    if look.has_snapshot:
        seen.grads = whole_grads(one.grads, params, mesh, is_kept=run.place.is_first)
        seen.params = whole_copies(params, mesh, is_kept=run.place.is_first)
    if look.judge is None or not has_formula(run.loaded.config):
        return {}
    return expected_params(run, state, one.grads, one.numbers["grad_norm"])
