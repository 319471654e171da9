"""What a run does that is asked to save or to stop: the same on all ranks, behind the same step."""

from typing import Protocol

from mmfn.errors import Stop
from mmfn.train.data.cursor import Cursor
from mmfn.train.step import State
from mmfn.train.watch import SAVE, Watch


class Keep(Protocol):
    """Saves states: behind steps that are due, and whenever it is called. It changes nothing of a state.

    `loss`: the held-out loss behind a step, where it was evaluated.
    """

    def is_due(self, step: int, loss: float | None = None) -> bool: ...
    def __call__(self, state: State, cursor: Cursor, loss: float | None = None) -> None: ...


class OnDemand:
    """Saves and stops that the ranks have agreed they are asked for."""

    def __init__(self, keep: Keep | None, start: Cursor, watch: Watch, again: str = "start it again") -> None:
        """`start`: behind which there is nothing to save yet. `again`: what makes a run go on that was stopped."""
        self.keep, self.start, self.watch, self.again = keep, start, watch, again
        self.asked_at = -1

    def __call__(self, asked: int, state: State, cursor: Cursor) -> None:
        """Do what was `asked` (see `Watch`), behind the last step.

        Ranks may hear one signal at two steps: to be asked to save behind the next one as well means nothing. Raises
        `Stop` on all ranks.
        """
        if asked == 0:
            return
        is_new = asked > SAVE or cursor.step > self.asked_at + 1
        self.asked_at = cursor.step
        self.watch.ask(asked)
        self.watch.answer()
        if self.keep is not None and is_new and cursor.step > self.start.step:
            self.watch.enter("save", cursor.step)
            self.keep(state, cursor)
        if asked > SAVE:
            saved = "" if self.keep is None else f", which is saved; {self.again} to go on"
            raise Stop(f"as asked, behind step {cursor.step}{saved}", asked)
