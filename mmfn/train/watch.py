"""`Watch`: where a rank is in its run, and what it is asked for on the way.

The run says where it is; a thread (`mmfn.train.run.watchdog`) reads that, and says what was asked. Neither waits.
"""

import threading

SAVE = 1  # what may be asked: to save and go on, or to stop, which is the exit code of a run that does, and above it


class Watch:
    """Of one rank. Without a thread nothing is ever asked.

    `step` and `phase`: what is under way. `is_saving`: whether a stop waits for the end of
    the step to save it; otherwise there is nothing to save, and the process ends at once. `loss`: what such an end
    loses, for whoever reads of it.
    """

    def __init__(self) -> None:
        self.step, self.phase, self.is_saving = 0, "start", False
        self.loss = "no step was done"
        self._asked, self._lock = 0, threading.Lock()

    @property
    def asked(self) -> int:
        """0, `SAVE`, or the exit code of a stop."""
        return self._asked

    @property
    def is_stopping(self) -> bool:
        """Whether a stop was asked for."""
        return self._asked > SAVE

    def enter(self, phase: str, step: int | None = None) -> None:
        """Say that the rank has come to a phase, of a step or of the same one."""
        self.step, self.phase = self.step if step is None else step, phase

    def ask(self, what: int) -> None:
        """Ask for it; a stop stays one."""
        with self._lock:
            self._asked = max(self._asked, what)

    def answer(self) -> None:
        """A save is under way: whoever asks from now on asks for another one."""
        with self._lock:
            self._asked = 0 if self._asked == SAVE else self._asked
