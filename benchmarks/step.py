"""A whole training step, mmfn against transformers: the same weights and batches, one process, interleaved rounds.

    python benchmarks/step.py                                   # decoder, both shapes, 5 seeds, both allocators: long
    python benchmarks/step.py --shapes dense --seeds 1 --variants eager
    python benchmarks/step.py --sizes vlm qwen3_omni_moe --dtype bfloat16 --rounds 3

transformers: the family's model in train mode with its default attention, on padded rows, its own loss,
`clip_grad_norm_` and `AdamW(fused=True)`; compiled: `torch.compile(model)`. mmfn: one packed batch padded to a multiple
of 256 tokens and 64 rows of a tower, `make_step` with clip and AdamW; compiled: "layer" and "step". First losses agree.

Shapes: `sft`, 8 rows with lengths log-uniform from 64 to 1,024 and the last third of each supervised; `dense`, 4 rows
of 512, every token supervised. Sizes: those of `families.py`, which draws models and rows: `decoder`, 29 M parameters
with no images; `vlm`, the same behind a tower, and so each family by its model type; `tiny`, to try the script.

Every size, shape, seed and allocator gets a process of its own. A ratio is the median over rounds of time / time of
the other side in the same round. Memory is the resident high-water mark of one step above the level before it. The
"retained" allocator keeps freed memory (glibc mallopt), for both sides. Linux with glibc only.
"""

import argparse
import json
import math
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import families
import torch
from measure import in_a_process, peak_mib, seconds
from torch import Tensor

import mmfn
from mmfn import tree
from mmfn.batch import IGNORE, Batch
from mmfn.batch import to as batch_to
from mmfn.interop.inputs import samples_from_hf
from mmfn.packing import Sizes, num_units
from mmfn.parallel.program import Program, pipe
from mmfn.parallel.transforms.compiled import compiled
from mmfn.train.optim import adamw, chain, clip_by_global_norm
from mmfn.train.run.allocator import retain_freed_memory
from mmfn.train.schedule import schedule
from mmfn.train.step import init_state, make_step

BUCKET, ROWS = 256, 64  # packed tokens are padded to a multiple of the one, rows of a tower of the other
LR, DECAY, CLIP = 1e-4, 0.1, 1.0
VARIANTS = ("eager", "layer", "step")
Step = Callable[[], Tensor]  # runs one training step, returns its loss


