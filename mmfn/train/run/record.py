"""The record of a step: what `metrics.jsonl` has a line of, put together from its data, its metrics and the time.

`docs/metrics.md` says what every key means.
"""

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmfn.errors import UserError
from mmfn.models.work import formula
from mmfn.parallel.planning.devices import peak_flops
from mmfn.train.build.run import Run
from mmfn.train.data import Agreed
from mmfn.train.data.skips import count_kinds
from mmfn.train.data.step_lines import read_lines
from mmfn.train.gradients import Metrics

RATE_STEPS = 20  # rates are measured over so many steps
OF_MACHINE = (
    *("wait_s", "compute_s", "step_s", "tokens_per_s", "tokens_per_s_per_device", "tflops_per_s", "mfu"),
    *("memory_bytes", "eta_s", "began_at"),
)
"""The keys of a record that another run of the same config has other values of."""
StepRecord = dict[str, Any]  # what `train` says of a step


@dataclass(kw_only=True)
class Tally:
    """What a rank holds of the steps of a run, however many there are; the rest is in metrics.jsonl.

    `num_steps` since the run began or went on and their `num_tokens`. `last`: the newest records; on the first rank
    those of before as well.
    """

    num_steps: int = 0
    num_tokens: int = 0
    last: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=RATE_STEPS))

    def add(self, record: StepRecord) -> None:
        """The next record."""
        self.num_steps += 1
        self.num_tokens += record["tokens"]
        self.last.append(record)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a step runs on: this rank's device, how many there are, and the peak of one in FLOP/s, if it is known."""

    device: torch.device
    num_devices: int = 1
    peak: float | None = None

    @staticmethod
    def of(run: Run) -> "Machine":
        """That of a run. The peak is the setting's, or that of a device that is known."""
        device, tflops = run.place.device, run.loaded.config.train.peak_tflops
        module = None if device.type == "cpu" else torch.get_device_module(device)
        peak = peak_flops(module.get_device_name(device)) if module is not None else None
        return Machine(
            num_devices=run.place.mesh.layout.world,
            device=device,
            peak=peak if tflops is None else 1e12 * tflops,
        )

    def memory_bytes(self) -> int:
        """The most that was allocated on this rank's device so far; on a CPU, that was resident in this process."""
        if self.device.type != "cpu":
            most: int = torch.get_device_module(self.device).max_memory_allocated(self.device)
            return most
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def now(self) -> Any:
        """When the device is through what it was asked for: seconds on a CPU, else an event among its work."""
        if self.device.type == "cpu":
            return time.perf_counter()
        module = torch.get_device_module(self.device)
        event = module.Event(enable_timing=True)
        event.record(module.current_stream(self.device))
        return event


@dataclass(frozen=True, kw_only=True)
class Lap:
    """The time of a step, from the end of the one before, `begin`, to its own, without what was done between them.

    `pause_s`: that; `wait_s`: spent waiting for the step's data.
    """

    begin: Any
    end: Any
    wait_s: float
    pause_s: float

    def seconds(self) -> float:
        """How long it was, once the device has ended it."""
        if isinstance(self.end, float):
            return float(self.end - self.begin) - self.pause_s
        self.end.synchronize()
        return float(self.begin.elapsed_time(self.end)) / 1000 - self.pause_s


