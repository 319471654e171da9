"""Writing a Hugging Face checkpoint on several ranks: each its shards, against the first one that has it all. Linux.

    python benchmarks/exporting.py                     # about 0.5 GiB in bfloat16, 4 gloo ranks, dp 4 x ep 2
    python benchmarks/exporting.py --scale 2           # about 2 GiB

Models as in `loading.py`: experts stored one by one (glm4v_moe), or fused and transposed (qwen3_vl_moe), whose rows
ranks exchange before they write them. CPU: seconds of all ranks together. Memory: the most a rank has of its own above
what it had before; its shards are there already. Both are durable when they end (fsync of files and folders).
"""

import argparse
import gc
import json
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from loading import MIB, PAUSE_S, RANKS, STORED, anon_mib, config_of, write
from safetensors.torch import save_file
from torch.multiprocessing.spawn import spawn

from mmfn import tree
from mmfn.interop import export
from mmfn.interop.hf import checkpoint_contents
from mmfn.interop.weight_files import sync
from mmfn.model import Model
from mmfn.parallel.mesh.launch import Place
from mmfn.parallel.mesh.layout import Layout, distributed_mesh
from mmfn.parallel.weights.sharding import local, whole_on_host
from mmfn.train.build.shards import load_shards
from mmfn.train.run.save import shard_pieces, writers_of


def save_whole(out: Path, model: Model, place: Place) -> None:
    """The first rank gathers the model in its memory, and writes it."""
    params = whole_on_host(model.params, place.mesh, is_kept=place.is_first)
    if place.is_first:
        leaves, names = dict(tree.items(params)), model.family.key_map(model.cfg)
        disk = names.disk_tensors(model.family.specs(model.cfg))
        out.mkdir()
        save_file({n: t.to_disk(leaves[t.path]).contiguous() for n, t in disk.items()}, out / "model.safetensors")
        sync(out / "model.safetensors")
        sync(out)
    dist.barrier()


def save_slices(out: Path, model: Model, place: Place) -> None:
    """Every rank writes its shards."""
    what = checkpoint_contents(model)
    export.save(out, what, shard_pieces(model.params, what, place), writers_of(place.host["world"], out))


HOW = {"whole": save_whole, "slices": save_slices}


def run_rank(rank: int, folder: str, how: str, ep: int, result: str) -> None:
    """One rank. What it took is JSON in the folder `result`; while it saves there is a file of its number there."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{result}/store", rank=rank, world_size=RANKS)
    mesh = distributed_mesh(Layout(dp=RANKS, ep=ep))
    place = Place(device=torch.device("cpu"), mesh=mesh, host=mesh)
    model = load_shards(config_of(folder), place)
    mark = Path(result) / str(rank)
    gc.collect()
    dist.barrier()
    before = anon_mib(os.getpid())
    mark.touch()
    time.sleep(4 * PAUSE_S)
    wall, cpu = time.perf_counter(), time.process_time()
    HOW[how](Path(result) / "out", model, place)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    dist.barrier()
    mark.unlink()
    leaves = tree.leaves(model.params)
    share, leaf = sum(local(x).nbytes for x in leaves), max(x.numel() * x.element_size() for x in leaves)
    found = {"before": before, "wall": wall, "cpu": cpu, "share": share / MIB, "leaf": leaf / MIB}
    (Path(result) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measure(folder: Path, how: str, ep: int) -> list[dict[str, float]]:
    """What each rank took."""
    with tempfile.TemporaryDirectory() as result:
        ranks = spawn(run_rank, (str(folder), how, ep, result), RANKS, join=False)  # type: ignore[no-untyped-call]
        peaks = [0.0] * RANKS
        while not ranks.join(timeout=PAUSE_S):
            for rank, pid in enumerate(ranks.pids()):
                if (Path(result) / str(rank)).exists():
                    peaks[rank] = max(peaks[rank], anon_mib(pid))
        found = [json.loads((Path(result) / f"{rank}.json").read_text()) for rank in range(RANKS)]
    return [{**one, "peak": peak - one["before"]} for one, peak in zip(found, peaks, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=1, help="factor of all widths")
    parser.add_argument("--ep", type=int, default=2, help="ranks over which experts lie")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind, of which the best counts")
    args = parser.parse_args()
    print(f"{'experts':18}{'how':8}  share  leaf  most above   CPU s  wall s  ratio")
    for stored, name in STORED.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = write(Path(scratch) / "checkpoint", name, args.scale)
            rounds = {how: [measure(folder, how, args.ep) for _ in range(args.rounds)] for how in HOW}
        cpu = {how: min(sum(one["cpu"] for one in ranks) for ranks in runs) for how, runs in rounds.items()}
        for how, runs in rounds.items():
            most = max(one["peak"] for ranks in runs for one in ranks)
            wall = min(max(one["wall"] for one in ranks) for ranks in runs)
            share, leaf = (max(one[key] for one in runs[0]) for key in ("share", "leaf"))
            print(
                f"{stored:18}{how:8}{share:7.1f}{leaf:6.1f}{most:12.1f}{cpu[how]:8.2f}{wall:8.2f}"
                f"{cpu[how] / cpu['whole']:7.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
