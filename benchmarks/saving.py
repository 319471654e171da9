"""Saving the state of a run on several ranks: ours against torch.distributed.checkpoint, in one interleaved run. Linux.

    python benchmarks/saving.py                      # about 0.8 GiB of state, 4 gloo ranks, dp 4 x ep 2, 5 rounds

bfloat16 parameters with experts, float32 copies and two moments. Both write to new folders and sync files; ours also
digests what it writes and syncs folders. CPU: seconds of all ranks and their threads together. Blocked: wall-clock time
of the call, on the slowest rank. Lost: steps of a loop that the run is behind when the save is durable, by the time of
steps without a save in the same round; a step computes, and sums over ranks. Before each save a file of its size is
written and deleted: on a virtual machine the first touch of memory may cost more than all the rest.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_saver as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.multiprocessing.spawn import spawn

import mmfn
from mmfn import tree
from mmfn.parallel.mesh.layout import Layout, Mesh, distributed_mesh
from mmfn.parallel.weights.sharding import local, shard_params
from mmfn.train.checkpoint import Facts, Retention, Saver, save
from mmfn.train.optim import adamw, master
from mmfn.train.step import State, init_state
from tests.tiny import TINY

RANKS, BLOCKS = 4, 6
WIDTHS = {"vocab_size": 16_384, "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 512}
STEP_ROWS, PLAIN_STEPS = 384, 12
KINDS = ("ours", "DCP", "ours, asynchronous", "DCP, asynchronous")


def state_on(mesh: Mesh) -> State:
    """The state of a tiny model that has been widened."""
    hf_config = TINY["moe"](BLOCKS)
    hf_config["text_config"] |= WIDTHS | {"num_experts": 8}
    hf_config["vision_config"]["out_hidden_size"] = WIDTHS["hidden_size"]
    model = mmfn.init(hf_config, dtype=torch.bfloat16)
    specs = model.family.specs(model.cfg)
    return init_state(shard_params(model.params, specs, mesh), master(adamw()), specs)


class Rank:
    """What one rank measures."""

    def __init__(self, root: Path) -> None:
        self.mesh = distributed_mesh(Layout(dp=RANKS, ep=2))
        self.state, self.root, self.count = state_on(self.mesh), root, 0
        self.x, self.total = torch.randn(STEP_ROWS, STEP_ROWS), torch.zeros(1)
        self.saver = Saver(root=root, world=self.mesh["saves"], retention=Retention(num_newest=1))
        options = StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
        self.stager = DefaultStager(options)  # keeps its buffers, as ours does
        self.group = dist.new_group(backend="gloo")
        self.leaves = dict(tree.items(self.state))
        self.share = sum(local(leaf).nbytes for leaf in self.leaves.values())

    def new_folder(self) -> Path:
        self.count += 1
        return self.root / f"dcp_{self.count}"

    def touch(self) -> None:
        """Let the machine have as much memory for files as a save takes."""
        path, block = self.root / f"touched_{self.mesh['world'].index}", bytes(8 << 20)
        with open(path, "wb") as file:
            for _ in range(self.share >> 22):  # twice
                file.write(block)
        path.unlink()

    def step(self) -> None:
        for _ in range(8):
            self.x = torch.tanh(self.x @ self.x / STEP_ROWS)
        self.mesh["world"].all_reduce(self.total, "step")

    def save(self, kind: str) -> Callable[[], bool]:
        """Begin a save; what is returned says whether it is durable."""
        if kind == "DCP":
            dcp.save(self.leaves, storage_writer=FileSystemWriter(self.new_folder()), process_group=self.group)
        elif kind == "ours":
            self.count += 1
            save(self.root, self.state, Facts(step=self.count), self.mesh["saves"])
        elif kind == "DCP, asynchronous":
            writer = FileSystemWriter(self.new_folder())
            begun = dcp.async_save(
                self.leaves, storage_writer=writer, process_group=self.group, async_stager=self.stager
            )
            return (begun.upload_completion if isinstance(begun, dcp.AsyncSaveResponse) else begun).done
        else:
            self.count += 1
            self.saver(self.state, Facts(step=self.count))
            return lambda: self.saver._thread is None or not self.saver._thread.is_alive()
        return lambda: True

    def measure(self, kind: str) -> dict[str, float]:
        """One save of a kind, with steps before it and beside it."""
        begun = time.perf_counter()
        for _ in range(PLAIN_STEPS):
            self.step()
        step_s = (time.perf_counter() - begun) / PLAIN_STEPS
        self.touch()
        dist.barrier()
        cpu, begun = time.process_time(), time.perf_counter()
        is_durable = self.save(kind)
        blocked, in_call, steps, waits = time.perf_counter() - begun, time.process_time() - cpu, 0, True
        while "asynchronous" in kind and waits:
            self.step()
            steps += 1
            waits = bool(self.mesh["world"].all_reduce(torch.tensor([0.0 if is_durable() else 1.0]), "done").item())
        taken = time.perf_counter() - begun
        cpu = time.process_time() - cpu
        if kind == "ours, asynchronous":
            self.saver.wait()
        dist.barrier()
        if dist.get_rank() == 0:
            for folder in (*self.root.glob("dcp_*"), *self.root.glob("iter_*")):
                shutil.rmtree(folder)
            os.sync()
        dist.barrier()
        return {"cpu": cpu, "call": in_call, "blocked": blocked, "taken": taken, "lost": taken / step_s - steps}


def run_rank(rank: int, root: str, rounds: int, result: str) -> None:
    """One rank; its figures are JSON in the folder `result`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{result}/store", rank=rank, world_size=RANKS)
    one = Rank(Path(root))
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for number in range(rounds + 1):  # the first warms up
        for kind in KINDS:
            figures = one.measure(kind)
            found[kind] += [figures] if number else []
    (Path(result) / f"{rank}.json").write_text(json.dumps({"figures": found, "share": one.share / 2**20}))
    dist.barrier()
    dist.destroy_process_group()


