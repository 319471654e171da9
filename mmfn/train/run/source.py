"""Where the checkpoints lie that a run goes on from, or begins from (`checkpoint.resume`)."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mmfn.errors import UserError
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.host_values import gather_values
from mmfn.train.checkpoint.format import step_of
from mmfn.train.checkpoint.read import names, open_manifest
from mmfn.train.config.load import Loaded
from mmfn.train.config.schema import CheckpointSection
from mmfn.train.data.cursor import State
from mmfn.train.run import folder as run_folder
from mmfn.train.run.folder import STATE
from mmfn.train.run.stored import find_state


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where checkpoints are looked for: the one of that name, or any. `has_run`: they are of the run that begins.

    `optimizer`, `cursor`: whether they go on too.
    """

    root: Path
    name: str | None = None
    has_run: bool = True
    optimizer: bool = True
    cursor: bool = True

    @staticmethod
    def of(section: CheckpointSection, folder: Path, *, has_run: bool) -> "Source":
        """Of the run in `folder`, or what `checkpoint.resume` names: a save, a run, or a folder of saves."""
        if has_run:
            return Source(root=folder / STATE)
        path = Path(section.resume)
        root, name = (find_state(path) or path, None) if step_of(path.name) is None else (path.parent, path.name)
        return Source(root=root, name=name, has_run=False, optimizer=section.load_optimizer, cursor=section.load_cursor)

    def none_whole(self, skipped: Sequence[str]) -> UserError:
        """Where none of them can be used."""
        reason = "; ".join(skipped) or ("there are none in it" if self.root.is_dir() else "it is no folder")
        fix = "set output.overwrite=true to begin anew" if self.has_run else "set checkpoint.resume to another"
        where = self.root if self.name is None else self.root / self.name
        return UserError(f"{where} holds no checkpoint that is whole ({reason}); {fix}")


def stored_cursor(loaded: Loaded, world: Axis) -> State | None:
    """The cursor in the newest readable manifest that a run goes on from; None where the order of data begins anew.

    All ranks call it, the first one reads. The checkpoint may turn out not to be whole: then the run goes on from an
    earlier one, of the same data.
    """
    found: State | None = None
    if world.index == 0:
        run = run_folder.locate(loaded.config.output.path)
        source = Source.of(loaded.config.checkpoint, run, has_run=run_folder.resumes_itself(loaded))
        candidates = names(source.root) if source.name is None else [source.name]
        for name in candidates if source.cursor else ():
            with suppress(UserError, OSError):
                found = dict(open_manifest(source.root / name).manifest.facts.cursor)
                break
    first: State | None = gather_values(found, world, "counted")[0]
    return first
