"""Four layouts of one training step, in one process: is the gradient that of one device, what travels, what fits?

    python examples/mesh_experiment.py

Draws a tiny Qwen3-VL and four samples with images, computes the gradient of the global batch on one device, and again
on four ranks laid out in four ways. The ranks are threads that exchange real values (`mmfn.parallel.mesh.virtual`): no
process group and no accelerator is needed. Everything is float64: a difference beyond rounding is a mistake. Then the
same step is planned for each layout (`mmfn.train.planning.step_plan`), from shapes alone.
"""

from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mmfn
from mmfn import tree
from mmfn.batch import IGNORE, IMAGE, Batch, Media, Sample, to
from mmfn.models import family
from mmfn.packing import Sizes
from mmfn.parallel.context.token_order import segment_multiple
from mmfn.parallel.mesh.layout import Layout, Mesh, single_mesh
from mmfn.parallel.mesh.step_sums import all_counts
from mmfn.parallel.mesh.virtual import run_virtual
from mmfn.parallel.planning.devices import device
from mmfn.parallel.planning.plan import size
from mmfn.parallel.program import Program, lower, pipe
from mmfn.parallel.transforms.context_parallel import context_parallel
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.weights.sharding import shard_params, whole_params
from mmfn.train.objective import loss_fn, weigh
from mmfn.train.optim import adamw
from mmfn.train.planning.step_plan import plan
from mmfn.train.planning.step_trace import PlannedStep
from mmfn.train.planning.workload import Workload

IMAGE_ID, NUM_TOKENS, NUM_FEATURES = 1, 64, 16
LAYOUTS = {
    "FSDP": (Layout(dp=4), "gather"),
    "HSDP": (Layout(replicate=2, dp=2), "gather"),
    "FSDP x ring": (Layout(dp=2, cp=2), "ring"),
    "ulysses x ring": (Layout(cp=4, ulysses=2), "usp"),
}
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_vl",
    "image_token_id": IMAGE_ID,
    "video_token_id": 2,
    "tie_word_embeddings": True,
    "text_config": {
        "vocab_size": 61,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]},
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "out_hidden_size": 16,
        "num_position_embeddings": 9,
        "deepstack_visual_indexes": [0],
    },
}


def main() -> float:
    """Print the comparison; returns the largest relative difference of any gradient."""
    model, samples = mmfn.init(CONFIG, seed=0, dtype=torch.float64), [make_sample(i) for i in range(4)]
    expected_loss, expected = loss_and_gradient(single_mesh(), "gather", model, samples)
    print(f"one device: loss {expected_loss:.6f}")
    worst = 0.0
    for name, (layout, kind) in LAYOUTS.items():
        world = run_virtual(layout, partial(loss_and_gradient, kind=kind, model=model, samples=samples))
        loss, gradient = sum(share for share, _ in world.results), world.results[0][1]
        difference = max(relative(a, b) for a, b in zip(tree.leaves(gradient), tree.leaves(expected), strict=True))
        worst = max(worst, difference)
        sites = Counter(f"{call.name} {call.site}" for call in world.calls[0] if call.site != "whole")
        print(f"{name} ({layout}): loss differs by {abs(loss - expected_loss):.1e}, gradient by {difference:.1e}")
        print("    a rank calls " + ", ".join(f"{count} x {site}" for site, count in sorted(sites.items())))
    print_plans(model)
    return worst


def print_plans(model: mmfn.Model) -> None:
    """Memory and communication of a rank, side by side."""
    rows: list[tuple[str, ...]] = [("planned for a rank", "parameters", "optimizer", "peak", "on the wire")]
    for name, (layout, kind) in LAYOUTS.items():
        multiple = segment_multiple(kind, layout)
        setup = PlannedStep(
            family=model.family,
            cfg=model.cfg,
            build=partial(build, kind=kind),
            optimizer=adamw(),
            workload=Workload(tokens=64, sample_tokens=32, image_side=4, segment_multiple=multiple),
        )
        found = plan(setup, layout, device("cpu"))
        wire = sum(collective.wire_bytes for collective in found.collectives)
        rows.append((name, *map(size, (found.total("parameter"), found.total("optimizer"), found.peak_bytes, wire))))
    for row in rows:
        print(f"{row[0]:<20}" + "".join(f"{cell:>14}" for cell in row[1:]))


def build(cfg: Any, mesh: Mesh, kind: str) -> Program:
    """How a rank runs the model: sharded over dp * cp, tokens spread over cp."""
    heads = cfg.decoder
    model = family(CONFIG["model_type"])
    context = context_parallel(
        kind, num_heads=heads.num_heads, num_kv_heads=heads.num_kv_heads, towers=model.towers(cfg)
    )
    return pipe(Program.of(model.specs(cfg), mesh=mesh), data_parallel(), context)


def loss_and_gradient(mesh: Mesh, kind: str, model: mmfn.Model, samples: list[Sample]) -> tuple[float, object]:
    """(this rank's share of the loss, the whole gradient) of all samples, dealt to the ranks with their own data."""
    program = lower(build(model.cfg, mesh, kind))
    own = samples[mesh["batch"].index :: mesh["batch"].size]
    batch = program.split(pack_samples(own, model, segment_multiple(kind, mesh.layout)))
    (batch,) = weigh([batch], "per_token_loss", partial(all_counts, mesh=mesh))
    params = model.params if mesh.layout.world == 1 else shard_params(model.params, program.specs, mesh)
    gradient_of = mmfn.value_and_grad(
        partial(loss_fn, family=model.family, cfg=model.cfg, ops=program.ops), has_aux=True
    )
    (loss, _), gradient = gradient_of(params, batch)
    return loss.item(), whole_params(gradient, mesh)


def pack_samples(samples: list[Sample], model: mmfn.Model, multiple: int) -> Batch:
    """Samples end to end, in float64."""
    sizes = Sizes(tokens=NUM_TOKENS, segments=4, units={"vision": NUM_FEATURES}, segment_multiple=multiple)
    batch = to(model.family.pack(samples, model.cfg, sizes), "cpu", torch.float64)
    return replace(batch, weights_T=batch.weights_T.double())


def make_sample(seed: int) -> Sample:
    """An image of four patches, one token, among random words."""
    g = torch.Generator().manual_seed(seed)
    tokens_T = torch.randint(5, 61, (9 + 2 * seed,), generator=g)
    tokens_T[2] = IMAGE_ID
    kinds_T = torch.where(tokens_T == IMAGE_ID, IMAGE, 0)
    labels_T = torch.where(torch.arange(tokens_T.numel()) > 3, tokens_T, IGNORE)
    image = Media(inputs_UF=torch.randn(4, 12, generator=g), grid=(1, 2, 2))
    return Sample(tokens_T=tokens_T, labels_T=labels_T, kinds_T=kinds_T, images=(image,), id=str(seed))


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest entry of `b`."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-300)).item()


if __name__ == "__main__":
    main()
