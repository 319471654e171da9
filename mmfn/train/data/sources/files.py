"""Media of an entry: bytes that are stored beside it, or files inside a folder and nowhere else."""

import os
from pathlib import Path

from mmfn.errors import UserError
from mmfn.train.data.entries import show
from mmfn.train.data.sources import Source


def find_medium(source: Source, row: int, name: str, root: Path) -> Path | bytes:
    """What a path in row `row` names: the source's own bytes, or a file inside `root`, which is resolved.

    Raises ValueError for a path that leaves `root`, by itself or through a link.
    """
    stored = source.medium(row, name)
    if stored is not None:
        return stored
    outside = UserError(
        f"media path {show(name)} leaves the media root {str(root)!r}; use a path inside it or set data.root"
    )
    if ".." in Path(name).parts:
        raise outside
    try:
        path = (root / name).resolve()  # follows links, so that a link cannot lead outside either
    except (RuntimeError, OSError) as error:  # a loop of links: RuntimeError up to Python 3.12, then OSError
        raise UserError(f"media path {show(name)} leads nowhere ({show(str(error))}); replace the link") from error
    if not path.is_relative_to(root):
        raise outside
    if not os.path.exists(path):  # that of Path raises for names that are too long
        raise UserError(
            f"media path {show(name)} names no file in the media root {str(root)!r}; correct it or set data.root"
        )
    return path
