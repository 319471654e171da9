"""Model TFLOP/s, MFU and tokens/s of a training step on one accelerator: mmfn eager and compiled, and transformers.

    python benchmarks/gpu.py                                  # both shapes, on the GPU at hand: minutes
    python benchmarks/gpu.py --shapes dense --layers 16 --rounds 5
    python benchmarks/gpu.py --device cpu --smallest          # to try the script

Shapes: "dense", blocks and head of Qwen3-VL-8B; "moe", of Qwen3-VL-30B-A3B; in bfloat16, as many blocks as fit, by the
plan of mmfn's step, in 0.7 of the device's memory (transformers holds more activations); the tower is a trivial one and
reads nothing. A step is a forward, a backward, clipping and AdamW, of 8,192 tokens, all of which are supervised: four
samples, packed in mmfn and as rows of a batch, which have no padding, in transformers. mmfn's is the step of a config
(`train.compile` "none" and "layer"), with its default of float32 moments and master weights; transformers' its model in
train mode with sdpa (flash_attention_2 where that is installed) and `grouped_mm` for experts, `clip_grad_norm_` and
`AdamW(fused=True)` in bfloat16.

All start from the same weights, and first losses must agree. Variants take turns, and each has the device to itself: it
is built again in each round, warmed up (where it compiles, once), and timed between synchronizations. Printed are
medians over rounds. FLOPs are the same for all: those of the model (`mmfn.models.work`), without what is computed
again. The peak for MFU is that of the device table. Memory: the most that was allocated; on a CPU the resident
high-water mark of a step above the level before it.
"""

import argparse
import gc
import importlib.util
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import torch
from measure import peak_mib
from torch import Tensor

import mmfn
from mmfn import models, tree
from mmfn.batch import to as batch_to
from mmfn.interop.inputs import samples_from_hf
from mmfn.models.work import counts_of, flops_of
from mmfn.packing import Sizes
from mmfn.parallel.mesh.layout import Layout, single_mesh
from mmfn.parallel.planning.devices import like
from mmfn.train.build.optimizer import build_optimizer
from mmfn.train.build.program import build_program
from mmfn.train.config.schema import Config
from mmfn.train.flops import model_work
from mmfn.train.objective import resolve
from mmfn.train.planning.step_trace import PlannedStep, trace_step
from mmfn.train.planning.workload import Workload
from mmfn.train.schedule import schedule
from mmfn.train.step import init_state, make_step

PUBLISHED = Path(__file__).parents[1] / "configs" / "models"
SHAPES = {"dense": "Qwen3-VL-8B", "moe": "Qwen3-VL-30B-A3B"}
SMALLEST = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}
SMALL_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
TRIVIAL = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 1, "deepstack_visual_indexes": [0]}
VARIANTS = {"eager": "none", "compiled": "layer", "transformers": ""}  # and mmfn's `train.compile`
ROOM = 0.7
LR, DECAY, CLIP = 1e-4, 0.1, 1.0
MARKS = 16  # of the vocabulary: the ids of media lie below
Step = Callable[[], Tensor]  # runs one training step, returns its loss


@dataclass(frozen=True, kw_only=True)
class Case:
    """What all variants of a shape share. `model`: its parameters lie on the host. `theirs`: their library's config."""

    model: mmfn.Model
    theirs: Any
    inputs: dict[str, Tensor]
    flops: int
    args: argparse.Namespace

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.inputs["input_ids"].numel()


def hf_config(shape: str, num_layers: int | None, args: argparse.Namespace) -> dict[str, Any]:
    """The published config.json with so many blocks (default: all), behind a trivial tower."""
    hf: dict[str, Any] = json.loads((PUBLISHED / SHAPES[shape] / "config.json").read_text(encoding="utf-8"))
    text = hf["text_config"]
    if args.smallest:
        text |= SMALLEST | (SMALL_EXPERTS if "num_experts" in text else {})
        text["rope_scaling"] = text["rope_scaling"] | {"mrope_section": [4, 2, 2]}
    num_layers = num_layers or text["num_hidden_layers"]
    text |= {"num_hidden_layers": num_layers, "bos_token_id": None, "eos_token_id": None}
    hf["vision_config"] |= TRIVIAL | {"out_hidden_size": text["hidden_size"]}
    return hf | families.IDS


def run_config(compile: str, args: argparse.Namespace) -> Config:
    """mmfn's config of a run that takes such steps."""
    return Config.model_validate(
        {
            "model": {"path": "", "dtype": args.dtype, "device": args.device},
            "data": {"train": "", "token_buckets": [args.tokens], "tower_buckets": {}},
            "optimizer": {"lr": LR, "weight_decay": DECAY, "clip_norm": CLIP},
            "train": {"steps": 1, "compile": compile},
            "output": {"path": ""},
        }
    )


