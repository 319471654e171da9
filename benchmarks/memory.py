"""Peak memory of one training step under each memory policy, planned and measured, on one program.

    python benchmarks/memory.py                          # CPU, some minutes
    python benchmarks/memory.py --device cuda --tokens 8192 --width 1024
    python benchmarks/memory.py --policies none full "offload activations"

The program is a vision-language model with clip and AdamW in float32, on one device. Planned: the peak of a traced step
without values (`mmfn.train.planning.step_plan`). Measured: on the CPU the events of torch's allocator in a later step,
the host's buffers, which exist by then, left out; on an accelerator the most bytes allocated. State and batch count.
"saved" is against the policy "none", and "host" what lies there. Time is the median step against that of "none"; on the
CPU a copy to the host is a copy from memory to memory that nothing overlaps with. With `--figures FILE`, of mmfn
calibrate, the seconds of a step are printed too, measured and predicted.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mmfn import models, tree
from mmfn.batch import Batch
from mmfn.batch import to as batch_to
from mmfn.parallel.mesh.layout import Layout, single_mesh
from mmfn.parallel.planning.time_model import predict
from mmfn.parallel.program import Program, Transform, pipe
from mmfn.parallel.transforms.offload import offload
from mmfn.parallel.transforms.remat import remat
from mmfn.spec import init_params
from mmfn.train import optim
from mmfn.train.planning import step_trace, workload
from mmfn.train.planning.device_file import planned_device
from mmfn.train.schedule import schedule
from mmfn.train.step import init_state, make_step

MIB = 2**20


@dataclass(frozen=True)
class Policy:
    """Transforms of the program, and what of the optimizer's state and parameters lies on the host."""

    transforms: tuple[Transform, ...] = ()
    on_host: tuple[str, ...] = ()


POLICIES = {
    "none": Policy(),
    "full": Policy((remat("full"),)),
    "selective, attention": Policy((remat("selective", save=("attention",)),)),
    "selective, attention and matmul": Policy((remat("selective", save=("attention", "matmul")),)),
    "uniform 2": Policy((remat("uniform", num_layers=2),)),
    "uniform 4": Policy((remat("uniform", num_layers=4),)),
    "block 4": Policy((remat("block", num_layers=4),)),
    "full, every 2": Policy((remat("full", every=2),)),
    "full, vision": Policy((remat("full", where="vision"),)),
    "full, text": Policy((remat("full", where="text"),)),
    "offload activations": Policy((offload("activations"),)),
    "offload activations, full": Policy((offload("activations"), remat("full"))),
    "offload optimizer": Policy(on_host=("optimizer",)),
    "offload optimizer, full": Policy((remat("full"),), on_host=("optimizer",)),
    "offload both, full": Policy((offload("activations"), remat("full")), on_host=("optimizer",)),
    "offload parameters": Policy((offload("parameters"),), on_host=("parameters",)),
    "offload parameters, full": Policy((offload("parameters"), remat("full")), on_host=("parameters",)),
    "offload all, full": Policy(
        (offload("activations"), offload("parameters"), remat("full")), on_host=("optimizer", "parameters")
    ),
}


def config(width: int, num_layers: int) -> dict[str, Any]:
    """A config.json: a decoder and a tower of half its width, equally deep."""
    heads = width // 64
    return {
        "model_type": "qwen3_vl",
        "image_token_id": 1,
        "video_token_id": 2,
        "tie_word_embeddings": False,
        "text_config": {
            "vocab_size": 8192,
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": num_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 2),
            "head_dim": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [12, 10, 10]},
        },
        "vision_config": {
            "depth": num_layers,
            "hidden_size": width // 2,
            "intermediate_size": 2 * width,
            "num_heads": max(1, heads // 2),
            "patch_size": 16,
            "out_hidden_size": width,
            "num_position_embeddings": 196,
            "deepstack_visual_indexes": [1],
        },
    }


def make_setup(policy: Policy, args: argparse.Namespace) -> step_trace.PlannedStep:
    """The step of a policy."""
    hf = config(args.width, args.layers)
    family = models.family(hf["model_type"])
    adamw = optim.adamw(weight_decay=0.1)
    device = torch.device(args.device)
    away = policy.on_host
    writer = optim.on_host(adamw, args.group_values, what=away, device=device) if away else adamw
    return step_trace.PlannedStep(
        family=family,
        cfg=family.config_from_hf(hf),
        build=lambda cfg, mesh: pipe(Program.of(family.specs(cfg), mesh=mesh), *policy.transforms),
        optimizer=optim.chain(optim.clip_by_global_norm(1.0), writer),
        workload=workload.Workload(tokens=args.tokens, sample_tokens=min(1024, args.tokens), image_side=16),
    )


