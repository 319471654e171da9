"""`Saver`: saves beside the steps of a run. The loop copies this rank's part of the state; a thread writes it.

The copy goes into buffers of the host that are made once and reused (pinned where the state lies on an accelerator, and
then it is only issued: what the device is given next waits for it, the loop does not). The thread writes, digests and
publishes over an axis of its own, so that its collectives never meet those of a step and no rank waits in one while
another writes.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.weights.host_memory import HostMemory
from mmfn.parallel.weights.streams import Arrival
from mmfn.train.checkpoint.format import Facts
from mmfn.train.checkpoint.retention import Retention, remove_old
from mmfn.train.checkpoint.write import Part, part_of, publish
from mmfn.tree import Tree


@dataclass(kw_only=True, eq=False)
class Saver:
    """Saves a state into `root`, one at a time, and deletes what need not stay. All ranks make the same calls.

    `world`: all ranks, on the CPU, in no other use (the axis "saves"). `logs`: files of the first rank that are durable
    before a checkpoint counts. `is_asynchronous` False: a call returns when the checkpoint is durable. `reads_back`:
    what the disk has is compared before it counts. `losses`: of the checkpoints that stay for ever, where they are
    known: see `whole_in`. `on_failure`: called by the thread whose save has failed, on each
    rank when it learns of it, which are different moments: a run agrees on one at which all of them `wait`.
    """

    root: Path
    world: Axis
    retention: Retention
    logs: Sequence[Path] = ()
    is_asynchronous: bool = True
    reads_back: bool = False
    on_failure: Callable[[], None] = lambda: None
    losses: dict[int, float | None] = field(default_factory=dict)
    memory: HostMemory = field(default_factory=HostMemory)
    _thread: threading.Thread | None = None
    _error: BaseException | None = None

    def __call__(self, state: Tree, facts: Facts) -> None:
        """Save a state, which may change as soon as this returns, once the save before is complete.

        Raises what that one failed with.
        """
        self.wait()
        part = part_of(state, self.world)
        if not self.is_asynchronous:
            self._write(part, facts)
            return
        buffers, arrival = _copy(part.pieces, self.memory)
        copy = Part(leaves=part.leaves, pieces=buffers, plain=part.plain)
        # by its name: no process waits at its end for a disk that does not answer (`cli.entry`)
        self._thread = threading.Thread(target=self._run, args=(copy, arrival, facts), name="mmfn-checkpoint")
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when no save is under way, or `timeout_s` is over.

        Raises what the last save failed with, if it has, once; UserError, one sentence, the same on all ranks.
        """
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                return
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, part: Part, arrival: Arrival, facts: Facts) -> None:
        try:
            arrival.synchronize()
            self._write(part, facts)
        except BaseException as error:
            self._error = error
            self.on_failure()
        finally:
            self.memory.give(list(part.pieces.values()))

    def _write(self, part: Part, facts: Facts) -> None:
        publish(self.root, part, facts, self.world, logs=self.logs, reads_back=self.reads_back)
        remove_old(self.root, self.retention, self.world, self.losses)


def _copy(pieces: Mapping[str, Tensor], memory: HostMemory) -> tuple[dict[str, Tensor], Arrival]:
    """Copies of pieces in the host's memory, under way."""
    buffers = {path: memory.take(values) for path, values in pieces.items()}
    arrival = memory.copy([(buffers[path], values) for path, values in pieces.items()])
    arrival.wait()  # the device's next update is behind it
    return buffers, arrival
