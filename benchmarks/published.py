"""Predicted speeds of training beside published ones: `benchmarks/published.yaml`, planned on a laptop.

    python benchmarks/published.py            # the points, some minutes
    python benchmarks/published.py --sweep    # the rows of one published sweep, and how well they are ranked

A point is planned as the nearest layout that mmfn has, on the device of the table with the network and the attention
kernel that the source states. What other systems run behind the computation counts as ahead: gathers, and the
reduce-scatters of gradients. Text models are decoders of Qwen's vision-language families without an image; a tower of
one block stays idle.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from mmfn.parallel.planning.account import ATTENTION
from mmfn.parallel.planning.devices import GB, TFLOPS, Device, device
from mmfn.parallel.planning.plan import Plan
from mmfn.train.planning.request import Request, measure_config, read, with_world
from mmfn.train.planning.workload import Workload

DATA = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
NEAR = 0.25
IDLE_TOWER = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 1, "patch_size": 14}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One published speed; see the head of the data. `network` and `memory` in GB/s."""

    source: str
    model: str
    device: str
    devices: int
    length: int
    batch: int
    layout: Mapping[str, Any]
    micro_batches: int = 1
    fused: bool = False
    dtype: str = "float32"
    lora: bool = False
    network: float | None = None
    memory: float | None = None
    attention: float | None = None
    tokens_s: float | None = None
    tflops: float | None = None

    @property
    def target(self) -> Device:
        """The device it ran on."""
        found = device(self.device)
        return replace(
            found,
            network=found.network if self.network is None else self.network * GB,
            memory_bandwidth=found.memory_bandwidth if self.memory is None else self.memory * GB,
            shares=found.shares if self.attention is None else {**found.shares, ATTENTION: self.attention},
        )

    def published_s(self, plan: Plan) -> float:
        """Seconds of a step."""
        if self.tokens_s is not None:
            return plan.tokens / self.tokens_s
        assert self.tflops is not None
        return plan.model_flops / (self.tflops * TFLOPS)

    def __str__(self) -> str:
        layout = {name: value for name, value in self.layout.items() if name != "reduce_dtype"}
        how = ", ".join(f"{name} {value}" for name, value in layout.items())
        more = [f"{self.batch * self.micro_batches} x {self.length:,}", how, "LoRA" * self.lora, "fused" * self.fused]
        return f"{self.model}, {self.devices} {self.device}: {', '.join(part for part in more if part)}"


def points(name: str) -> list[Point]:
    """Those of a list of the data."""
    return [Point(**entry) for entry in DATA[name]]


def sweep() -> list[Point]:
    """The rows of the published sweep."""
    found = []
    for model, rows in DATA["sweep"].items():
        for length, devices, batch, micro_batches, is_again, tokens_s in rows:
            layout = {"remat": "full"} if is_again else {}
            make = partial(Point, source="foundry", model=model, device="h100", layout=layout)
            sizes = {"devices": devices, "length": length, "batch": batch, "micro_batches": micro_batches}
            found.append(make(**sizes, tokens_s=tokens_s))
    return found


