"""Loading a checkpoint on several ranks: each its shards, against each reading all and cutting. Linux.

    python benchmarks/loading.py                     # about 0.5 GiB in bfloat16, 4 gloo ranks, dp 4 x ep 2
    python benchmarks/loading.py --scale 2           # about 2 GiB

Checkpoints of random weights, experts stored one by one (glm4v_moe) or fused and transposed (qwen3_vl_moe), the
files in the page cache. CPU: seconds of all ranks together. Memory: the most a rank has of its own (RssAnon, looked at
from outside every few milliseconds; mapped files are no part of it) above what it had before and above its shards.
"""

import argparse
import gc
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

import mmfn
from mmfn import tree
from mmfn.parallel.mesh.launch import Place
from mmfn.parallel.mesh.layout import Layout, distributed_mesh
from mmfn.parallel.weights.sharding import local, shard_params
from mmfn.train.build.model import find_family, model_specs
from mmfn.train.build.shards import load_shards
from mmfn.train.config.schema import Config
from tests.tiny import TINY
from tests.train.whole_model import load_model

MIB = 2**20
RANKS = 4
PAUSE_S = 0.003
STORED = {"one by one": "glm", "fused, transposed": "moe"}
BLOCKS, NUM_EXPERTS, EXPERT_KEYS = 16, 32, ("num_experts", "n_routed_experts")
WIDTHS = {"vocab_size": 16_384, "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 320}


def write(folder: Path, name: str, scale: int) -> Path:
    """A checkpoint of a tiny model that has been widened."""
    hf_config = TINY[name](BLOCKS)
    text, vision = hf_config["text_config"], hf_config["vision_config"]
    text |= {key: scale * value for key, value in WIDTHS.items() if key in text}
    text |= {key: NUM_EXPERTS for key in EXPERT_KEYS if key in text}
    vision["out_hidden_size"] = text["hidden_size"]
    mmfn.save_hf(folder, mmfn.init(hf_config, dtype=torch.bfloat16), max_shard_bytes=200 * MIB)
    return folder


def config_of(folder: str) -> Config:
    """What a run says of the checkpoint in a folder."""
    return Config.model_validate(
        {
            "model": {"path": folder, "dtype": "bfloat16"},
            "data": {"train": "unused", "batch_samples": 1, "token_buckets": [8], "tower_buckets": {}},
            "optimizer": {"lr": 1.0},
            "train": {"steps": 1},
            "output": {"path": "unused"},
        }
    )


def load(how: str, config: Config, place: Place) -> mmfn.Model:
    """This rank's shards."""
    if how == "slices":
        return load_shards(config, place)
    model: mmfn.Model = load_model(config.model, config.train.seed)
    specs = model_specs(config, model.family, model.cfg)
    return replace(model, params=shard_params(model.params, specs, place.mesh))


def run_rank(rank: int, folder: str, how: str, ep: int, result: str) -> None:
    """One rank. What it took is JSON in the folder `result`; while it loads there is a file of its number there."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{result}/store", rank=rank, world_size=RANKS)
    mesh = distributed_mesh(Layout(dp=RANKS, ep=ep))
    place = Place(device=torch.device("cpu"), mesh=mesh, host=mesh)
    config = config_of(folder)
    find_family(config.model)  # as a run does before: imports the family
    mark = Path(result) / str(rank)
    gc.collect()
    dist.barrier()
    before = anon_mib(os.getpid())
    mark.touch()
    time.sleep(4 * PAUSE_S)
    wall, cpu = time.perf_counter(), time.process_time()
    model = load(how, config, place)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    dist.barrier()
    mark.unlink()
    leaves = tree.leaves(model.params)
    found = {
        "before": before,
        "wall": wall,
        "cpu": cpu,
        "share": sum(local(leaf).nbytes for leaf in leaves) / MIB,
        "leaf": max(leaf.numel() * leaf.element_size() for leaf in leaves) / MIB,
    }
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


def anon_mib(pid: int) -> float:
    """Memory of a process that is no file's, in MiB."""
    return int(Path(f"/proc/{pid}/status").read_text().split("RssAnon:")[1].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=1, help="factor of all widths")
    parser.add_argument("--ep", type=int, default=2, help="ranks over which experts lie")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind, of which the best counts")
    args = parser.parse_args()
    print(f"{'experts':18}{'how':8}   MiB  share  leaf  above share   CPU s  wall s  ratio")
    for stored, name in STORED.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = write(Path(scratch) / "checkpoint", name, args.scale)
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / MIB
            rounds = {how: [measure(folder, how, args.ep) for _ in range(args.rounds)] for how in ("whole", "slices")}
        cpu = {how: min(sum(one["cpu"] for one in ranks) for ranks in runs) for how, runs in rounds.items()}
        for how, runs in rounds.items():
            most = max(one["peak"] - one["share"] for ranks in runs for one in ranks)
            wall = min(max(one["wall"] for one in ranks) for ranks in runs)
            share, leaf = (max(one[key] for one in runs[0]) for key in ("share", "leaf"))
            print(
                f"{stored:18}{how:8}{size:6.0f}{share:7.1f}{leaf:6.1f}{most:13.1f}{cpu[how]:8.2f}{wall:8.2f}"
                f"{cpu[how] / cpu['whole']:7.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