def summary(ranks: list[dict[str, Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Medians over rounds: CPU summed over ranks, wall-clock time of the slowest."""
    ways: dict[str, Callable[[list[float]], float]] = {
        "cpu": sum,
        "call": sum,
        "blocked": max,
        "taken": max,
        "lost": max,
    }
    return {
        kind: {
            name: statistics.median(way([r["figures"][kind][i][name] for r in ranks]) for i in range(rounds))
            for name, way in ways.items()
        }
        for kind in KINDS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to save; default: the folder for temporary files")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as root, tempfile.TemporaryDirectory() as result:
        spawn(run_rank, (root, args.rounds, result), RANKS)  # type: ignore[no-untyped-call]
        ranks = [json.loads((Path(result) / f"{rank}.json").read_text()) for rank in range(RANKS)]
    found = summary(ranks, args.rounds)
    print(f"{ranks[0]['share']:.0f} MiB a rank, {RANKS} ranks, median of {args.rounds} rounds")
    print("| | CPU s | of these in the call | blocked, s | until durable, s | steps lost |\n|---|---|---|---|---|---|")
    for kind, row in found.items():
        cells = [f"{row[name]:.2f}" for name in ("cpu", "call", "blocked", "taken")]
        print(f"| {' | '.join([kind, *cells])} | {row['lost']:.1f} |")
    ours, theirs, beside, beside_theirs = (found[kind] for kind in KINDS)
    print(f"CPU of ours / DCP: {ours['cpu'] / theirs['cpu']:.2f} (bar 0.7)")
    print(f"blocked, asynchronous / not: {beside['blocked'] / ours['blocked']:.3f} (bar 0.1)")
    print(f"CPU in the call, asynchronous / not: {beside['call'] / ours['call']:.3f}")
    print(f"steps lost of ours / DCP, asynchronous: {beside['lost'] / beside_theirs['lost']:.2f} (bar 0.5)")


if __name__ == "__main__":
    main()