def fitting_layers(shape: str, memory_bytes: int, args: argparse.Namespace) -> int:
    """As many blocks as the plan of mmfn's eager step fits into `ROOM` of so much memory; each adds as much to it."""
    hf, config = hf_config(shape, None, args), run_config("none", args)
    family = models.family(hf["model_type"])
    cfg = family.config_from_hf(hf)
    setup = PlannedStep(
        family=family,
        cfg=cfg,
        build=lambda cfg, mesh: build_program(config, family, cfg, mesh, family.specs(cfg)),
        optimizer=build_optimizer(config, family.specs(cfg)),
        workload=Workload(tokens=args.tokens, sample_tokens=args.length, image_side=0),
        dtype=getattr(torch, args.dtype),
        kernels=config.model.table,
    )
    two, four = (trace_step(setup, Layout(), n).peak.total for n in (2, 4))
    most = 4 + int((ROOM * memory_bytes - four) // ((four - two) / 2))
    if most < 1:
        raise SystemExit(f"{shape}: one block does not fit into {memory_bytes / 1e9:.0f} GB")
    return min(most, int(hf["text_config"]["num_hidden_layers"]))


def draw(specs: Any, args: argparse.Namespace) -> Any:
    """Random parameters on the host, drawn where that is fast."""
    g = torch.Generator(args.device).manual_seed(0)

    def leaf(spec: Any) -> Tensor:
        dtype = spec.dtype or getattr(torch, args.dtype)
        x = torch.empty(spec.shape, dtype=dtype, device=args.device)
        x = x.normal_(0, 0.02, generator=g) if spec.init.kind == "normal" else x.fill_(float(spec.init.kind == "ones"))
        return x.cpu()

    return tree.map(leaf, specs)


def make_case(shape: str, args: argparse.Namespace) -> Case:
    """Weights, inputs and the model's FLOPs."""
    memory = torch.cuda.get_device_properties(args.device).total_memory if args.device != "cpu" else None
    num_layers = args.layers or (fitting_layers(shape, memory, args) if memory else 2)
    hf = hf_config(shape, num_layers, args)
    family = models.family(hf["model_type"])
    cfg = family.config_from_hf(hf)
    specs = family.specs(cfg)
    model = mmfn.Model(family=family, cfg=cfg, params=draw(specs, args), hf_config=hf)
    shape_of_rows = (args.tokens // args.length, args.length)
    tokens = torch.randint(
        MARKS, hf["text_config"]["vocab_size"], shape_of_rows, generator=torch.Generator().manual_seed(0)
    )
    inputs = {"input_ids": tokens, "labels": tokens, "mm_token_type_ids": torch.zeros_like(tokens)}
    counts = counts_of(packed(model, inputs, args))
    flops = sum(flops_of(model_work(family, cfg, specs, resolve("per_token_loss")), counts).values())
    theirs = families.recipe(hf["model_type"]).classes[0](**hf)
    return Case(model=model, theirs=theirs, inputs=inputs, flops=int(flops), args=args)


def packed(model: mmfn.Model, inputs: dict[str, Tensor], args: argparse.Namespace) -> Any:
    """mmfn's batch: rows end to end."""
    rows = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    samples = samples_from_hf(rows, model)
    batch = model.family.pack(samples, model.cfg, Sizes(tokens=args.tokens))
    return batch_to(batch, args.device, getattr(torch, args.dtype))


# ---- variants: a function that builds the step, with its state, anew


def mmfn_builder(case: Case, compile: str) -> Callable[[], Step]:
    """The step of a config; what it compiles, it compiles once."""
    model, config = case.model, run_config(compile, case.args)
    program = build_program(config, model.family, model.cfg, single_mesh(), model.family.specs(model.cfg))
    optimizer = build_optimizer(config, program.specs)
    rate = schedule("constant", peak=LR, num_steps=1)
    run = make_step(model.family, model.cfg, program, "per_token_loss", optimizer, schedule=rate)

    def build() -> Step:
        params = tree.map(lambda x: x.to(case.args.device, copy=True), model.params)
        state = init_state(params, optimizer, program.specs)
        del params
        batch = packed(model, case.inputs, case.args)

        def step() -> Tensor:
            nonlocal state
            state, metrics = run(state, [batch])
            return metrics["loss"]

        return step

    return build


def transformers_builder(case: Case) -> Callable[[], Step]:
    """Forward, backward, clip, AdamW, as its users write it, with the kernels of `best_kernels`."""
    weights, args = mmfn.to_hf(case.model.params, case.model, layout="transformers"), case.args
    kernels = best_kernels(case)

    def build() -> Step:
        with torch.device(args.device):
            cls = families.library_class(case.model.hf_config["model_type"])
            model = cls._from_config(case.theirs, dtype=getattr(torch, args.dtype), **kernels).train()
        model.load_state_dict(weights)
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=DECAY, fused=True)
        inputs = {name: x.to(args.device) for name, x in case.inputs.items()}

        def step() -> Tensor:
            loss: Tensor = model(**inputs, use_cache=False).loss
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(params, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return step

    return build


def best_kernels(case: Case) -> dict[str, str]:
    """transformers' attention, and experts where there are any."""
    has_flash = case.args.device != "cpu" and importlib.util.find_spec("flash_attn") is not None
    has_experts = "num_experts" in case.model.hf_config["text_config"]
    attention = case.args.attention or ("flash_attention_2" if has_flash else "sdpa")
    return {"attn_implementation": attention} | ({"experts_implementation": case.args.experts} if has_experts else {})


# ---- measuring


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One turn of a variant: seconds of a step, memory in bytes, and the first loss."""

    seconds: float
    memory: float
    loss: float


def visit(build: Callable[[], Step], args: argparse.Namespace) -> Visit | None:
    """Build, warm up and time a variant; None where it runs out of memory."""
    try:
        return _visit(build(), args)
    except torch.OutOfMemoryError:
        return None
    finally:
        gc.collect()
        if args.device != "cpu":
            torch.cuda.empty_cache()


def _visit(step: Step, args: argparse.Namespace) -> Visit:
    loss = step().item()
    for _ in range(args.warm_up - 1):
        step()
    _synchronize(args)
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats(args.device)
    memory = peak_mib(step) * 2**20 if args.device == "cpu" else 0.0
    start = time.perf_counter()
    for _ in range(args.steps):
        step()
    _synchronize(args)
    seconds = (time.perf_counter() - start) / args.steps
    if args.device != "cpu":
        memory = torch.cuda.max_memory_allocated(args.device)
    return Visit(seconds=seconds, memory=memory, loss=loss)


def _synchronize(args: argparse.Namespace) -> None:
    if args.device != "cpu":
        torch.cuda.synchronize(args.device)


def take_turns(case: Case) -> dict[str, list[Visit | None]]:
    """The visits of every variant, in rounds whose order alternates. Raises SystemExit where first losses differ."""
    args = case.args
    builders = {
        name: transformers_builder(case) if name == "transformers" else mmfn_builder(case, VARIANTS[name])
        for name in args.variants
    }
    visits: dict[str, list[Visit | None]] = {name: [] for name in builders}
    for i in range(args.rounds):
        for name in list(builders) if i % 2 == 0 else list(builders)[::-1]:
            visits[name].append(visit(builders[name], args))
    losses = {name: done[0].loss for name, done in visits.items() if done[0] is not None}
    tolerance = 1e-4 if args.dtype == "float32" else 3e-2
    if losses and max(losses.values()) - min(losses.values()) > tolerance * abs(max(losses.values())):
        raise SystemExit(f"the first losses disagree: {losses}")
    return visits


def rows(case: Case, visits: dict[str, list[Visit | None]], peak: float) -> Iterator[str]:
    """A line of the table for each variant."""
    seconds = {name: _median([v.seconds for v in done if v]) for name, done in visits.items()}
    for name, done in visits.items():
        took = seconds[name]
        if math.isnan(took):
            yield f"| {name} | out of memory | | | | | |"
            continue
        rate, memory = case.flops / took, _median([v.memory for v in done if v])
        cells = [f"{took:.3f} s", f"{rate / 1e12:.3g}", f"{rate / peak:.1%}", f"{case.tokens / took:,.0f}"]
        than = seconds.get("transformers", math.nan) / took
        yield f"| {name} | {' | '.join(cells)} | {memory / 2**30:.2f} | {'' if math.isnan(than) else f'{than:.2f}'} |"


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else math.nan


def main() -> None:
    """Print a table for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--layers", type=int, help="default: as many as fit; on a CPU 2")
    parser.add_argument("--tokens", type=int, default=8192, help="of a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sample")
    parser.add_argument("--attention", help="transformers' attention, where not the best that is installed")
    parser.add_argument("--experts", default="grouped_mm", help="what transformers calls its experts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=3, help="steps of a turn before those that are timed")
    parser.add_argument("--steps", type=int, default=10, help="of a turn, that are timed")
    parser.add_argument("--smallest", action="store_true", help="a model of a few thousand parameters, 64 tokens")
    args = parser.parse_args()
    if args.smallest:
        args.tokens, args.length, args.rounds, args.warm_up, args.steps = 64, 32, 1, 1, 1
    if args.tokens % args.length:
        raise SystemExit(f"--tokens {args.tokens} is no multiple of --length {args.length}; change one of them")
    warnings.filterwarnings("ignore")
    name = "CPU" if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    table = like(args.device.partition(":")[0], name)
    print(f"{name}, torch {torch.__version__}, {args.dtype}; peak {table.flops / 1e12:g} TFLOP/s ({table.name})")
    for shape in args.shapes:
        case = make_case(shape, args)
        depth, size = case.model.cfg.num_layers, sum(x.numel() for x in tree.leaves(case.model.params))
        print(f"\n{shape}: {depth} blocks, {size / 1e9:.3g} B parameters, {case.tokens:,} tokens, ", end="")
        print(f"{case.flops / 1e12:.3g} TFLOP a step; transformers with {', '.join(best_kernels(case).values())}\n")
        print("| variant | step | TFLOP/s | MFU | tokens/s | GiB | times transformers |")
        print("|---|---|---|---|---|---|---|")
        for row in rows(case, take_turns(case), table.flops):
            print(row, flush=True)


if __name__ == "__main__":
    main()
