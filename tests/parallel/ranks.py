"""Real ranks for tests: processes that meet over gloo."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(world: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """`fn(*args)` in `world` new processes, one thread each; their results in the order of ranks.

    `fn` is a function of a module; arguments and results are what pickle and `torch.load(weights_only=True)` take. An
    error of a rank is raised here with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_main, (world, folder, fn, args), nprocs=world, start_method="spawn")
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]


def _main(rank: int, world: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        torch.save(fn(*args), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