def packed(inputs: dict[str, Tensor], model: Any, dtype: torch.dtype) -> Batch:
    """mmfn's batch: rows end to end, tokens and the rows of towers padded to the bucket."""
    samples, kinds = samples_from_hf(inputs, model), model.family.towers(model.cfg)
    units = {name: sum(num_units(s, kind) for s in samples) for name, kind in kinds.items()}
    sizes = Sizes(
        tokens=math.ceil(sum(s.tokens_T.numel() for s in samples) / BUCKET) * BUCKET,
        units={name: math.ceil(n * kinds[name].rows / ROWS) * ROWS // kinds[name].rows for name, n in units.items()},
    )
    return batch_to(model.family.pack(samples, model.cfg, sizes), "cpu", dtype)


def floats(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The inputs as transformers' model takes them."""
    return {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}


def transformers_step(model: Any, inputs: dict[str, Tensor], is_compiled: bool) -> Step:
    """Forward, backward, clip, AdamW, as its users write it. Without padding there is no mask to give."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=DECAY, fused=True)
    forward = torch.compile(model) if is_compiled else model
    if bool(inputs["attention_mask"].all()):
        inputs = {k: v for k, v in inputs.items() if k != "attention_mask"}

    def step() -> Tensor:
        loss: Tensor = forward(**inputs, use_cache=False).loss
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def mmfn_step(model: Any, params: Any, batch: Batch, kind: str) -> Step:
    """The same in mmfn."""
    optimizer = chain(clip_by_global_norm(CLIP), adamw(weight_decay=DECAY))
    program = pipe(Program.of(model.family.specs(model.cfg)), compiled(kind))
    rate = schedule("constant", peak=LR, num_steps=1)
    run = make_step(model.family, model.cfg, program, "per_token_loss", optimizer, schedule=rate)
    state = init_state(params, optimizer)

    def step() -> Tensor:
        nonlocal state
        state, metrics = run(state, [batch])
        return metrics["loss"]

    return step


def build(args: argparse.Namespace) -> tuple[dict[str, Step], dict[str, float]]:
    """Every variant from the same weights and the same batch, and facts about the batch."""
    dtype = getattr(torch, args.dtype)
    cfg = families.config(args.sizes[0])
    model = mmfn.init(cfg.to_dict(), seed=0, dtype=dtype)
    inputs = families.draw_inputs(args.sizes[0], args.shapes[0], args.seed, cfg)
    batch, inputs = packed(inputs, model, dtype), floats(inputs, dtype)
    steps: dict[str, Step] = {}
    for variant in args.variants:
        if variant != "step":
            theirs = families.library_class(args.sizes[0])._from_config(cfg, dtype=dtype).train()
            named = mmfn.to_hf(model.params, model, layout="transformers").items()
            theirs.load_state_dict({name: x.clone() for name, x in named}, assign=True)
            for parameter in theirs.parameters():
                parameter.requires_grad_()
            name = "hf eager" if variant == "eager" else "hf compiled"
            steps[name] = transformers_step(theirs, inputs, variant != "eager")
        kind = "none" if variant == "eager" else variant
        steps[f"mmfn {variant}"] = mmfn_step(model, tree.map(torch.clone, model.params), batch, kind)
    facts = {
        "padded": inputs["input_ids"].numel(),
        "bucket": batch.tokens_T.numel(),
        "supervised": int((batch.labels_T != IGNORE).sum()),
        "params": sum(x.numel() for x in tree.leaves(model.params)),
    }
    return steps, facts


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Times in seconds of every round and peak memory in MiB of every variant."""
    warnings.filterwarnings("ignore")
    if args.allocators[0] == "retained":
        retain_freed_memory()
    steps, facts = build(args)
    losses = {name: step().item() for name, step in steps.items()}  # also compiles
    tolerance = 1e-4 if args.dtype == "float32" else 3e-2
    if max(losses.values()) - min(losses.values()) > tolerance * abs(max(losses.values())):
        raise SystemExit(f"the first losses disagree: {losses}")
    memory = {name: peak_mib(step) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(args.rounds):
        for name in list(steps) if i % 2 == 0 else list(steps)[::-1]:
            times[name].append(seconds(steps[name]))
    return {"times": times, "memory": memory, "loss": max(losses.values()), **facts}


COMPARISONS = (
    ("mmfn eager", "hf eager"),
    ("mmfn layer", "hf eager"),
    ("mmfn layer", "hf compiled"),
    ("mmfn step", "hf eager"),
    ("mmfn step", "hf compiled"),
    ("hf compiled", "hf eager"),
)


def ratios(result: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """`"ours / theirs"` -> (median time ratio, memory ratio)."""
    times, memory = result["times"], result["memory"]
    return {
        f"{a} / {b}": (
            statistics.median(x / y for x, y in zip(times[a], times[b], strict=True)),
            memory[a] / memory[b],
        )
        for a, b in COMPARISONS
        if a in times and b in times
    }


def child(size: str, shape: str, seed: int, allocator: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one cell in a new process."""
    options = ["--sizes", size, "--shapes", shape, "--seed", str(seed), "--allocators", allocator]
    options += ["--dtype", args.dtype, "--rounds", str(args.rounds), "--variants", *args.variants]
    return in_a_process(__file__, options, is_verbose=args.verbose)


def main() -> None:
    """Measure every cell and print a table per cell, then the medians over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=families.SIZES, default=["decoder"])
    parser.add_argument("--shapes", nargs="+", choices=("sft", "dense"), default=["sft", "dense"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--allocators", nargs="+", choices=("default", "retained"), default=["default", "retained"])
    parser.add_argument("--seeds", type=int, default=5, help="batches of the sft shape; dense has one")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--verbose", action="store_true", help="show what the measuring processes write to stderr")
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args)))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.dtype}, {args.rounds} rounds")
    for size in args.sizes:
        for shape in args.shapes:
            for allocator in args.allocators:
                report(size, shape, allocator, args)


def report(size: str, shape: str, allocator: str, args: argparse.Namespace) -> None:
    """Print one line per seed and comparison, and the medians."""
    print(f"\n{size} {shape}, {allocator} allocator\n")
    print("| seed | padded / bucket / supervised | variant | time | memory | s / s | MiB / MiB |")
    print("|---|---|---|---|---|---|---|")
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(1 if shape == "dense" else args.seeds):
        result = child(size, shape, seed, allocator, args)
        shapes = f"{result['padded']} / {result['bucket']} / {result['supervised']}"
        for name, (in_time, in_memory) in ratios(result).items():
            found.setdefault(name, []).append((in_time, in_memory))
            s = " / ".join(f"{statistics.median(result['times'][n]):.3f}" for n in name.split(" / "))
            mib = " / ".join(f"{result['memory'][n]:.0f}" for n in name.split(" / "))
            print(f"| {seed} | {shapes} | {name} | {in_time:.2f} | {in_memory:.2f} | {s} | {mib} |", flush=True)
    for name, pairs in found.items():
        in_time, in_memory = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"| median | | {name} | **{in_time:.2f}** | **{in_memory:.2f}** | | |", flush=True)


if __name__ == "__main__":
    main()
