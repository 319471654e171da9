"""The thread of a rank that hears what a run is asked for, and that ends it where a rank is gone or hangs.

It works whatever the main thread does: compiles, reads, waits for other ranks, saves.
"""

import faulthandler
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmfn.errors import LOST, Stop
from mmfn.parallel.mesh.launch import GRACE_S, Ranks, end_process
from mmfn.parallel.mesh.peers import Peers
from mmfn.train.run.folder import STACKS
from mmfn.train.run.stop import Requests, heard_signals, read_signals
from mmfn.train.watch import Watch

BEAT_S = 1.0


@contextmanager
def watched(ranks: Ranks, folder: Path | None, timeout_s: float) -> Iterator[Watch]:
    """Hear signals, files in the run folder and the other ranks for the time of the block, in a thread.

    Without a `folder` no files are looked for and no stacks are written. Behind an error of one of several ranks the
    thread goes on, until the process ends: it may know what happened.
    """
    watch, is_well = Watch(), False
    receiver, sender = socket.socketpair()
    for end in (receiver, sender):
        end.setblocking(False)
    dog = Watchdog(watch, ranks, folder, timeout_s, receiver)
    thread = threading.Thread(target=dog.run, name="watchdog", daemon=True)
    thread.start()
    try:
        with heard_signals(sender, is_alone=ranks.size == 1):
            yield watch
        is_well = True
    except Stop:
        is_well = True
        raise
    finally:
        if is_well or ranks.size == 1:
            dog.is_over = True
            sender.send(b"\0")
            thread.join()
            receiver.close()
            sender.close()
        if is_well:
            ranks.finish()


class Watchdog:
    """See the module. `receiver`: where signals arrive."""

    def __init__(
        self, watch: Watch, ranks: Ranks, folder: Path | None, timeout_s: float, receiver: socket.socket
    ) -> None:
        self.watch, self.ranks, self.folder, self.timeout_s = watch, ranks, folder, timeout_s
        self.receiver, self.is_over = receiver, False
        self.requests = Requests(watch, folder if ranks.index == 0 else None)
        self.peers = Peers(ranks) if ranks.size > 1 else None

    def run(self) -> None:
        """Until the run is over, once a second and whenever a signal comes."""
        while not self.is_over:
            is_second = sum(map(self.requests.hear, read_signals(self.receiver))) > 0
            self.requests.look()
            if self.watch.is_stopping and (is_second or not self.watch.is_saving):
                self._stop_at_once()
            try:
                self._look_at_peers()
            except RuntimeError:
                self._lose_store()
            select.select([self.receiver], [], [], BEAT_S)

    def _look_at_peers(self) -> None:
        watch, peers = self.watch, self.peers
        if peers is None:
            return
        if (code := peers.verdict()) is not None:
            self._end_as_told(code)
        peers.beat(watch.step, watch.phase)
        if watch.is_stopping:
            peers.tell_stop(watch.asked)
        elif code := peers.asked_to_stop():
            watch.ask(code)
        if lost := peers.find_lost():
            self._end(lost, LOST)
        if hang := peers.find_hang(self.timeout_s):
            self._write_stack()
            stacks = "" if self.folder is None else f"; stacks of all ranks are in {self.folder / STACKS}"
            self._end(f"{hang}{stacks}", LOST)

    def _stop_at_once(self) -> None:
        watch = self.watch
        loss = "what was done since the last save is lost" if watch.is_saving else watch.loss
        place = f"step {watch.step}, {watch.phase}" if watch.step else watch.phase
        self._end(f"at once ({place}), {loss}", watch.asked, "stopped")

    def _end(self, sentence: str, code: int, what: str = "error") -> None:
        """End this process, and with it all ranks; say why unless another rank has."""
        first = self.ranks.fail(code)
        if first is None:
            print(
                f"\nmmfn: {what}: {sentence}" if sys.stderr.isatty() else f"mmfn: {what}: {sentence}", file=sys.stderr
            )
        self.ranks.leave(code if first is None else first)
        end_process(code)

    def _end_as_told(self, code: int) -> None:
        if code == LOST:
            self._write_stack()
        with suppress(RuntimeError):
            self.ranks.fail(code)
        self.ranks.leave(code)

    def _write_stack(self) -> None:
        if self.folder is None:
            return
        path = self.folder / STACKS / f"rank_{self.ranks.index}.txt"
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)

    def _lose_store(self) -> None:
        """The process that holds the store has ended: well, if this one does too in a moment."""
        end = time.monotonic() + GRACE_S
        while time.monotonic() < end:
            if self.is_over:
                return
            time.sleep(0.05)
        self.ranks.fail(LOST)
        end_process(LOST)
