"""The steps of a run, taken again from a checkpoint on the ranks of its layout."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from mmfn import tree
from mmfn.batch import Batch
from mmfn.parallel.mesh.launch import Place
from mmfn.parallel.mesh.layout import Layout, Mesh, single_mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.parallel.weights.hosted import copy_of
from mmfn.train.build.model import find_device
from mmfn.train.build.run import Run, prepare
from mmfn.train.checkpoint import Checkpoint, fill_
from mmfn.train.config.load import Loaded
from mmfn.train.data.cursor import Cursor
from mmfn.train.run.folder import locate
from mmfn.train.run.record import facts_of, numbers_of
from mmfn.train.run.replay.compare import Change, changes
from mmfn.train.run.replay.passes import weigh_share
from mmfn.train.run.resume import Start, resume_
from mmfn.train.step import State

T = TypeVar("T")


def on_ranks(layout: Layout, fn: Callable[[Mesh], T]) -> list[T]:
    """`fn(mesh)` of every rank of a layout, in this process: several are threads, that add up in one order."""
    if layout.world == 1:
        return [fn(single_mesh())]
    importlib.import_module(
        "transformers"
    )  # it puts a module in its own place as it is imported: threads would miss it
    return virtual(layout, fn)


def prepare_rank(loaded: Loaded, mesh: Mesh) -> Run:
    """The run of a config as a rank of a mesh in this process begins it."""
    place = Place(device=find_device(loaded.config.model.device), mesh=mesh, host=mesh)
    return prepare(loaded, lambda text: None, place)


def begin_(run: Run, checkpoint: Checkpoint | None) -> Start:
    """Where the steps behind a checkpoint begin, the run's state overwritten by it; None: where the run itself began,
    which may be behind a checkpoint of another run."""
    if checkpoint is None:
        return resume_(run, locate(run.loaded.config.output.path))
    fill_(run.state, checkpoint, run.place.host["world"])
    return Start(cursor=run.loader.resume(dict(checkpoint.manifest.facts.cursor)))


@dataclass(kw_only=True)
class NextStep:
    """A step about to be taken: its `state` is that before it, and behind it once it has gone. `cursor`: before it."""

    run: Run
    step: int
    state: State
    cursor: Cursor
    share: Any
    batches: list[Batch]

    @property
    def facts(self) -> dict[str, Any]:
        """What the record says of its data."""
        return facts_of(self.step, self.share)

    def go(self) -> dict[str, float]:
        """Take it. The numbers that it gives whenever it is taken."""
        self.state, metrics = self.run.step(self.state, self.batches)
        numbers = numbers_of({name: x for name, x in metrics.items() if name != "tokens"})
        return {**self.facts, **numbers}


def take(run: Run, state: State, cursor: Cursor, stop: int) -> Iterator[NextStep]:
    """The steps behind a cursor up to `stop`, one by one, each to be taken by whoever is given it."""
    for share in run.loader.steps(stop, cursor):
        taken = NextStep(
            run=run, step=cursor.step + 1, state=state, cursor=cursor, share=share, batches=weigh_share(run, share)
        )
        yield taken
        state, cursor = taken.state, share.cursor


def compare_state(state: State, checkpoint: Checkpoint, run: Run, *, is_stored: bool = False) -> list[Change]:
    """How a state differs from a stored one; `is_stored`: how the stored one differs from it. All ranks call it."""
    stored = tree.map(copy_of, state)
    fill_(stored, checkpoint, run.place.host["world"])
    return list(changes(stored, state) if is_stored else changes(state, stored))