def real_step(setup: step_trace.PlannedStep, device: torch.device) -> tuple[Callable[[], None], Callable[[], int]]:
    """A function that takes one step, and one that counts the bytes of state and batch on the device."""
    program = setup.build(setup.cfg, single_mesh())
    rate = schedule("constant", peak=1e-4, num_steps=1)
    step = make_step(setup.family, setup.cfg, program, setup.objective, setup.optimizer, schedule=rate)
    where = "cpu" if program.weights.is_hosted else device
    state = init_state(init_params(program.specs, 0, device=where), setup.optimizer, device=device)
    batch = real_batch(setup, device)

    def run() -> None:
        nonlocal state
        state, metrics = step(state, [batch])
        metrics["loss"].item()

    def held() -> int:
        away = setup.optimizer.on_host
        opt = [x for x in tree.leaves(state["opt"]) if not ("optimizer" in away and x.ndim)]
        params = [] if "parameters" in away else state["params"]
        storages = {x.untyped_storage() for x in tree.leaves([{**state, "opt": opt, "params": params}, batch])}
        return sum({x._cdata: x.nbytes() for x in storages}.values())

    return run, held


def real_batch(setup: step_trace.PlannedStep, device: torch.device) -> Batch:
    """The batch that is planned, with pixels."""
    batch = workload.make_batch(setup.family, setup.cfg, setup.workload, 1)
    g = torch.Generator().manual_seed(0)
    towers = {n: replace(t, inputs_UF=torch.randn(t.inputs_UF.shape, generator=g)) for n, t in batch.towers.items()}
    return batch_to(replace(batch, towers=towers), device)


def measured_peak(run: Callable[[], None], held: Callable[[], int], device: torch.device) -> int:
    """The most bytes on the device in one step."""
    run()  # makes the host's buffers
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        run()
        return torch.accelerator.max_memory_allocated()
    before = held()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    alive, most = 0, 0
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return before + most


def step_time(run: Callable[[], None], rounds: int) -> float:
    """The median of `rounds` steps, in seconds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def rows(names: Sequence[str], args: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """One line per policy; one is in memory at a time."""
    device = torch.device(args.device)
    first: tuple[int, int, float] | None = None
    for name in names:
        setup = make_setup(POLICIES[name], args)
        step_trace.trace_step(setup, Layout(), args.layers)  # fills caches, which would count as memory
        trace = step_trace.trace_step(setup, Layout(), args.layers)
        run, held = real_step(setup, device)
        planned, measured = trace.peak.total, measured_peak(run, held, device)
        seconds = step_time(run, args.rounds)
        first = first or (planned, measured, seconds)
        sizes = (planned, measured, first[0] - planned, first[1] - measured, trace.host_bytes)
        error, ratio = f"{measured / planned - 1:+.2%}", f"{seconds / first[2]:.2f}"
        spent: tuple[str, ...] = ()
        if args.figures is not None:
            here, stashed, hosted = planned_device(args.figures), trace.stashed_bytes, trace.hosted_bytes
            predicted = predict(trace.account, [], here, stashed_bytes=stashed, hosted_bytes=hosted).total_s
            spent = (f"{seconds:.3f}", f"{predicted:.3f}", f"{predicted / seconds:.2f}")
        yield (name, *(f"{n / MIB:,.1f}" for n in sizes), error, ratio, *spent)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=256, help="of the decoder, a multiple of 128")
    parser.add_argument("--layers", type=int, default=8, help="blocks of the decoder and of the tower")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--group-values", type=int, default=2**20, help="values of an optimizer's group on the device")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=list(POLICIES), metavar="NAME")
    parser.add_argument("--figures", metavar="FILE", help="of this machine, by mmfn calibrate: predict seconds too")
    args = parser.parse_args()
    names = ["none", *(name for name in args.policies if name != "none")]
    head: tuple[str, ...]
    head = ("policy", "planned MiB", "measured", "saved, planned", "measured", "host MiB", "error", "time")
    head += ("seconds", "predicted", "ratio") if args.figures is not None else ()
    for row in chain([head], rows(names, args)):
        cells = [cell.rjust(max(len(title), 8)) for cell, title in zip(row[1:], head[1:], strict=True)]
        print(row[0].ljust(max(map(len, POLICIES))), *cells, sep="  ", flush=True)


if __name__ == "__main__":
    main()
