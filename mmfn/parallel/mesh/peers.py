"""What ranks tell each other beside their collectives, through the store: where each of them is, and who is gone.

A rank watches itself and one other, the next around the ring, so that its work does not grow with their number. The one
that sees something wrong looks at all of them, once, to say which of them it is.
"""

import json
import os
import select
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmfn.parallel.mesh.collective import Collective, find_collective
from mmfn.parallel.mesh.launch import Ranks, count_told

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

TIMEOUT = "layout.timeout_s"
STORE_S = 30.0  # that a question to the store may take
SILENT_S = 300.0  # without a beat a rank's machine is gone, or its interpreter stands still
BEATS_S = 15.0  # in which a process that runs says where it is at least once, on a machine that is busy
POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Beat:
    """Where a rank is: `number` counts its beats. `collective`: the one it is in, if any, and for how long."""

    number: int
    step: int
    phase: str
    collective: str | None = None
    waits_s: float = 0.0

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}" if self.step else self.phase


class Peers:
    """The other ranks as one rank sees them, for one thread. Methods raise RuntimeError where the store is gone."""

    def __init__(self, ranks: Ranks) -> None:
        assert ranks.store is not None, "one process has no peers"
        self.ranks, self.store = ranks, _own_client(ranks.store)
        self.number, self.place, self.has_told_stop = 0, (0, ""), False
        self.next = (ranks.index + 1) % ranks.size
        self.last: tuple[int, float] = (-1, time.monotonic())  # the next one's last beat, and when it was new
        self.call: tuple[Collective | None, float] = (None, time.monotonic())  # that this rank is in, and since when
        self.waits_s = 0.0
        self.process: int | None = None  # a file that can be read when the process of a rank on this machine has ended
        self.watched = self._neighbour()
        self.store.set(f"process {ranks.index}", f"{_machine()} {os.getpid()}")

    def beat(self, step: int, phase: str) -> None:
        """Say where this rank is."""
        found, now, self.place = find_collective(), time.monotonic(), (step, phase)
        if found is None or found is not self.call[0]:
            self.call = found, now
        self.number, self.waits_s = self.number + 1, now - self.call[1]
        name = None if found is None else str(found)
        beat = Beat(number=self.number, step=step, phase=phase, collective=name, waits_s=self.waits_s)
        self.store.set(f"beat {self.ranks.index}", json.dumps(asdict(beat)))

    def tell_stop(self, code: int) -> None:
        """Say that the run was asked to stop."""
        if not self.has_told_stop:
            self.store.set("stop", str(code))
            self.has_told_stop = True

    def asked_to_stop(self) -> int:
        """The exit code of a stop that any rank was asked for, or 0."""
        return int(self.store.get("stop")) if self.store.check(["stop"]) else 0

    def verdict(self) -> int | None:
        """The exit code with which another rank said that it failed, if one has."""
        if not self.store.check(["verdict"]):
            return None
        index, code = map(int, self.store.get("verdict").split())
        return code if index != self.ranks.index else None

    def find_lost(self) -> str | None:
        """A sentence about a rank of this machine whose process has ended without a word."""
        if self.watched is None:
            return None
        if self.process is None:
            self._open()
        if self.process is None or not select.select([self.process], [], [], 0)[0]:
            return None
        os.close(self.process)
        rank, self.process, self.watched = self.watched, None, None
        if self.store.check([f"done {rank}"]):
            return None
        count_told(self.store, rank)
        if self.store.add("failed", 0) > 0:
            return None
        beat = self._beats([rank]).get(rank)
        where = f", last heard of in {beat}" if beat is not None else ""
        return (
            f"rank {rank} ended without a word{where}, as a process does that is killed (of memory most often: see the "
            "system's log); start the run again"
        )

    def find_hang(self, timeout_s: float) -> str | None:
        """Which rank hangs, in a sentence, where this one waits in a collective for so long or the next is silent."""
        beat, now = self._beats([self.next]).get(self.next), time.monotonic()
        is_gone = beat is None or self.store.check([f"done {self.next}"])
        if beat is not None and beat.number != self.last[0]:
            self.last = beat.number, now
        silent_s = 0.0 if is_gone else now - self.last[1]
        if self.waits_s < timeout_s and silent_s < min(SILENT_S, timeout_s):
            return None
        before, end = self._beats(range(self.ranks.size)), time.monotonic() + BEATS_S
        while self.verdict() is None:  # until each has said once more where it is, or long could have
            time.sleep(POLL_S)
            self.beat(*self.place)
            after = self._beats(range(self.ranks.size))
            are_new = [beat.number > before[rank].number for rank, beat in after.items() if rank in before]
            if all(are_new) or time.monotonic() > end:
                return describe_hang(before, after, timeout_s)
        return None

    def _beats(self, ranks: Sequence[int]) -> dict[int, Beat]:
        keys = [f"beat {rank}" for rank in ranks]
        if not self.store.check(keys):  # some have not begun
            ranks = [rank for rank in ranks if self.store.check([f"beat {rank}"])]
            keys = [f"beat {rank}" for rank in ranks]
        values = self.store.multi_get(keys) if keys else []
        return {rank: Beat(**json.loads(value)) for rank, value in zip(ranks, values, strict=True)}

    def _neighbour(self) -> int | None:
        """The next rank around those of this machine, which launchers number one after the other."""
        first = self.ranks.index - self.ranks.local
        neighbour = first + (self.ranks.local + 1) % self.ranks.local_size
        return neighbour if neighbour != self.ranks.index and hasattr(os, "pidfd_open") else None  # on Linux

    def _open(self) -> None:
        key = f"process {self.watched}"
        if not self.store.check([key]):
            return
        machine, pid = self.store.get(key).decode().rsplit(" ", 1)
        if machine != _machine():
            self.watched = None
            return
        try:
            self.process = os.pidfd_open(int(pid))
        except ProcessLookupError:  # it has ended: the first question finds out
            self.process = os.open(os.devnull, os.O_RDONLY)
        except OSError:  # Linux before 5.3, or a container that refuses it: such a rank is one that falls silent
            self.watched = None


