"""How much of a step ranks wait for each other, on real ranks over gloo whose transport is slowed, and as planned.

    python benchmarks/communication.py                            # 4 ranks, minutes
    python benchmarks/communication.py --share 0.3 --layers 4 --rounds 3

The model computes in bfloat16 and sums gradients in float32, all blocks again in the backward; most of it is text.
Collectives take their bytes on the wire (ring algorithms) / a rate, beside the computation, those of one process
group one after the other; a rank that waits sleeps. The rate is such that the sums of a step's gradients take
`--share` of the time that a step takes without delays. Orders: "waited for", nothing runs ahead or behind; "gathers
ahead", the next block's weights; "and sums behind", two blocks' gradients as well. All are in one run, step by step
in turn, and give the same losses. "exposed": of the planned calls of collectives, those waited for without work
between.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from memory import config, real_batch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from mmfn import models
from mmfn.parallel.mesh.axis import Group
from mmfn.parallel.mesh.layout import Layout, Mesh, distributed_mesh
from mmfn.parallel.planning.time_model import wire_bytes
from mmfn.parallel.planning.trace import Trace
from mmfn.parallel.program import Program, Transform, pipe
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.precision import precision
from mmfn.parallel.transforms.remat import remat
from mmfn.parallel.weights.sharding import shard_params
from mmfn.spec import init_params
from mmfn.train import optim
from mmfn.train.planning import step_trace, workload
from mmfn.train.schedule import schedule
from mmfn.train.step import init_state, make_step

ORDERS = {
    "waited for": data_parallel(prefetch=False, sums_under_way=0),
    "gathers ahead": data_parallel(sums_under_way=0),
    "and sums behind": data_parallel(),
}


@dataclass(eq=False)
class Slowed:
    """The transport of a process group, as slow as `rate` bytes a second."""

    inner: Group
    rate: float  # bytes a second; 0: as fast as it is
    free: dict[str, float] = field(default_factory=dict)  # by group: when it has sent all it was given
    ready: dict[int, float] = field(default_factory=dict)  # by result

    @property
    def name(self) -> str:
        """See `Transport`."""
        return self.inner.name

    @property
    def widest(self) -> torch.dtype:
        """See `Transport`."""
        return self.inner.widest

    @property
    def is_traceable(self) -> bool:
        """See `Transport`."""
        return False

    def all_gather(self, x: Tensor, site: str) -> Tensor:
        """See `Transport`."""
        return self._note("all_gather", x, self.inner.all_gather(x, site))

    def reduce_scatter(self, x: Tensor, site: str) -> Tensor:
        """See `Transport`."""
        return self._note("reduce_scatter", x, self.inner.reduce_scatter(x, site))

    def all_reduce(self, x: Tensor, site: str) -> Tensor:
        """See `Transport`."""
        return self._note("all_reduce", x, self.inner.all_reduce(x, site))

    def all_to_all(self, x: Tensor, out_sizes: Sequence[int], in_sizes: Sequence[int], site: str) -> Tensor:
        """See `Transport`."""
        return self._note("all_to_all", x, self.inner.all_to_all(x, out_sizes, in_sizes, site))

    def shift(self, x: Tensor, out_sizes: Sequence[int], in_sizes: Sequence[int], site: str) -> Tensor:
        """See `Transport`."""
        return self._note("shift", x, self.inner.shift(x, out_sizes, in_sizes, site))

    def wait(self, x: Tensor) -> Tensor:
        """See `Transport`."""
        ready = self.ready.pop(x.data_ptr(), 0.0)
        out = self.inner.wait(x)
        time.sleep(max(0.0, ready - time.perf_counter()))
        return out

    def _note(self, op: str, x: Tensor, out: Tensor) -> Tensor:
        group = self.inner.scatters or self.inner.name if op == "reduce_scatter" else self.inner.name
        start = max(time.perf_counter(), self.free.get(group, 0.0))
        self.free[group] = start + (wire_bytes(op, x.nbytes, self.inner.size) / self.rate if self.rate else 0.0)
        self.ready[out.data_ptr()] = self.free[group]
        return out


def slowed(mesh: Mesh, rate: float) -> Mesh:
    """The mesh with slow transports."""
    axes = {}
    for name, axis in mesh.axes.items():
        assert axis.transport is None or isinstance(axis.transport, Group)
        axes[name] = axis if axis.transport is None else replace(axis, transport=Slowed(axis.transport, rate))
    return replace(mesh, axes=axes)


def make_setup(order: str, args: argparse.Namespace) -> step_trace.PlannedStep:
    """The step of an order, of a batch with an image."""
    hf = config(args.width, args.layers)
    hf["text_config"]["vocab_size"] = args.vocabulary
    hf["vision_config"]["depth"] = args.tower_layers
    family = models.family(hf["model_type"])
    transforms: list[Transform] = [ORDERS[order], remat("full"), precision(compute=torch.bfloat16)]
    return step_trace.PlannedStep(
        family=family,
        cfg=family.config_from_hf(hf),
        build=lambda cfg, mesh: pipe(Program.of(family.specs(cfg), mesh=mesh), *transforms),
        optimizer=optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(weight_decay=0.1)),
        workload=workload.Workload(tokens=args.tokens, sample_tokens=min(1024, args.tokens)),
    )


def real_step(setup: step_trace.PlannedStep, mesh: Mesh) -> Callable[[], float]:
    """A function that takes one step and returns its loss."""
    program = setup.build(setup.cfg, mesh)
    rate = schedule("constant", peak=1e-4, num_steps=1)
    step = make_step(setup.family, setup.cfg, program, setup.objective, setup.optimizer, schedule=rate)
    params = shard_params(init_params(program.specs, 0), program.specs, mesh)
    state = init_state(params, setup.optimizer, program.specs)
    batch = real_batch(setup, torch.device("cpu"))

    def run() -> float:
        nonlocal state
        state, metrics = step(state, [batch])
        return float(metrics["loss"])

    return run


def measure(rank: int, folder: str, args: argparse.Namespace) -> None:
    """On every rank: seconds of every step by order; those of rank 0 are written down."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=args.ranks)
    try:
        plain = distributed_mesh(Layout(dp=args.ranks))
        alone = real_step(make_setup("waited for", args), slowed(plain, 0.0))
        seconds = [_timed(alone)[0] for _ in range(args.rounds + 1)][1:]
        mean = plain["world"].all_reduce(torch.tensor(seconds), "seconds").median().item() / args.ranks
        mesh = slowed(plain, sums_bytes(args) / (args.share * mean))
        steps = {order: real_step(make_setup(order, args), mesh) for order in ORDERS}
        found: dict[str, list[float]] = {"without delays": seconds} | {order: [] for order in ORDERS}
        for number in range(args.rounds + 1):  # the first is not counted
            losses = set()
            for order, step in steps.items():
                seconds_of, loss = _timed(step)
                losses.add(loss)
                found[order] += [seconds_of] * (number > 0)
            assert len(losses) == 1, f"orders give different losses: {losses}"
        if rank == 0:
            torch.save(found, Path(folder) / "found.pt")
    finally:
        dist.destroy_process_group()


