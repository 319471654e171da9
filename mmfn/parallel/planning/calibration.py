"""`measure`: the figures of the machine at hand, by running what a step runs: products, attention, copies, collectives.

Each measurement repeats one call for a given time and takes the best of three rounds. Rates of classes are divided by
that of the best product, which stands for the peak: MFU by such a file is a share of what the machine was seen to do.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfn.batch import Segments
from mmfn.ops import Ops
from mmfn.parallel.mesh.host_values import gather_values
from mmfn.parallel.mesh.launch import Place
from mmfn.parallel.mesh.layout import Mesh
from mmfn.parallel.planning.account import ATTENTION, GROUPED, LARGE, NARROW, NARROW_GROUPED
from mmfn.parallel.planning.devices import Device
from mmfn.parallel.planning.time_model import wire_bytes

ROUNDS = 3
LEAST_S = 1e-7  # of a latency, which a difference of two measurements may make nothing


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is multiplied, copied and sent. Products are (m, k, n); `experts`: (experts, rows of each, width, their
    width); `attention`: (segments, their tokens, query heads, kv heads, channels); the others bytes."""

    products: Sequence[tuple[int, int, int]]
    narrow: Sequence[tuple[int, int, int]]
    experts: tuple[int, int, int, int]
    narrow_experts: tuple[int, int, int, int]
    attention: tuple[int, int, int, int, int]
    copied: int
    sent: int


SIZES = {
    "cpu": Sizes(
        products=((1024, 1024, 1024), (1024, 1024, 2048)),
        narrow=((1024, 1024, 256), (1024, 256, 1024)),
        experts=(2, 512, 1024, 1024),
        narrow_experts=(4, 256, 1024, 256),
        attention=(2, 512, 8, 2, 64),
        copied=2**26,
        sent=2**22,
    ),
    "cuda": Sizes(
        products=((8192, 4096, 14336), (8192, 8192, 8192), (16384, 4096, 4096)),
        narrow=((8192, 4096, 512), (16384, 512, 2048)),
        experts=(16, 2048, 2048, 2048),
        narrow_experts=(64, 1024, 2048, 768),
        attention=(4, 4096, 32, 8, 128),
        copied=2**30,
        sent=2**28,
    ),
}
"""By type of device; an NPU's are those of CUDA."""


def measure(
    base: Device, ops: Ops, place: Place, dtype: torch.dtype, *, seconds: float, sizes: Sizes | None = None
) -> Device:
    """`base` with everything measured that can be here; of several ranks the slowest counts.

    `ops`: the table whose kernels are taken. `place`: the axis "dp" of its mesh holds the ranks of a node, "replicate"
    one of each node. `seconds`: of each measurement. `sizes`: default those of the device's type.
    """
    timer = Timer(device=place.device, seconds=seconds)
    sizes = sizes or SIZES.get(place.device.type, SIZES["cuda"])
    figures = {**machine_of(timer, dtype, sizes), **mesh_of(timer, place.mesh, sizes)}
    everyone = gather_values([rates_of(timer, ops, dtype, sizes), figures], place.host["world"], "calibration")
    rates = {name: min(one[0][name] for one in everyone) for name in everyone[0][0]}
    slowest = {name: (max if name.endswith("_s") else min)(one[1][name] for one in everyone) for name in figures}
    best = max(rates.values())
    return replace(base, flops=best, shares={name: rate / best for name, rate in rates.items()}, **slowest)