class Meter:
    """Turns a step's metrics into numbers (waiting for the device) and its time into rates."""

    def __init__(
        self, num_steps: int, first_step: int = 0, *, skipped: int = 0, machine: Machine | None = None
    ) -> None:
        """`first_step`: how many were taken before, of which `skipped` changed nothing."""
        self.num_steps, self.first_step, self.skipped = num_steps, first_step, skipped
        self.machine = machine or Machine(device=torch.device("cpu"))
        self.began_at, self.last = round(time.time()), self.machine.now()
        self.wait_s, self.pause_s = 0.0, 0.0
        self.first = 0.0  # when the first step was done: it may have compiled, so it says nothing about the rest
        self.window: deque[tuple[int, int, float]] = deque(maxlen=RATE_STEPS)

    @staticmethod
    def of(run: Run, first_step: int) -> "Meter":
        """That of a run which goes on behind `first_step` steps."""
        skipped = int(run.state["guard"]["skipped"])
        return Meter(run.loaded.config.train.num_steps, first_step, skipped=skipped, machine=Machine.of(run))

    def waited(self, seconds: float) -> None:
        """Time was spent waiting for the data of the step that is started next."""
        self.wait_s += seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done between two steps is part of the time of neither."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.pause_s += time.perf_counter() - began

    def lap(self) -> Lap:
        """The time of the step that was just started, whose end the device may not have reached yet."""
        begin, self.last = self.last, self.machine.now()
        lap = Lap(begin=begin, end=self.last, wait_s=self.wait_s, pause_s=self.pause_s)
        self.wait_s, self.pause_s = 0.0, 0.0
        return lap

    def finish(self, facts: StepRecord, metrics: Metrics, lap: Lap) -> StepRecord:
        """The complete record of a step that was started earlier."""
        numbers = numbers_of({name: x for name, x in metrics.items() if name != "tokens"})  # `supervised` says that
        self.skipped += int(numbers.get("skipped", 0))
        others = {**facts, "skipped_steps": self.skipped, **self._times(facts, lap)}
        if clash := sorted(numbers.keys() & others.keys()):
            raise UserError(f"the model has a loss or a stat {clash[0]!r}, which a record needs; give it another name")
        return {"step": facts["step"], **numbers, **others}

    def _times(self, facts: StepRecord, lap: Lap) -> StepRecord:
        now, step_s = time.perf_counter(), lap.seconds()
        wait_s = min(lap.wait_s, step_s)
        self.first = self.first or now
        self.window.append((facts["tokens"], facts["flops"], step_s))
        tokens, flops, seconds = map(sum, zip(*self.window, strict=True))
        done = facts["step"] - self.first_step - 1
        per_step_s = (now - self.first) / done if done else step_s
        num, peak = self.machine.num_devices, self.machine.peak
        return {
            "wait_s": round(wait_s, 6),
            "compute_s": round(step_s - wait_s, 6),
            "step_s": round(step_s, 6),
            "tokens_per_s": round(tokens / seconds, 1),
            "tokens_per_s_per_device": round(tokens / seconds / num, 1),
            "tflops_per_s": round(flops / seconds / num / 1e12, 6),
            **({"mfu": round(flops / seconds / num / peak, 6)} if peak else {}),
            "memory_bytes": self.machine.memory_bytes(),
            "eta_s": round((self.num_steps - facts["step"]) * per_step_s, 1),
            "began_at": self.began_at,
        }


def notes(run: Run) -> list[str]:
    """What is said once of FLOPs and of MFU, before the first step."""
    peak = Machine.of(run).peak
    rate = "model FLOPs / (devices x time)"
    how = f"MFU = model FLOPs / (devices x {peak / 1e12:g} TFLOP/s x time)" if peak else f"TFLOP/s = {rate}"
    unknown = "" if peak else "; set train.peak_tflops for MFU"
    return [
        f"{how}, forward and backward, nothing that is computed again, frozen parts forward alone{unknown}",
        f"model FLOPs of a step: {formula(run.loader.work)}",
    ]


def facts_of(step: int, share: Agreed) -> StepRecord:
    """What is known of a step before it is computed: its data."""
    counts = share.counts
    return {
        "step": step,
        "samples": counts.samples,
        "microbatches": len(share.microbatches),
        "tokens": counts.tokens,
        "supervised": counts.supervised_tokens,
        "text_tokens": counts.text_tokens,
        "image_tokens": counts.image_tokens,
        "video_tokens": counts.video_tokens,
        "audio_tokens": counts.audio_tokens,
        "media_tokens": counts.media_tokens,
        "padding": round(counts.padding_share, 4),
        "encoder_imbalance": round(share.encoder_imbalance, 4),
        "flops": counts.flops,
        "cut": counts.cut,
        **count_kinds(share.skips),
        "skipped_samples": share.cursor.bad,
    }


def numbers_of(metrics: Metrics) -> dict[str, float]:
    """The 0-D metrics as numbers, whole ones of whole dtypes, by one copy from each device that some lie on."""
    devices: dict[torch.device, list[str]] = {}
    for name, x in metrics.items():
        if x.ndim == 0:
            devices.setdefault(x.device, []).append(name)
    found: dict[str, float] = {}
    for names in devices.values():
        found |= zip(names, torch.stack([metrics[name].to(torch.float64) for name in names]).tolist(), strict=True)
    return {
        name: found[name] if x.is_floating_point() else int(found[name]) for name, x in metrics.items() if x.ndim == 0
    }


def is_finite(record: StepRecord) -> bool:
    """Whether loss and gradient norm of a step are numbers."""
    return math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])


def read_records(path: Path, behind: int = 0, until: int = sys.maxsize) -> Iterator[StepRecord]:
    """The records in a metrics.jsonl of the steps behind `behind` up to `until`, one by one."""
    for numbers in read_lines(path, behind, until):
        yield {name: math.nan if value is None else value for name, value in numbers.items()}
