"""The order of copies beside a computation, on a device that only writes down what it is given."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmfn.parallel.weights import host_memory
from mmfn.parallel.weights.host_memory import HostMemory

DEVICE = torch.device("cuda", 0)


@dataclass
class Device:
    """Two streams of a device, and what was given to which, in order."""

    log: list[str] = field(default_factory=list)
    running: str = "main"

    def stream(self, name: str) -> Any:
        def wait_stream(other: Any) -> None:
            self.log.append(f"{name}: waits for {other.name}")

        def wait_event(event: str) -> None:
            self.log.append(f"{name}: waits for {event}")

        def record_event() -> str:
            self.log.append(f"{name}: event")
            return f"the event of {name}"

        return SimpleNamespace(name=name, wait_stream=wait_stream, wait_event=wait_event, record_event=record_event)

    def tensor(self, name: str, device: torch.device) -> Any:
        def copy_(other: Any, *, non_blocking: bool = False) -> None:
            assert non_blocking, "the host does not wait"
            self.log.append(f"{self.running}: {name} from {other.name}")

        return SimpleNamespace(name=name, device=device, copy_=copy_)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device()

    class Stream(SimpleNamespace):
        """The side stream, which is made once."""

        def __init__(self, device: torch.device) -> None:
            assert device == DEVICE
            super().__init__(**vars(found.stream("side")))
            found.log.append("made")

        def __enter__(self) -> None:
            found.running = "side"

        def __exit__(self, *_: Any) -> None:
            found.running = "main"

    monkeypatch.setattr(host_memory.torch, "Stream", Stream)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: found.stream("main"))
    return found


def test_copies_run_behind_what_was_given_and_before_what_waits(device: Device) -> None:
    memory = HostMemory()
    cpu = torch.device("cpu")
    a, b = (device.tensor(name, DEVICE) for name in "ab")
    pinned_a, pinned_b = (device.tensor(f"pinned {name}", cpu) for name in "ab")
    arrival = memory.copy([(pinned_a, a), (b, pinned_b)])
    assert device.log == [
        "made",
        "side: waits for main",  # what the copies read is complete, and what they overwrite no longer in use
        "side: pinned a from a",
        "side: b from pinned b",
        "side: event",
    ]
    device.log.clear()
    arrival.wait()
    assert device.log == ["main: waits for the event of side"]
    device.log.clear()
    memory.copy([(a, pinned_a)])
    assert device.log == ["side: waits for main", "side: a from pinned a", "side: event"]


def test_copies_of_the_host_itself_are_made_at_once(device: Device) -> None:
    to, source = torch.zeros(3), torch.arange(3.0)
    HostMemory().copy([(to, source)]).wait()
    assert torch.equal(to, source)
    assert device.log == []
