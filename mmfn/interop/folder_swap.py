"""One folder in place of another."""

import ctypes
import os
from pathlib import Path

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


def swap(fresh: Path, folder: Path) -> None:
    """`fresh` gets the name `folder`. What has that name, unless it is empty, is in the place of `fresh` then.

    At every moment there is one of the two under the name, where the system can exchange names; elsewhere there is none
    between two renames, and an interrupt puts the old one back.
    """
    if not folder.exists() or not any(folder.iterdir()):
        os.rename(fresh, folder)
        return
    if exchange(fresh, folder):
        return
    old = fresh.with_name("old")
    try:
        os.rename(folder, old)
        os.rename(fresh, folder)
    except BaseException:  # an interrupt too: what is around `fresh`, and the old folder in it, is about to be deleted
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        raise


def exchange(a: Path, b: Path) -> bool:
    """Exchange two names at once; False, and nothing done, where system or file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE) == 0