def _timed(step: Callable[[], float]) -> tuple[float, float]:
    """Seconds of a step that all ranks begin together, and its loss."""
    dist.barrier()
    start = time.perf_counter()
    loss = step()
    return time.perf_counter() - start, loss


def sums_bytes(args: argparse.Namespace) -> float:
    """What the sums of a step's gradients put on the wire."""
    trace = planned("waited for", args)
    sent = sum(n for key, n in trace.sent_bytes.items() if key.op == "reduce_scatter")
    return wire_bytes("reduce_scatter", sent, args.ranks)


def planned(order: str, args: argparse.Namespace) -> Trace:
    """The trace of an order."""
    return step_trace.trace_step(make_setup(order, args), Layout(dp=args.ranks), args.layers)


def exposed(order: str, args: argparse.Namespace) -> str:
    """Planned calls that are waited for without work, of all."""
    trace = planned(order, args)
    return f"{sum(trace.exposed.values())} of {sum(trace.count.values())}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=12, help="of the text")
    parser.add_argument("--tower-layers", type=int, default=2, help="as small a part as in a published model")
    parser.add_argument("--tokens", type=int, default=1024, help="a rank")
    parser.add_argument("--vocabulary", type=int, default=1024, help="as small a part as in a model of 30B or more")
    parser.add_argument("--share", type=float, default=0.7, help="sums of gradients to a step without delays")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        spawn(measure, (folder, args), args.ranks)  # type: ignore[no-untyped-call]
        found: dict[str, Any] = torch.load(Path(folder) / "found.pt")
    first = statistics.median(found["gathers ahead"])
    print(f"{'order':<18}{'step':>9}{'ratio':>8}  exposed calls")
    for order, times in found.items():
        seconds = statistics.median(times)
        waits = exposed(order, args) if order in ORDERS else ""
        print(f"{order:<18}{seconds:>8.2f}s{seconds / first:>8.2f}  {waits}")


if __name__ == "__main__":
    main()
