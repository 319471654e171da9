"""Where the checkpoints lie that a run goes on from, or begins from (`checkpoint.resume`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmfn.errors import UserError
from mmfn.train.checkpoint.format import step_of
from mmfn.train.config.schema import CheckpointSection
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