def describe_hang(before: dict[int, Beat], now: dict[int, Beat], timeout_s: float) -> str:
    """Which ranks hang, by where all of them were a moment ago and are now.

    Ranks whose interpreter stands still; else those that are in no collective, for which the others wait; else those at
    the earliest step; else all, which wait in different ones.

    >>> 0 and 2 are in all_gather 'data' over batch, 1 reads its data
    rank 1 hangs in step 7, data: 2 others wait in all_gather 'data' over batch, for 31 s (layout.timeout_s is 30)
    """
    still = [rank for rank, beat in now.items() if rank in before and before[rank].number == beat.number]
    outside = [rank for rank, beat in now.items() if beat.collective is None]
    earliest = [rank for rank, beat in now.items() if beat.step == min(b.step for b in now.values())]
    groups = [group for group in (still, outside, earliest) if 0 < len(group) < len(now)]
    culprits = groups[0] if groups else list(now)
    names = f"rank {culprits[0]} hangs" if len(culprits) == 1 else f"ranks {', '.join(map(str, culprits))} hang"
    beat = now[culprits[0]]
    place = f"{beat}, {beat.collective}" if beat.collective else str(beat)
    where = "and does not answer, last heard of in" if culprits[0] in still else "in"
    others = Counter(beat.collective or str(beat) for rank, beat in now.items() if rank not in culprits)
    waits = [f"{n} {'other waits' if n == 1 else 'others wait'} in {call}" for call, n in others.most_common(2)]
    seconds = max(beat.waits_s for beat in now.values())
    waiting = f": {', '.join(waits)}" if waits else ""
    return f"{names} {where} {place}{waiting}, for {seconds:.0f} s ({TIMEOUT} is {timeout_s:g})"


def _own_client(store: "Store") -> "Store":
    """A connection of its own to the store: the main thread may hold the other one for minutes."""
    from datetime import timedelta

    own: Store = store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
    own.set_timeout(timedelta(seconds=STORE_S))
    return own


def _machine() -> str:
    """What processes have in common that see each other's numbers: a machine, and there a container."""
    container = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()}/{container.stat().st_ino if container.exists() else ''}"
