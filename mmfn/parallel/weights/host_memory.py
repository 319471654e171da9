"""The host's memory beside a device's: reused pinned buffers, and copies that run beside the computation.

Where the device is the CPU, the same code makes plain copies; a plan counts them as if the host were another device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmfn.parallel.weights.streams import Arrival, SideStream, has_streams

HOST_DEVICE = torch.device("cpu")
HOST = "host memory"  # what plans count buffers of the host under, beside the memory of the device


def is_pinned_for(device: torch.device) -> bool:
    """Whether memory of the host is pinned for copies to and from a device."""
    return has_streams(device)


def complete(device: torch.device) -> None:
    """Wait, on the host, until all copies to and from a device are complete."""
    if is_pinned_for(device):
        torch.accelerator.synchronize(device)


@torch.library.custom_op("mmfn::counted_empty", mutates_args=())
def counted_empty(x: Tensor, device: torch.device, site: str, is_pinned: bool = False) -> Tensor:
    """Memory without values for what `x` holds, counted by plans under `site`."""
    return torch.empty(x.shape, dtype=x.dtype, device=device, pin_memory=is_pinned)


@counted_empty.register_fake
def _(x: Tensor, device: torch.device, site: str, is_pinned: bool = False) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device if x.is_meta else device)


@dataclass(eq=False)
class HostMemory:
    """Buffers by dtype and shape, made once and reused, and one stream per device that all copies go through in order.

    A buffer may be given back as soon as the copy from it is issued: the next copy into it comes later on that stream.
    """

    free: dict[tuple[torch.dtype, torch.Size], list[Tensor]] = field(default_factory=dict)
    side: SideStream = field(default_factory=SideStream)

    def take(self, x: Tensor, device: torch.device | None = None) -> Tensor:
        """A buffer for what `x` holds, for copies to and from `device` (default: that of x)."""
        found = self.free.get((x.dtype, x.shape))
        return found.pop() if found else counted_empty(x, HOST_DEVICE, HOST, is_pinned_for(device or x.device))

    def give(self, buffers: Sequence[Tensor]) -> None:
        """Buffers that `take` may hand out again."""
        for buffer in buffers:
            self.free.setdefault((buffer.dtype, buffer.shape), []).append(buffer)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Arrival:
        """Copy (to, from) pairs behind all that the current stream was given; the caller keeps both until then."""
        device = next((x.device for pair in pairs for x in pair if is_pinned_for(x.device)), None)
        if device is None:
            for to, source in pairs:
                to.copy_(source)
            return Arrival()
        with self.side.behind_current(device):
            for to, source in pairs:
                to.copy_(source, non_blocking=True)
        return self.side.arrival(device)
