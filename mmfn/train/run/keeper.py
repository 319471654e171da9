"""`Keeper`: the checkpoints that a run leaves on its way, by the settings `checkpoint.*`."""

from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

from mmfn.errors import USAGE_ERROR, Stop
from mmfn.parallel.mesh.host_values import gather_values
from mmfn.parallel.weights.host_memory import complete
from mmfn.train.build.run import Run
from mmfn.train.checkpoint import Facts, Retention, Saver
from mmfn.train.checkpoint.retention import whole_in
from mmfn.train.config.load import describe
from mmfn.train.data.cursor import Cursor
from mmfn.train.run.folder import STATE
from mmfn.train.step import State
from mmfn.train.watch import Watch

LOGS = ("metrics.jsonl", "skipped.jsonl")


@dataclass(kw_only=True, eq=False)
class Keeper:
    """Saves the state of a run in its folder. All ranks make the same calls; a save may run on beside the next steps.

    A context manager, whose end waits for the save under way; behind an error no longer than a rank is waited for.
    `losses`: of the checkpoints that stay, by step. `last_step`: of the newest.
    """

    run: Run
    saver: Saver
    losses: dict[int, float | None]
    last_step: int = 0

    @staticmethod
    def of(run: Run, folder: Path, last_step: int = 0, watch: Watch | None = None) -> "Keeper":
        """The keeper of a run in `folder`, which goes on behind its checkpoint of `last_step` (0: there is none).

        A save that fails beside the steps asks the `watch` for a stop, on which all ranks agree as on any other: the
        one behind which each of them raises what it failed with.
        """
        section, world, root = run.loaded.config.checkpoint, run.place.host["world"], folder / STATE
        retention = Retention(num_newest=section.keep_last, every=section.keep_every, num_best=section.keep_best)
        losses: dict[int, float | None] = {}
        if section.keep_best and last_step:
            found = whole_in(root, retention) if run.place.is_first else {}
            losses = dict(gather_values(list(found.items()), world, "checkpoint")[0])
        saver = Saver(
            root=root,
            world=run.place.host["saves"],
            retention=retention,
            logs=[folder / name for name in LOGS],
            is_asynchronous=section.asynchronous,
            reads_back=section.read_back,
            losses=dict(losses),
            on_failure=partial((watch or Watch()).ask, USAGE_ERROR),
        )
        return Keeper(run=run, saver=saver, losses=losses, last_step=last_step)

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or kind is Stop:
            self.saver.wait()
            return
        with suppress(Exception):  # what ended the run is what is told
            self.saver.wait(self.run.loaded.config.layout.timeout_s)

    def is_due(self, step: int, loss: float | None = None) -> bool:
        """Whether the settings want a checkpoint behind a step, of which the held-out loss may be known."""
        config = self.run.loaded.config
        if (every := config.checkpoint.every) is None:
            return False
        is_best = loss is not None and self.saver.retention.is_best(loss, self.losses)
        return step % every == 0 or step == config.train.num_steps or is_best

    def __call__(self, state: State, cursor: Cursor, loss: float | None = None) -> None:
        """Save a state, whatever is due; it may change as soon as this returns. One of this step already is enough.

        `loss`: held-out, the same on all ranks. The logs of the run must hold all steps up to this one. Raises
        ValueError on all ranks where the save before could not be written, or this one, unless it runs on.
        """
        if cursor.step == self.last_step:
            return
        config, place = self.run.loaded.config, self.run.place
        complete(place.device)  # copies to the host may be under way (`on_host`)
        facts = Facts(
            step=cursor.step,
            cursor=self.run.loader.state(cursor),
            seeds={"train.seed": config.train.seed},
            config=describe(self.run.loaded),
            layout=asdict(place.mesh.layout),
            loss=loss,
        )
        self.saver(state if config.checkpoint.save_optimizer else without_optimizer(state), facts)
        self.last_step, self.losses[cursor.step] = cursor.step, loss
        stay = self.saver.retention.stay(self.losses)
        self.losses = {step: value for step, value in self.losses.items() if step in stay}


def without_optimizer(state: State) -> State:
    """What is left of a state whose optimizer begins anew: parameters and the number of steps."""
    return {name: state[name] for name in ("params", "step")}
