"""Which collective a thread is in, as another thread sees it."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.collective import Collective, find_collective

ROOT = Path(__file__).parents[2]
ASKING = """
import gc, random, threading, time
from mmfn.parallel.mesh.collective import find_collective

class Garbage:
    def __init__(self):
        self.cycle = self
    def __del__(self):
        time.sleep(2e-4)  # the other thread goes on

def ask():
    draw = random.Random(0)
    for _ in range(2000):
        gc.disable()
        Garbage()
        gc.set_threshold(draw.randint(1, 40))  # objects from here to the next collection
        gc.enable()
        find_collective()

def call(depth):
    return [call(depth - 1) for _ in range(1)][0] if depth else sum(range(100))

gc.freeze()
asker = threading.Thread(target=ask)
asker.start()
while asker.is_alive():
    call(3), call(11), call(30)
print("over")
"""


def test_whoever_asks_may_collect_garbage_while_the_other_goes_on() -> None:
    """Walking the frames of the other thread, as was done once, ends here with SIGSEGV."""
    done = subprocess.run([sys.executable, "-c", ASKING], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "over\n"), done.stderr


def test_the_outermost_call_of_the_main_thread_is_found() -> None:
    with Collective("shift", "ring", "keys"), Collective("wait", "ring"):
        assert str(find_collective()) == "shift 'keys' over ring"
    assert find_collective() is None


def test_a_call_that_fails_is_over() -> None:
    class Broken:
        widest, name, is_traceable = torch.float64, "broken", False

        def wait(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("connection closed")

    with pytest.raises(RuntimeError, match="closed"):
        Axis(name="dp", size=2, transport=Broken()).wait(torch.ones(1))  # type: ignore[arg-type]
    assert find_collective() is None


def test_threads_of_python_are_left_out() -> None:
    """A save in its own thread waits for disks, which is no hang of the steps."""
    found: list[Collective | None] = []

    def save() -> None:
        with Collective("all_gather", "saves", "checkpoint"):
            found.append(find_collective())

    thread = threading.Thread(target=save)
    thread.start()
    thread.join()
    assert found == [None]
