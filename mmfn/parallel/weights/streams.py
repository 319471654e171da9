"""`SideStream`: work beside what a device computes, and `Arrival`, which says when it is there.

Two rules take the place of recording which stream uses which memory. What runs on the side stream is behind all that
the current stream was given until then, so it may reuse whatever that has let go. And what either has made is held by a
reference until the current stream has waited for the arrival. On a CPU work is done at once, where it stands.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


def has_streams(device: torch.device) -> bool:
    """Whether a device works through what it is given while the host goes on, as all but the CPU do."""
    return device.type not in ("cpu", "meta")


@dataclass(frozen=True)
class Arrival:
    """Work of a device under way; `event` None: it is complete."""

    event: Any = None
    device: torch.device | None = None

    def wait(self) -> None:
        """What the device's current stream is given from here on runs behind the work. The host does not wait."""
        if self.event is not None:
            torch.accelerator.current_stream(self.device).wait_event(self.event)

    def synchronize(self) -> None:
        """Wait, on the host, until the work is complete."""
        if self.event is not None:
            self.event.synchronize()


@dataclass(eq=False)
class SideStream:
    """One stream per device, made when it is first needed, beside the one that computes."""

    streams: dict[torch.device, torch.Stream] = field(default_factory=dict)

    @contextmanager
    def behind_current(self, device: torch.device) -> Iterator[None]:
        """What the device is given within runs behind all that its current stream was given, and beside what comes."""
        if not has_streams(device):
            yield
            return
        if device not in self.streams:
            self.streams[device] = torch.Stream(device)
        side = self.streams[device]
        side.wait_stream(torch.accelerator.current_stream(device))
        with side:
            yield

    def arrival(self, device: torch.device) -> Arrival:
        """That of all that the side stream was given so far."""
        return Arrival(self.streams[device].record_event(), device) if has_streams(device) else Arrival()
