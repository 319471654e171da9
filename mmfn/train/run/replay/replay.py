"""`replay`: a step of a run once more, in this process, and what differs first where something does.

First as the run took it: every number of its record is compared with the log, bit for bit. Then, where that is asked,
as another program takes it. Each question has its own answer: was it the data, the state, an op (which?), a sum over
ranks, or does it all come out the same.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmfn.parallel.mesh.layout import single_mesh
from mmfn.train.build.kernels import build_ops
from mmfn.train.checkpoint import Checkpoint
from mmfn.train.config.load import Loaded, load_config
from mmfn.train.run.modes import deterministic
from mmfn.train.run.replay.against import Against, beside, logs_apart
from mmfn.train.run.replay.history import History, first_step_apart, read_history
from mmfn.train.run.replay.judge import Judge
from mmfn.train.run.replay.other import PASSES, Other, differentiate_other, gradient_errors
from mmfn.train.run.replay.report import Replay, Side
from mmfn.train.run.replay.steps import Again, Look, Observation, see, see_again
from mmfn.train.run.replay.walk import on_ranks

SIZES = ("replicate", "dp", "cp", "ep", "ulysses")
ROUNDING = {"float32": 1e-4, "bfloat16": 5e-2}
"""How far numbers of more than two ranks, or of compiled ones, may be from their log, by the dtype of the model: ranks
of one process add up in their order, those of several in one that the transport chooses, and only those compile."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be replayed: a run's folder, a step, and how the other program differs, if there is one.

    `layout`: sizes of its mesh, those left out being 1; `dtype`: what it computes in; `kernels`: its table of ops;
    `overrides`: further settings, `key=value`. `against`: the folder of another run that is put beside it.
    """

    folder: Path
    step: int
    layout: Mapping[str, int] | None = None
    dtype: torch.dtype | None = None
    kernels: str | None = None
    overrides: tuple[str, ...] = ()
    against: Path | None = None

    @property
    def has_other(self) -> bool:
        """Whether another program is asked for."""
        return bool(self.layout or self.dtype or self.kernels or self.overrides)

    def changes(self) -> list[str]:
        """The settings of the other program, as overrides."""
        layout = {} if self.layout is None else {**dict.fromkeys(SIZES, 1), **self.layout}
        kernels = [] if self.kernels is None else [f"model.kernels={self.kernels}", "model.kernel_packages=[]"]
        return [*(f"layout.{name}={size}" for name, size in layout.items()), *kernels, *self.overrides]


def replay(request: Request) -> Replay:
    """Take a step of a run again and compare. Nothing is written into the run's folder.

    Raises ValueError for a folder of no run, for a step that it did not get to, and for what cannot be resumed.
    """
    history = read_history(request.folder)
    with tempfile.TemporaryDirectory(prefix="mmfn-replay-") as scratch:
        settings = history.settings(request.step)
        loaded = _load(settings, scratch)
        other = _load(settings, scratch, request.changes()) if request.has_other else None
        rival = None if request.against is None else read_history(request.against)
        with deterministic(loaded.config.train.deterministic):
            found, seen = _replay(request, history, loaded, other)
            if rival is not None:
                theirs = _load(rival.settings(request.step), scratch)
                found = replace(found, against=_against(request, (history, rival), (loaded, theirs), seen))
            return found


def _load(settings: Path, scratch: str, changes: Sequence[str] = ()) -> Loaded:
    """The settings of a run, its results going nowhere. Ranks that are threads are not compiled."""
    aside = [f"output.path={scratch}/none", "data.check=first"]
    loaded = load_config(settings, [*aside, *changes])
    if loaded.config.layout.world > 1 and loaded.config.train.compile != "none":
        return load_config(settings, [*aside, *changes, "train.compile=none"])
    return loaded


def _replay(
    request: Request, history: History, loaded: Loaded, other: Loaded | None
) -> tuple[Replay, Sequence[Observation]]:
    step, layout = request.step, loaded.config.layout.sizes
    judge, judged_by = None, ""
    if other is not None and (request.dtype is not None or request.kernels is not None):
        judge = Judge(ops=build_ops(other.config.model), dtype=request.dtype or torch.float64)
        judged_by = f"{other.config.model.table} in {_name(judge.dtype)}"
    look = Look(judge=judge, has_snapshot=other is not None or request.against is not None)
    seen = on_ranks(layout, partial(see, loaded=loaded, history=history, step=step, look=look))
    is_exact = layout.world <= 2 and loaded.origins.get("train.compile") != "override"
    tolerance = 0.0 if is_exact else ROUNDING[loaded.config.model.dtype]
    apart = first_step_apart(seen[0].steps, tolerance)
    checkpoint, _ = history.start(step - 1, single_mesh()["world"])
    again = _again(history, loaded, seen, checkpoint if is_exact else None) if apart else None
    found = Replay(
        step=step,
        layout=str(layout),
        checkpoint=None if checkpoint is None else checkpoint.folder.name,
        seen=seen,
        apart=apart,
        tolerance=tolerance,
        is_compiled=loaded.config.train.compile != "none",
        again=again,
        judged_by=judged_by,
        other=None if other is None else _other(request, loaded, other, seen),
    )
    return found, seen


def _against(
    request: Request, histories: tuple[History, History], loaded: tuple[Loaded, Loaded], seen: Sequence[Observation]
) -> Against:
    """What another run gives at the same step, beside this one."""
    look = Look(has_snapshot=True)
    take = partial(see, loaded=loaded[1], history=histories[1], step=request.step, look=look)
    theirs = on_ranks(loaded[1].config.layout.sizes, take)
    return beside(str(request.against), seen, theirs, loaded, logs_apart(*histories))


def _again(history: History, loaded: Loaded, seen: Sequence[Observation], checkpoint: Checkpoint | None) -> list[Again]:
    """What all ranks see of data and checkpoint on their own. The first checkpoint of a run is held against its start;
    another one against the one before, if that is still there."""
    place = None if checkpoint is None else checkpoint.manifest.facts.step
    if place is not None:
        before, _ = history.start(place - 1, single_mesh()["world"])
        is_known = before is not None or place <= (loaded.config.checkpoint.every or 0)
        if not is_known or history.settings(place) != Path(loaded.path):
            place = None
    look = partial(see_again, loaded=loaded, history=history, seen=seen, checkpoint=place)
    return on_ranks(loaded.config.layout.sizes, look)


def _other(request: Request, loaded: Loaded, changed: Loaded, seen: Sequence[Observation]) -> Side:
    """What the other program gives, beside what the run's own gave."""
    one = seen[0]
    run = partial(differentiate_other, loaded=changed, cursor=one.cursor, params=one.params, dtype=request.dtype)
    found: list[Other] = on_ranks(changed.config.layout.sizes, run)
    dtypes = [torch.float64 if d is None else d for d in (request.dtype, _dtype(loaded), _dtype(changed))]
    narrowest = max(dtypes, key=lambda d: torch.finfo(d).eps)
    return Side(
        name=", ".join(_asked(request, str(changed.config.layout.sizes))),
        numbers={name: (one.numbers[name], found[0].numbers[name]) for name in one.numbers if name in found[0].numbers},
        gradients=gradient_errors(one.grads, found[0].grads),
        passes=PASSES[narrowest],
    )


def _asked(request: Request, layout: str) -> list[str]:
    asked: list[Any] = [
        layout if request.layout is not None else None,
        None if request.dtype is None else _name(request.dtype),
        None if request.kernels is None else f"{request.kernels} ops",
        *request.overrides,
    ]
    return [text for text in asked if text is not None]


def _dtype(loaded: Loaded) -> torch.dtype:
    config = loaded.config
    dtype: torch.dtype = getattr(torch, config.layout.compute_dtype or config.model.dtype)
    return dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