@dataclass(frozen=True, kw_only=True)
class Timer:
    """Times calls on a device. `seconds`: how long a round repeats one."""

    device: torch.device
    seconds: float

    def __call__(self, run: Callable[[], Any], count: int = 0) -> float:
        """Seconds of one call, of `count` in a row, the device awaited behind them; 0: as many as there is time for.

        What ranks do together needs a count: it is to be the same on all of them.
        """
        run()
        once = self._calls(run, 1)
        count = count or max(1, min(1000, round(self.seconds / ROUNDS / max(once, LEAST_S))))
        return min(self._calls(run, count) for _ in range(ROUNDS))

    def issue(self, run: Callable[[], Any], count: int = 200) -> float:
        """Seconds that the host takes to issue one call."""
        run()

        def issued() -> float:
            self.wait()
            begin = time.perf_counter()
            for _ in range(count):
                run()
            return (time.perf_counter() - begin) / count

        return min(issued() for _ in range(ROUNDS))

    def wait(self) -> None:
        """Until the device has done all it was given."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def _calls(self, run: Callable[[], Any], count: int) -> float:
        self.wait()
        begin = time.perf_counter()
        for _ in range(count):
            run()
        self.wait()
        return (time.perf_counter() - begin) / count


def rates_of(timer: Timer, ops: Ops, dtype: torch.dtype, sizes: Sizes) -> dict[str, float]:
    """FLOPs per second by class of work, forward and backward."""

    def make(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=dtype, device=timer.device).normal_(0, 0.02).requires_grad_()

    def products(shapes: Sequence[tuple[int, int, int]]) -> float:
        work = seconds = 0.0
        with torch.no_grad():
            for m, k, n in shapes:
                a, b = make(m, k), make(n, k)
                work, seconds = work + 2 * m * k * n, seconds + timer(partial(torch.matmul, a, b.t()))
        return work / seconds

    def experts(E: int, rows: int, D: int, F: int) -> float:
        x_RD, weights = make(E * rows, D), {"gate_up": make(E, 2 * F, D), "down": make(E, D, F)}
        counts_E = torch.full((E,), rows, device=timer.device)
        run = _step(lambda: ops.experts(x_RD, counts_E, weights), x_RD, *weights.values())
        return 3 * 6 * E * rows * D * F / timer(run)

    def attention(N: int, length: int, H: int, K: int, C: int) -> float:
        q_THC, k_SKC, v_SKC = (make(N * length, heads, C) for heads in (H, K, K))
        offsets_N = torch.arange(0, (N + 1) * length, length, dtype=torch.int32, device=timer.device)
        segments = Segments.of(offsets_N)
        run = _step(lambda: ops.attention(q_THC, k_SKC, v_SKC, segments, is_causal=True), q_THC, k_SKC, v_SKC)
        return 14 * H * C * N * (length * (length + 1) // 2) / timer(run)

    return {
        LARGE: products(sizes.products),
        NARROW: products(sizes.narrow),
        GROUPED: experts(*sizes.experts),
        NARROW_GROUPED: experts(*sizes.narrow_experts),
        ATTENTION: attention(*sizes.attention),
    }


def _step(forward: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], Any]:
    """A forward and its backward."""

    def run() -> Any:
        y = forward()
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    return run


def machine_of(timer: Timer, dtype: torch.dtype, sizes: Sizes) -> dict[str, float]:
    """Memory, its bandwidth by copies, the share that elementwise work reaches, the host's link, and launches."""
    values = sizes.copied // dtype.itemsize
    a, b, c = (torch.ones(values, dtype=dtype, device=timer.device) for _ in range(3))
    copied, added = timer(lambda: a.copy_(b)), timer(lambda: torch.add(a, b, out=c))
    bandwidth = max(2 * sizes.copied / copied, 3 * sizes.copied / added)
    one = torch.ones(8, dtype=dtype, device=timer.device)
    found = {
        "memory_bytes": memory_bytes(timer.device),
        "memory_bandwidth": bandwidth,
        "memory_share": 3 * sizes.copied / added / bandwidth,
        "launch_s": timer.issue(lambda: one + one),
        "host_link": bandwidth / 2,
    }
    if timer.device.type != "cpu":
        pinned = torch.ones(values, dtype=dtype, pin_memory=True)
        found["host_link"] = sizes.copied / timer(lambda: a.copy_(pinned, non_blocking=True))
    return found


def memory_bytes(device: torch.device) -> int:
    """Of the device, or this machine's."""
    if device.type == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(getattr(torch, device.type).get_device_properties(device).total_memory)


def mesh_of(timer: Timer, mesh: Mesh, sizes: Sizes) -> dict[str, float]:
    """What ranks of a node send each other, and nodes, with latencies: nothing of what is not there.

    A small all-gather of n ranks takes a call and n - 1 hops, an all-reduce a call and twice as many.
    """
    found: dict[str, float] = {}
    for name, link, hop_name in (("dp", "link", "hop_s"), ("replicate", "network", "network_hop_s")):
        axis = mesh[name]
        if axis.size == 1:
            continue
        large = torch.ones(sizes.sent // 4, device=timer.device)
        small = torch.ones(axis.size, device=timer.device)
        gathered = timer(partial(axis.all_gather, large, "calibration"), count=4)
        once = timer(partial(axis.all_gather, small, "calibration"), count=50)
        twice = timer(partial(axis.all_reduce, small, "calibration"), count=50)
        hop = max(LEAST_S, (twice - once) / (axis.size - 1))
        call = max(LEAST_S, once - (axis.size - 1) * hop)
        found[link] = wire_bytes("all_gather", sizes.sent, axis.size) / max(LEAST_S, gathered - once)
        found[f"{link}_share"] = 1.0
        found[hop_name] = hop
        found["call_s"] = max(call, found.get("call_s", 0.0))
    return found
