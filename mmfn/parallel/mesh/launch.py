"""Several processes as one run: who this process is, its mesh over a process group, and how one failing rank ends all.

The environment that a launcher (torchrun) sets is read in `join` and nowhere else. Importing this file costs nothing,
so that a command line may ask before it loads torch.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from mmfn.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch.distributed.distributed_c10d import Store

    from mmfn.parallel.mesh.layout import Layout, Mesh

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
JOIN_TIMEOUT = timedelta(minutes=10)  # for the last process to start
GRACE_S = 5.0
LOST = ("connection closed", "connection reset", "connection refused", "broken pipe", "timed out", "timeout")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of one run. `local`: its number on its machine, which is that of its accelerator."""

    index: int = 0
    size: int = 1
    local: int = 0
    store: "Store | None" = None

    def fail(self) -> bool:
        """Tell that this rank fails. True for the first that does: it reports, the others fail as a consequence.

        The first rank, which may hold the store, stays a moment for the others to tell.
        """
        if self.store is None:
            return True
        try:
            place = self.store.add("failed", 1)
            end = time.monotonic() + GRACE_S
            while self.index == 0 and time.monotonic() < end and self.store.add("failed", 0) < self.size:
                time.sleep(0.05)
        except RuntimeError:  # the process that holds the store is gone: it failed before
            return False
        return place == 1

    def leave(self, code: int) -> int:
        """What a rank that failed does last: `code` of one process; one of several ends at once, with it.

        Threads of a process group wait for ranks that may never answer. One that wakes up while Python takes itself
        down cannot have the interpreter's lock and is unwound in the middle of a destructor, which ends the process
        with SIGABRT ("terminate called without an active exception") in place of the code.
        """
        if self.store is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank computes. `host`: the mesh again, for small facts on the CPU that no device should wait for."""

    device: "torch.device"
    mesh: "Mesh"
    host: "Mesh"

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.host["world"].index == 0


def join() -> Ranks:
    """This process among those that torchrun started, once all of them are there; one process without torchrun.

    Raises ValueError for an incomplete environment.
    """
    if "LOCAL_RANK" not in os.environ:  # some clusters set the others for every process
        return Ranks()
    if missing := [name for name in VARIABLES if name not in os.environ]:
        raise UserError(f"LOCAL_RANK is set but {', '.join(missing)} is not; start several ranks with torchrun")
    size = int(os.environ["WORLD_SIZE"])
    if size == 1:
        return Ranks()
    from torch.distributed.rendezvous import rendezvous

    store, index, size = next(rendezvous("env://", timeout=JOIN_TIMEOUT))
    return Ranks(index=index, size=size, local=int(os.environ["LOCAL_RANK"]), store=store)


def check_layout(layout: "Layout", ranks: Ranks, command: str) -> None:
    """Raise ValueError unless the layout has as many ranks as there are processes. `command`: what torchrun starts."""
    if ranks.size == 1 and layout.world > 1:
        raise UserError(
            f"layout {layout} needs {layout.world} ranks but this is one process; start it with "
            f"torchrun --nproc-per-node {layout.world} -m {command}"
        )
    layout.check_world(ranks.size)


@contextmanager
def placed(ranks: Ranks, layout: "Layout", device: "torch.device", timeout_s: float) -> Iterator[Place]:
    """This rank's place for the time of the block; several ranks have a process group, by the device's type.

    A collective that is not answered within `timeout_s` seconds fails. Raises ValueError when the layout does not fit
    the ranks, or for a device type without a backend.
    """
    from mmfn.parallel.mesh.layout import distributed_mesh, make_mesh, process_groups, single_mesh

    layout.check_world(ranks.size)
    if ranks.size == 1:
        one = single_mesh()
        yield Place(device=device, mesh=one, host=one)
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    if device.type not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise UserError(f"model.device {str(device)!r} cannot be used by several ranks; use one of {known}")
    if device.type != "cpu":
        torch.accelerator.set_device_index(ranks.local)
    timeout = timedelta(seconds=timeout_s)
    assert ranks.store is not None, "several ranks have joined through a store"
    store = PrefixStore("group", ranks.store)
    dist.init_process_group(
        BACKENDS[device.type], store=store, rank=ranks.index, world_size=ranks.size, timeout=timeout
    )
    mesh = distributed_mesh(layout, device.type, timeout)
    host = mesh if device.type == "cpu" else make_mesh(layout, ranks.index, process_groups(timeout, "gloo"))
    yield Place(device=device, mesh=mesh, host=host)
    dist.destroy_process_group()  # not behind an error: other ranks may never answer, and the process ends anyway


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another rank ended or hangs."""
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in LOST)
