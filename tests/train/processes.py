"""Ranks of a command as processes of this machine, how they end, and events to wait for meanwhile."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mmfn.train.build.run import prepare
from mmfn.train.config.load import Loaded, load_config
from mmfn.train.run.watchdog import BEAT_S

ROOT = Path(__file__).parents[2]
STARTED: list[subprocess.Popen[str]] = []  # by the test that runs
LONG_S = 600  # for whatever is waited for, on a machine with other things to do


def start(num: int, *args: str, program: Sequence[str] = ("-m", "mmfn")) -> list[subprocess.Popen[str]]:
    """`num` ranks of a command, with the environment that torchrun sets, so that every exit code is seen."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [start_rank(rank, num, port, *args, program=program) for rank in range(num)]


def start_rank(
    rank: int, num: int, port: int, *args: str, program: Sequence[str] = ("-m", "mmfn"), **variables: str
) -> subprocess.Popen[str]:
    """One of `num` ranks, which meet at a port of this machine."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env |= variables | {"WORLD_SIZE": str(num), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process = subprocess.Popen(
        [sys.executable, *program, *args],
        cwd=ROOT,
        env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    STARTED.append(process)
    return process


def end_started() -> None:
    """End what a test has left behind."""
    while STARTED:
        with STARTED.pop() as process:
            process.kill()


def finish(ranks: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """(exit code, output, errors) of every rank."""
    try:
        outputs = [rank.communicate(timeout=LONG_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, *output) for rank, output in zip(ranks, outputs, strict=True)]


def wait_for(event: Callable[[], Any], rank: subprocess.Popen[str]) -> None:
    """Wait until an event is there while a process runs."""
    end = time.monotonic() + LONG_S
    while not event():
        assert rank.poll() is None, rank.communicate()
        assert time.monotonic() < end, "the event did not come"
        time.sleep(0.01)


def wait_for_line(rank: subprocess.Popen[str], beginning: str) -> str:
    """The line that a process prints with this beginning."""
    for line in rank.stdout:
        if line.startswith(beginning):
            return line
    raise AssertionError(rank.communicate())


def run_for_a_while(rank: subprocess.Popen[str]) -> None:
    """Read the lines of a run's steps until every rank has had the time to say that it is in one."""
    wait_for_line(rank, "step=2/")
    end = time.monotonic() + 3 * BEAT_S
    while time.monotonic() < end:
        wait_for_line(rank, "step=")


@contextmanager
def stalled(fifo: Path, rank: subprocess.Popen[str]) -> Iterator[None]:
    """Wait until a process reads a named pipe, into which nothing is written for the time of the block."""
    ends: list[int] = []

    def is_read() -> bool:
        with suppress(OSError):  # nothing reads it yet
            ends.append(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
        return bool(ends)

    wait_for(is_read, rank)
    try:
        yield
    finally:
        os.close(ends[0])


STALLING = """
import sys
import PIL.Image
from mmfn import cli

real, (fifo, image, heard) = PIL.Image.open, {paths!r}

def stalling(source, *args, **settings):
    if str(source) == image:
        open(fifo, "rb").read()
    return real(source, *args, **settings)

PIL.Image.open = stalling
if __name__ == "__main__":  # worker processes read this file too
    from mmfn.train.run.stop import Requests

    hear = Requests.hear

    def hearing(self, number):
        is_second = hear(self, number)
        open(heard, "w").close()
        return is_second

    Requests.hear = hearing
    sys.exit(cli.entry())
"""
HEARD = "heard"  # in the folder of such a program, once a signal has been heard


def stall(config: Path, tmp_path: Path, step: int, *overrides: str) -> tuple[Path, int, tuple[str, ...]]:
    """A program that is mmfn, but reads a named pipe before the image of the second sample of a step (from 0).

    Returns the pipe, the rank that reads it where each has its own data, and the program.
    """
    loaded = load_config(config, overrides)
    index = prepare(loaded, lambda text: None).loader.indices(step)[1]
    fifo, program = stall_image(loaded, loaded.config.data.train, index, tmp_path)
    return fifo, 1, program


def stall_image(loaded: Loaded, data: str, index: int, tmp_path: Path) -> tuple[Path, tuple[str, ...]]:
    """The same for the image of an entry of a data set; returns the pipe and the program."""
    (image,) = json.loads(Path(data).read_text())[index]["images"]
    fifo, program = tmp_path / "fifo", tmp_path / "stalling.py"
    os.mkfifo(fifo)
    paths = fifo, Path(loaded.config.data.root, image), tmp_path / HEARD
    program.write_text(STALLING.format(paths=tuple(map(str, paths))))
    return fifo, (str(program),)


def is_halted(pid: int) -> bool:
    """Whether a process has obeyed SIGSTOP."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"
