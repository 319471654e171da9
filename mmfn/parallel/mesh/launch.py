"""Several processes as one run: who this process is, its mesh over a process group, and how one failing rank ends all.

The environment that a launcher (torchrun) sets is read in `join` and nowhere else. Importing this file costs nothing,
so that a command line may ask before it loads torch.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

from mmfn.errors import LOST, UserError

if TYPE_CHECKING:
    import torch
    from torch.distributed.distributed_c10d import Store

    from mmfn.parallel.mesh.layout import Layout, Mesh

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"  # of torch's C++, which reads it when torch is imported
JOIN_TIMEOUT = timedelta(minutes=10)  # for the last process to start
GRACE_S = 10.0  # for what takes a second on a machine that is not busy
STORE_LOST = "rank 0, or what holds the store of the ranks, ended without a word; start the run again"
LATE_S = 60  # after the time a rank may take, in which the watchdog says which one it was
LOST_TEXTS = ("connection closed", "connection reset", "connection refused", "broken pipe", "timed out", "timeout")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of one run. `local`: its number on its machine, which is that of its accelerator, among
    the `local_size` there."""

    index: int = 0
    size: int = 1
    local: int = 0
    local_size: int = 1
    store: "Store | None" = None

    def fail(self, code: int) -> int | None:
        """Tell that this rank fails, and with what exit code. None for the first that does: it reports, and `leave`s.

        The others fail as a consequence, and get its code.
        """
        if self.store is None:
            return None
        try:
            is_first = self.store.add("failed", 1) == 1
            if is_first:
                self.store.set("verdict", f"{self.index} {code}")
            self.store.wait(["verdict"], timedelta(seconds=GRACE_S))
            index, code = map(int, self.store.get("verdict").split())
            count_told(self.store, self.index)
        except RuntimeError:  # the process that holds the store is gone, and nobody can be told
            if self.local == (1 if self.index == self.local else 0):  # on each machine one that is not the lost one
                print(f"mmfn: error: {STORE_LOST}", file=sys.stderr)
            return LOST
        if is_first:
            return None
        if index == self.index:  # another thread reports, and ends the process
            time.sleep(2 * GRACE_S)
        return code

    def wait_for_failure(self) -> None:
        """Give the rank that knows best what happened a moment to tell it first."""
        end = time.monotonic() + GRACE_S
        with suppress(RuntimeError):
            while self.store is not None and time.monotonic() < end and self.store.add("failed", 0) == 0:
                time.sleep(0.05)

    def leave(self, code: int) -> int:
        """What a rank that failed does last: `code` of one process; one of several ends at once, with it.

        The first rank, which may hold the store, stays a moment for the others to tell. Threads of a process group wait
        for ranks that may never answer. One that wakes up while Python takes itself down cannot have the interpreter's
        lock and is unwound in the middle of a destructor, which ends the process with SIGABRT ("terminate called
        without an active exception") in place of the code.
        """
        if self.store is not None:
            self._stay("told")
            end_process(code)
        return code

    def apart(self, name: str) -> "Ranks":
        """The same ranks, who meet by this name alone: for a second process group in one run."""
        from torch.distributed.distributed_c10d import PrefixStore

        return self if self.store is None else replace(self, store=PrefixStore(name, self.store))

    def finish(self) -> None:
        """Tell that this rank is done with its part of a run that ends well."""
        if self.store is not None:
            with suppress(RuntimeError):
                self.store.set(f"done {self.index}", "")
                self.store.add("done", 1)
                self._stay("done")

    def _stay(self, key: str) -> None:
        """Keep the store for the ranks that have not told yet."""
        end = time.monotonic() + GRACE_S
        with suppress(RuntimeError):
            while self.index == 0 and self.store is not None and time.monotonic() < end:
                if self.store.add(key, 0) >= self.size:
                    return
                time.sleep(0.05)


def count_told(store: "Store", index: int) -> None:
    """Say that a rank has been told that the run fails, or is gone: the first one keeps the store for it no longer."""
    if store.add(f"failed {index}", 1) == 1:
        store.add("told", 1)


def end_process(code: int) -> NoReturn:
    """End this process now, whatever its threads do, and what it has started."""
    sys.stdout.flush()
    sys.stderr.flush()
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(code)


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

    Of several, torch's C++ prints errors only, unless `TORCH_CPP_LOG_LEVEL` is set: a rank whose connection to another
    one is cut would print forty lines of stack that hide the sentence that says why. Raises ValueError for an
    incomplete environment.
    """
    if "LOCAL_RANK" not in os.environ:  # some clusters set the others for every process
        return Ranks()
    if missing := [name for name in VARIABLES if name not in os.environ]:
        raise UserError(f"LOCAL_RANK is set but {', '.join(missing)} is not; start several ranks with torchrun")
    size = int(os.environ["WORLD_SIZE"])
    if size == 1:
        return Ranks()
    os.environ.setdefault(LOG_LEVEL, "ERROR")
    from torch.distributed.rendezvous import rendezvous

    store, index, size = next(rendezvous("env://", timeout=JOIN_TIMEOUT))
    local, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return Ranks(index=index, size=size, local=local, local_size=local_size, store=store)


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

    A collective that is not answered within `timeout_s` seconds, and some more, fails. Raises ValueError when the
    layout does not fit the ranks, or for a device type without a backend.
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
    timeout = timedelta(seconds=timeout_s + LATE_S)
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
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in LOST_TEXTS)
