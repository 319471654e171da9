"""What is asked of a run on its way: signals to this process, and files that a user touches in the run folder."""

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmfn.errors import INTERRUPTED, TERMINATED
from mmfn.train.run.folder import REQUESTS, strange_in
from mmfn.train.watch import SAVE, Watch

SIGNALS = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED, signal.SIGUSR1: SAVE}
FILES = dict(zip(REQUESTS, (TERMINATED, SAVE), strict=True))  # in the run folder
MANY = 64  # signals that are read at once
SECOND_S = 3.0  # launchers pass on a signal that the ranks got as well: one so soon behind the first is the same


class Requests:
    """Hears what is asked and notes it in a `Watch`. One thread calls it."""

    def __init__(self, watch: Watch, folder: Path | None) -> None:
        """`folder`: of the rank that looks for files; those that an earlier run has left are removed.

        A folder with anything else in it is no run's, and will be refused: what has these names there is the user's.
        """
        files = {} if folder is None or strange_in(folder) else {folder / name: code for name, code in FILES.items()}
        self.watch, self.files = watch, files
        self._first = 0.0
        for path in self.files:
            with suppress(OSError):
                path.unlink()

    def hear(self, number: int) -> bool:
        """A signal. True for one that ends the process at once: a second one to stop."""
        code = SIGNALS[signal.Signals(number)]
        is_second = code > SAVE and self._first > 0 and time.monotonic() - self._first > SECOND_S
        if code > SAVE:
            self._first = self._first or time.monotonic()
        self.watch.ask(code)
        return is_second

    def look(self) -> None:
        """Look for the files; each one is removed and counts once."""
        for path, code in self.files.items():
            with suppress(OSError):
                if path.exists():
                    path.unlink()
                    self.watch.ask(code)


@contextmanager
def heard_signals(sender: socket.socket, *, is_alone: bool) -> Iterator[None]:
    """The numbers of `SIGNALS` are sent on a socket that does not block, whatever the main thread does.

    They have no other effect then. Outside of the main thread, where Python sets no handlers, none is heard. Behind an
    error they have no effect at all where the process is not alone: a launcher ends the ranks that are left with a
    signal, one of which may still have to say what happened.
    """
    is_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.signal(number, _go_on) for number in (SIGNALS if is_main else ())}
    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False) if is_main else -1
    is_over = is_alone
    try:
        yield
        is_over = True
    finally:
        if is_main:
            signal.set_wakeup_fd(before)
        for number, handler in handlers.items() if is_over else ():
            signal.signal(number, handler)


def _go_on(number: int, frame: object) -> None:
    """What a signal does to the main thread."""


def read_signals(receiver: socket.socket) -> list[int]:
    """Those that have arrived."""
    try:
        return [number for number in receiver.recv(MANY) if number in SIGNALS]
    except BlockingIOError:
        return []
