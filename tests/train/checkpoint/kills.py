"""Saves that are killed: `python -m tests.train.checkpoint.kills FOLDER NUMBER SEED` prints what it found, as JSON.

A process forks one that saves step after step, deletes old checkpoints, and sends itself SIGKILL before, behind or in
the middle of a call to the operating system whose number is drawn. What is there is then read, thoroughly.
"""

import json
import os
import random
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmfn import tree
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.layout import single_mesh
from mmfn.train.checkpoint import Retention, fill_, newest, open_checkpoint, read, remove_old, verify
from tests.train.checkpoint.cases import LAYOUTS, empty_state, same_bits, save_on, values_of

CALLS = ("open", "pwrite", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "posix_fallocate")
KIND, LAYOUT, KEEP = "small", LAYOUTS["hsdp"], 2
ALONE = Axis(name="world")
WHERE = ("before", "behind", "within")


class Fuse:
    """Counts the calls of this process, of all its threads, and ends it at one of them."""

    def __init__(self, number: int, where: str) -> None:
        self.number, self.where, self.count = number, where, 0
        self.lock = threading.Lock()
        self.names: Counter[str] = Counter()

    def guard(self, name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.lock:
                self.count += 1
                self.names[name] += 1
                is_last = self.count == self.number
                if is_last and self.where == "within" and name == "pwrite":
                    real(args[0], args[1][: len(args[1]) // 2], args[2])
                if is_last and self.where != "behind":
                    os.kill(os.getpid(), signal.SIGKILL)
                if not is_last:
                    return real(*args, **kwargs)
                try:
                    return real(*args, **kwargs)
                finally:  # where the call fails as well
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    def arm(self) -> None:
        for name in CALLS:
            setattr(os, name, self.guard(name))


def train(root: Path, acknowledged: Path, first: int, fuse: Fuse, num_saves: int) -> None:
    """Save after save; `acknowledged` says of each when it has returned."""
    fuse.arm()
    for step in range(first, first + num_saves):
        save_on(LAYOUT, root, KIND, step)
        acknowledged.write_text(str(step))
        remove_old(root, Retention(num_newest=KEEP), ALONE)


def forked(work: Callable[[], None]) -> int:
    """The status of a process that does `work`."""
    process = os.fork()
    if not process:
        try:
            torch.set_num_threads(1)  # makes the pool that a fork does not copy, before threads do so at once
            work()
        except BaseException:
            traceback.print_exc()
        os._exit(7)
    return os.waitpid(process, 0)[1]


def check(root: Path, acknowledged: int) -> int:
    """The step of the newest checkpoint, which must be whole, all of one step, and none older than was acknowledged."""
    search = newest(root, ALONE, is_thorough=True)
    assert search.skipped == [], "a half-written one has a name"
    step = 0
    if search.checkpoint is not None:
        step = search.checkpoint.manifest.facts.step
        state = empty_state(KIND, single_mesh())
        fill_(state, search.checkpoint, ALONE)
        for path, leaf in tree.items(state):
            assert same_bits(leaf, values_of(path, step, tuple(leaf.shape), leaf.dtype)), path
    for name in read.names(root):
        verify(open_checkpoint(root / name))
    assert len(read.names(root)) >= min(step, KEEP), "a finished one is lost"
    assert step >= acknowledged, f"step {acknowledged} was saved but {step} is the newest"
    return step


def campaign(folder: Path, number: int, seed: int) -> dict[str, Any]:
    """Kill `number` times, in one run that goes on each time from what it finds."""
    root, acknowledged = folder / "state", folder / "acknowledged"
    count = folder / "count"

    def rehearse() -> None:
        fuse = Fuse(0, "before")
        train(folder / "rehearsal", folder / "rehearsed", 1, fuse, 4)
        count.write_text(str(fuse.count))

    forked(rehearse)
    num_calls = int(count.read_text())  # of four saves, the last of which delete an older one
    draw, step, saved, leftovers = random.Random(seed), 0, [], 0
    for _ in range(number):
        fuse = Fuse(draw.randint(1, num_calls), draw.choice(WHERE))
        status = forked(lambda: train(root, acknowledged, step + 1, fuse, 1000))  # noqa: B023
        assert os.WIFSIGNALED(status), status
        told = int(acknowledged.read_text()) if acknowledged.exists() else 0
        step = check(root, told)
        saved.append(step)
        leftovers += any(path.name.startswith(".iter_") for path in root.iterdir())
    save_on(LAYOUT, root, KIND, step + 1)
    hidden = [path.name for path in root.iterdir() if path.name.startswith(".iter_")]
    return {"steps": saved, "leftovers": leftovers, "hidden": hidden, "calls": num_calls}


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(campaign(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
