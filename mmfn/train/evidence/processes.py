"""`mmfn` as a user starts it: one process, or one for each rank with the environment that torchrun would set."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, NoReturn

from mmfn.errors import TERMINATED, Stop, UserError

MMFN = (sys.executable, "-m", "mmfn")
ERROR = "mmfn: error: "
HOST = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Running ranks of one command, and the files that their output goes to. `name`: what errors call it."""

    name: str
    ranks: Sequence["subprocess.Popen[bytes]"]
    outputs: Sequence[IO[bytes]]

    def is_running(self) -> bool:
        """Whether all of them are."""
        return all(rank.poll() is None for rank in self.ranks)

    def kill(self) -> None:
        """SIGKILL to all of them; returns when they are gone."""
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.wait()

    def wait(self) -> None:
        """Return when all have ended well. Raises ValueError with what the first that failed said last."""
        codes = [rank.wait() for rank in self.ranks]
        if any(codes):
            raise UserError(f"{self.name} failed: {self.last_words()}")

    def last_words(self) -> str:
        """The error that one of them printed, or the last line of the first."""
        lines = []
        for output in self.outputs:
            output.seek(0)
            lines += output.read().decode("utf-8", "replace").strip().splitlines()[-1:]
        errors = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
        return next(iter(errors or lines), "it printed nothing")


@contextmanager
def start(command: Sequence[str], name: str, world: int = 1) -> Iterator[Processes]:
    """A command as so many ranks of one run. Whatever of it is left behind the block is killed.

    SIGTERM to this process raises `Stop` in the block, so that it leaves nothing behind either.
    """
    port = str(_free_port()) if world > 1 else ""
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():  # Python sets handlers nowhere else
            stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, _stop))
        outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(world)]
        ranks: list[subprocess.Popen[bytes]] = []
        processes = Processes(name=name, ranks=ranks, outputs=outputs)
        stack.callback(processes.kill)
        for index, output in enumerate(outputs):
            place = {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(world)}
            environment = {**os.environ, **place, "MASTER_ADDR": HOST, "MASTER_PORT": port} if world > 1 else None
            ranks.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment))
        yield processes


def _stop(number: int, frame: object) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # a second one would end the first one's work
    raise Stop("as asked, and what it had started", TERMINATED)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
