"""Power that goes out while a run saves: `python -m tests.train.checkpoint.power --trials 20` as root. Linux.

A process saves step after step, in threads beside its loop, onto ext4 in an image file. At a random moment it is
stopped and the image is copied: the copy holds what has reached the disk by then, and nothing of what the system has
only in memory. It is mounted, which replays its journal as after a loss of power. The newest checkpoint must be whole,
all of one step, and none older than what the run had been told is durable. `--without-fsync` shows that the trials see
what they are for: then there must be some that lose something.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from mmfn.parallel.mesh.layout import Mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.train.checkpoint import Retention, Saver
from tests.train.checkpoint.cases import LAYOUTS, facts_of, state_at
from tests.train.checkpoint.kills import KIND, check, forked

LAYOUT, IMAGE_MIB, RETENTION = LAYOUTS["hsdp"], 256, Retention(num_newest=2)
LOST = "what was durable is not there whole"


def do(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


@contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    """The file system in an image."""
    folder.mkdir(exist_ok=True)
    do("mount", "-o", "loop", image, folder)
    try:
        yield folder
    finally:
        do("umount", folder)


def train(root: Path, durable: Path) -> None:
    """Save after save; `durable` says of each when the run knows that it is."""

    def rank(mesh: Mesh) -> None:
        saver = Saver(root=root, world=mesh["saves"], retention=RETENTION)
        for step in range(1, 100_000):
            saver(state_at(KIND, mesh, step), facts_of(step))
            if mesh["world"].index == 0 and step > 1:  # the call has waited for the save before
                told = durable.with_suffix(".told")
                told.write_text(str(step - 1))
                told.replace(durable)  # at no moment empty

    virtual(LAYOUT, rank)


def trial(folder: Path, draw: random.Random, syncs: bool) -> str:
    """What is there, beside what the run knew to be durable."""
    image, copy, durable = folder / "image", folder / "copy", folder / "durable"
    for path in (image, copy, durable):
        path.unlink(missing_ok=True)
    image.touch()
    os.truncate(image, IMAGE_MIB << 20)
    do("mkfs.ext4", "-q", "-F", image)
    with mounted(image, folder / "mount") as place:
        os.sync()
        process = os.fork()
        if not process:
            torch.set_num_threads(1)
            if not syncs:
                os.fsync = lambda file: None  # type: ignore[assignment]
            train(place / "state", durable)
            os._exit(0)
        while not durable.exists():
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 2))
        os.kill(process, signal.SIGSTOP)  # flushes nothing
        known = int(durable.read_text())
        do("cp", "--sparse=always", image, copy)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    found = folder / "found"
    with mounted(copy, folder / "mount") as place:
        status = forked(lambda: (found.write_text(str(check(place / "state", known))), os._exit(0))[0])
    return LOST if status else f"step {known} was durable, {found.read_text()} is there"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without-fsync", action="store_true")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        found = [trial(Path(folder), draw, not args.without_fsync) for _ in range(args.trials)]
    print(*found, sep="\n")
    print(f"{len(found)} trials, {found.count(LOST)} of them lost something")
    return int((LOST in found) != args.without_fsync)


if __name__ == "__main__":
    sys.exit(main())
