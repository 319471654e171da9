"""A window of steps under torch's profiler: a trace of every rank, and what its device's memory held."""

from pathlib import Path

import torch

from mmfn import torch_private
from mmfn.train.data.cursor import Cursor
from mmfn.train.run.folder import PROFILE
from mmfn.train.step import State


class Profile:
    """A task of `loop.train`: begins behind step `first - 1` and ends behind step `last`, the profiler's files written.

    `profile/rank_N.json` opens in chrome://tracing or Perfetto; `profile/memory_N.pickle`, of devices that keep a
    history of their memory, at pytorch.org/memory_viz.
    """

    def __init__(self, window: tuple[int, int], folder: Path, rank: int, device: torch.device, start: int) -> None:
        """`start`: steps that were taken before."""
        self.first, self.last = window
        self.folder, self.rank, self.device = folder / PROFILE, rank, device
        kinds = {"cpu": torch.profiler.ProfilerActivity.CPU, "cuda": torch.profiler.ProfilerActivity.CUDA}
        activities = [kinds["cpu"]] + [kinds[device.type]] * (device.type in kinds and device.type != "cpu")
        self.profiler = torch.profiler.profile(activities=activities, record_shapes=True)
        self.is_on = False
        if start + 1 == self.first:
            self._begin()

    def is_due(self, step: int) -> bool:
        """Behind the step before the first one, and the last."""
        return step in (self.first - 1, self.last)

    def __call__(self, state: State, cursor: Cursor) -> dict[str, float]:
        """Begin or end."""
        if cursor.step == self.first - 1:
            self._begin()
        elif self.is_on:
            self._end()
        return {}

    def _begin(self) -> None:
        self.is_on = True
        torch_private.record_memory(self.device, is_on=True)
        self.profiler.start()

    def _end(self) -> None:
        self.is_on = False
        self.profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.profiler.export_chrome_trace(str(self.folder / f"rank_{self.rank}.json"))
        torch_private.write_memory(self.device, str(self.folder / f"memory_{self.rank}.pickle"))
        torch_private.record_memory(self.device, is_on=False)