def plan_point(point: Point) -> Plan:
    """Its plan. Raises ValueError where the program refuses the layout."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config_of(DATA["models"][point.model])), encoding="utf-8")
        settings = [
            *(f"layout.{name}={json.dumps(value)}" for name, value in point.layout.items()),
            *(["layout.compute_dtype=bfloat16"] if point.dtype == "float32" else []),
            *(["lora.rank=16", "lora.alpha=32"] if point.lora else []),
            f"model.dtype={point.dtype}",
            "model.kernels=cuda",
            f"train.compile={'layer' if point.fused else 'none'}",
        ]
        loaded = with_world(read(str(path), settings), point.devices)
        workload = Workload(
            tokens=point.batch * point.length // point.layout.get("cp", 1),
            sample_tokens=point.length,
            image_side=0,
            micro_batches=point.micro_batches,
        )
        request = Request(config=loaded.config, device=point.device, workload=workload, title=str(point))
        return measure_config(request).on(point.target, str(point))


def config_of(sizes: Sequence[int]) -> dict[str, Any]:
    """The config.json of a decoder: dense as Qwen2.5-VL's, with experts as Qwen3-VL-MoE's."""
    vocabulary, width, ffn, layers, heads, kv_heads, *experts = sizes
    text = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
    }
    tokens = {"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3, "tie_word_embeddings": False}
    tower = {**IDLE_TOWER, "out_hidden_size": width, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if not experts:
        own = {"window_size": 112, "fullatt_block_indexes": [0], "tokens_per_second": 2, "hidden_act": "silu"}
        rope = {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "max_position_embeddings": 10**6}
        return {"model_type": "qwen2_5_vl", **tokens, **text, **rope, "vision_config": {**tower, **own}}
    routed = {"num_experts": experts[0], "num_experts_per_tok": experts[1], "moe_intermediate_size": ffn}
    rope = {"rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}}
    text |= {**routed, **rope, "head_dim": 128, "decoder_sparse_step": 1, "norm_topk_prob": True}
    own = {"num_position_embeddings": 4, "deepstack_visual_indexes": [], "hidden_act": "gelu_pytorch_tanh"}
    return {"model_type": "qwen3_vl_moe", **tokens, "text_config": text, "vision_config": {**tower, **own}}


def ranks(values: Sequence[float]) -> list[float]:
    """The place of each value among all, ties in the middle."""
    return [sum(b < a for b in values) + sum(b == a for b in values) / 2 for a in values]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's."""
    return statistics.correlation(ranks(a), ranks(b))


def compare(chosen: Sequence[Point]) -> Iterator[tuple[Point, Plan, float]]:
    """Every point with its plan and predicted over published seconds, printed as a row of a table."""
    print("| point | source | published | predicted | ratio | MFU | by class |\n|---|---|---|---|---|---|---|")
    for point in chosen:
        plan = plan_point(point)
        published, t = point.published_s(plan), plan.time
        ratio = t.total_s / published
        classes = ", ".join(f"{name} {s / t.total_s:.0%}" for name, s in t.classes.items() if s > 0.02 * t.total_s)
        rest = f"{classes}, ahead {t.overlapped_s / t.total_s:.0%}, exposed {t.exposed_s / t.total_s:.0%}"
        cells = [
            str(point),
            point.source,
            f"{published:.3g} s",
            f"{t.total_s:.3g} s",
            f"{ratio:.2f}",
            f"{plan.mfu:.1%}",
            rest,
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
        yield point, plan, ratio


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="rank the rows of a published sweep")
    parser.add_argument("--others", action="store_true", help="points on devices that the table lacks")
    args = parser.parse_args()
    if not args.sweep:
        found = [ratio for *_, ratio in compare(points("others" if args.others else "points"))]
        near = sum(abs(ratio - 1) <= NEAR for ratio in found)
        print(f"\n{near} of {len(found)} within {NEAR:.0%}; median ratio {statistics.median(found):.2f}")
        return
    rows = list(compare(sweep()))
    near = sum(abs(ratio - 1) <= NEAR for *_, ratio in rows)
    print(f"\n{near} of {len(rows)} within {NEAR:.0%}")
    for model in (None, *DATA["sweep"]):
        chosen = [row for row in rows if model in (None, row[0].model)]
        mfu = [(plan.mfu, plan.mfu * ratio) for _, plan, ratio in chosen]
        speeds = [(plan.tokens / plan.time.total_s, point.tokens_s or 0) for point, plan, _ in chosen]
        spoken = [f"{rank_correlation(*zip(*pairs, strict=True)):.2f}" for pairs in (mfu, speeds)]
        print(f"{model or 'all'}, {len(chosen)} rows: rank correlation of MFU {spoken[0]}, of tokens/s {spoken[1]}")


if __name__ == "__main__":
    main()
