"""What a training changes of its process while it lasts: when Python collects garbage, which kernels torch takes."""

import gc
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from mmfn.errors import UserError
from mmfn.train.data.cursor import Cursor
from mmfn.train.step import State

NO_DETERMINISTIC = re.compile(r"(\S+) does not have a deterministic implementation")
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


class Collection:
    """Python's collector of cycles, run behind every so many steps: a task of `loop.train`."""

    def __init__(self, every: int) -> None:
        self.every = every

    def is_due(self, step: int) -> bool:
        """Every so many steps, on all ranks behind the same."""
        return step % self.every == 0

    def __call__(self, state: State, cursor: Cursor) -> dict[str, float]:
        """Collect what the steps have left."""
        gc.collect()
        return {}


@contextmanager
def collected(every: int | None) -> Iterator[Sequence[Collection]]:
    """Python looks for garbage behind every so many steps only, and never at what was there before; None: as it likes.

    Ranks that stop for it at different moments wait for each other at each of them.
    """
    if every is None:
        yield ()
        return
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield (Collection(every),)
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


@contextmanager
def deterministic(is_wanted: bool) -> Iterator[None]:
    """Where wanted, torch takes kernels that give the same bits each time, and refuses an operator without one.

    Raises ValueError that names the operator.
    """
    if not is_wanted:
        yield
        return
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if found := NO_DETERMINISTIC.search(text):
            raise UserError(
                f"train.deterministic: {found[1]} has no form that gives the same bits each time; set it to false, or "
                "model.kernels to another table"
            ) from error
        if CUBLAS in text:
            raise UserError(
                f"train.deterministic needs the environment variable {CUBLAS}=:4096:8 on this device; set it"
            ) from error
        raise
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
