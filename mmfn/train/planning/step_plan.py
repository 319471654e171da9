"""Plans of the real training step: the step of a config, traced for one rank of any mesh, without values or ranks.

Nothing here knows what a model does: the step is built as training builds it and runs under a recorder. Its kernels are
those of an accelerator; in bfloat16 a CPU's loss needs other memory (`mmfn.ops.vocabulary_attention`), mostly less.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import lcm
from typing import Any

import torch
from torch import Tensor

from mmfn import tree
from mmfn.batch import IGNORE, Batch, is_on_host
from mmfn.models import Family
from mmfn.ops import Ops
from mmfn.ops.cross_entropy import chunk_rows
from mmfn.ops.kernel import wrapping
from mmfn.packing import Sizes
from mmfn.parallel.mesh.layout import Layout, Mesh
from mmfn.parallel.planning import extrapolate as scaling
from mmfn.parallel.planning.devices import Device
from mmfn.parallel.planning.plan import Leaf, Plan, make_plan, plan_leaves
from mmfn.parallel.planning.trace import Recorder, Trace, recording_mesh
from mmfn.parallel.program import Program
from mmfn.parallel.weights.hosted import host_copy
from mmfn.parallel.weights.sharding import local, shard_params
from mmfn.spec import meta_params
from mmfn.train.objective import Named
from mmfn.train.optim import Transform
from mmfn.train.schedule import Schedule, schedule
from mmfn.train.step import init_state, make_step
from mmfn.tree import Tree

Build = Callable[[Any, Mesh], Program]  # (cfg, mesh) -> how a rank runs a model of that config


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every rank is given in a step.

    `tokens` per rank and micro-batch: a batch of cp ranks has cp times as many, cut into samples of `sample_tokens`
    (the last may be shorter). A sample starts with an image of `image_side` x `image_side` inputs of its encoder, if it
    has room; the side is rounded down to what the tower can merge. `segment_multiple`: see `mmfn.packing.Sizes`.
    """

    tokens: int
    sample_tokens: int = 4096
    image_side: int = 32
    micro_batches: int = 1
    segment_multiple: int = 1

    def __post_init__(self) -> None:
        least = {"tokens": 1, "sample_tokens": 1, "image_side": 0, "micro_batches": 1, "segment_multiple": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)} but must be at least {lowest}; raise it")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A step to plan: what `make_step` takes, with a function for the program, which is built for several depths."""

    family: Family
    cfg: Any
    build: Build
    optimizer: Transform
    workload: Workload
    dtype: torch.dtype = torch.float32
    objective: Named = "per_token_loss"


def plan(
    setup: Setup, layout: Layout, device: Device, *, rank: int = 0, all_layers: bool = False, title: str = "plan"
) -> Plan:
    """The plan of one rank of `layout` on a device.

    Deep stacks of equal blocks are traced at three depths and extended where that is exact, unless `all_layers`.
    Raises ValueError for a layout the program refuses, and for a compiled program: the eager step is what is traced.
    """
    stacks = setup.family.stacks(setup.cfg)
    *_, (last, L) = stacks.items()
    V = sum(stacks.values()) - L  # blocks before those of the last stack
    mesh = recording_mesh(layout, rank, Recorder(is_fake=True))
    program = setup.build(setup.cfg, mesh)
    blocks = program.specs[last]["layers"]
    reach = 2 if program.weights.is_hosted and layout.world > 1 else 1  # how many blocks ahead something is started
    num_special = max(setup.family.taps(setup.cfg), program.num_special) + reach - 1
    depths = None if all_layers else scaling.choose_depths(blocks, num_special, V, lcm(program.period, reach))
    whole, shares = make_shares(setup, program)
    run = partial(trace_step, setup, layout, rank=rank, shares=shares)
    trace, how = None, f"all {L} text blocks were traced"
    if depths is not None:
        traces = [run(n) for n in depths.all]
        trace = scaling.extend(traces, depths, V, L)
        if trace is None:  # the first trace fills caches, which count as memory there: once more
            trace = scaling.extend([run(depths.first), *traces[1:]], depths, V, L)
        how = f"text blocks: {', '.join(map(str, depths.all))} of {L} were traced; " + (
            "every figure is affine in their number, and extended" if trace else f"not affine, so all {L} were traced"
        )
    return make_plan(
        trace or run(L),
        _leaves(setup, program, depths),
        mesh,
        title=title,
        rank=rank,
        device=device,
        tokens=setup.workload.tokens * setup.workload.micro_batches,
        balance=_balance(whole, shares[0], mesh["cp"].size),
        notes=[*program.notes, how],
        assumptions=_assumptions(setup, program, mesh["cp"].size),
        ahead=("weights",) if program.weights.prefetch else (),
    )


def trace_step(
    setup: Setup,
    layout: Layout,
    num_layers: int,
    *,
    rank: int = 0,
    is_fake: bool = True,
    shares: Sequence[Batch] | None = None,
) -> Trace:
    """One step of one rank of a model with the first `num_layers` text blocks.

    `shares`: this rank's micro-batches, where `make_shares` has made them before. `is_fake` False runs real tensors of
    zeros, for small models: what the plan is compared with in tests.
    """
    recorder = Recorder(is_fake=is_fake)
    mesh = recording_mesh(layout, rank, recorder)
    cfg = setup.family.at_depth(setup.cfg, num_layers)
    program = _watched(setup.build(cfg, mesh), recorder)
    seed = None if is_fake else 0
    step = make_step(setup.family, cfg, program, setup.objective, setup.optimizer, schedule=_constant(), seed=seed)
    shares = shares or make_shares(setup, program, is_fake=is_fake)[1]
    with recorder:
        recorder.hold("batch", [x for path, x in tree.items(list(shares)) if not is_on_host(path)])
        state = _state(setup, program, recorder)
        recorder.begin()
        step(state, shares)
    return recorder.trace()


def make_shares(setup: Setup, program: Program, *, is_fake: bool = True) -> tuple[Batch, list[Batch]]:
    """The batch of the ranks that share one, and the micro-batches of the program's rank: its share and copies of it.

    With `is_fake` patches are on the meta device.
    """
    with Recorder(is_fake=is_fake):
        whole = make_batch(setup.family, setup.cfg, setup.workload, program.mesh["cp"].size)
        share = program.split(whole)
        return whole, [share, *(tree.map(torch.clone, share) for _ in range(setup.workload.micro_batches - 1))]


def make_batch(family: Family, cfg: Any, workload: Workload, num_ranks: int) -> Batch:
    """The batch of `num_ranks` ranks that share one. Patches are on the meta device where a recorder runs."""
    samples = [family.example(n, workload.image_side, cfg) for n in _lengths(workload, num_ranks)]
    return family.pack(samples, cfg, Sizes(segment_multiple=workload.segment_multiple))


def balanced(ops: Ops) -> Ops:
    """The table with a router that deals tokens to the experts in turn: a plan does not know better."""

    def route(logits_TE: Tensor, num_chosen: int) -> tuple[Tensor, Tensor, Tensor]:
        weights_TX, experts_TX, probs_TE = ops.route(logits_TE, num_chosen)
        return weights_TX, torch.arange(experts_TX.numel()).view(experts_TX.shape) % logits_TE.shape[1], probs_TE

    return replace(ops, route=wrapping(route, ops.route))


def shortened(ops: Ops, recorder: Recorder) -> Ops:
    """The table with a loss that goes through two chunks of rows only, whose work counts for all: chunks are alike."""

    def linear_cross_entropy(
        x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, weights_T: Tensor, *, chunk: int | None = None, **given: Any
    ) -> tuple[Tensor, Tensor]:
        index_N = ((labels_T != IGNORE) & (weights_T != 0)).nonzero()[:, 0]
        N, rows = index_N.numel(), chunk or chunk_rows(weight_VD.shape[0])
        kept = 2 * -(-N // -(-N // rows)) if N else 0
        if 2 * kept >= N:
            return ops.linear_cross_entropy(x_TD, weight_VD, labels_T, weights_T, chunk=chunk, **given)
        short_T = labels_T.index_fill(0, index_N[kept:], IGNORE)
        del index_N
        with recorder.standing_for(N, kept):
            return ops.linear_cross_entropy(x_TD, weight_VD, short_T, weights_T, chunk=chunk, **given)

    return replace(ops, linear_cross_entropy=wrapping(linear_cross_entropy, ops.linear_cross_entropy))


def _state(setup: Setup, program: Program, recorder: Recorder) -> dict[str, Any]:
    """A rank's state; the recorder counts what is made under the name it is given as a phase."""
    recorder.phase = "parameters"
    params: Tree = meta_params(program.specs, setup.dtype)
    if not recorder.is_fake:
        params = tree.map(lambda x: torch.zeros(x.shape, dtype=x.dtype), params)
    if program.mesh.layout.world > 1:
        params = shard_params(params, program.specs, program.mesh)
    if program.weights.is_hosted:
        params = tree.map(lambda leaf: host_copy(leaf, local(leaf).device), params)
    recorder.phase = "optimizer"
    return init_state(params, setup.optimizer, program.specs)


def _leaves(setup: Setup, program: Program, depths: scaling.Depths | None) -> list[Leaf]:
    """Every leaf of the state. Blocks that repeat are declared alike, so one period of them is made and copied."""
    specs, recorder = program.specs, Recorder(is_fake=True)
    if depths is not None:
        *_, stack = setup.family.stacks(setup.cfg)
        specs = {**specs, stack: {**specs[stack], "layers": specs[stack]["layers"][: depths.first]}}
    wide = setup.workload.micro_batches > 1  # gradients are summed in float32 or wider
    itemsize = max(4, setup.dtype.itemsize) if wide else None
    with recorder:
        state = _state(setup, replace(program, specs=specs), recorder)
        leaves = plan_leaves(state["params"], state["opt"], specs, program.mesh, itemsize)
    known = {leaf.path: leaf for leaf in leaves}

    def find(path: str) -> Leaf:
        if path in known or depths is None:
            return known[path]
        head, index, name = re.fullmatch(rf"({stack}/layers/)(\d+)(/.*)", path).groups()  # type: ignore[union-attr]
        alike = depths.first - depths.period + (int(index) - depths.first) % depths.period
        return replace(known[f"{head}{alike}{name}"], path=path)

    return [find(path) for path in tree.paths(program.specs)]


def _balance(whole: Batch, share: Batch, num_ranks: int) -> dict[str, float]:
    """The real part of what the ranks of a batch compute: all have the static size of the one with most."""
    rows = {
        name: (int(t.segments[0].host_N[-1]), share.towers[name].coords_P4.shape[0]) for name, t in whole.towers.items()
    }
    return {
        "tokens": int((whole.segment_T < whole.num_segments).sum()) / (num_ranks * share.tokens_T.shape[0]),
        **{name: real / max(1, num_ranks * size) for name, (real, size) in rows.items()},
    }


def _watched(program: Program, recorder: Recorder) -> Program:
    if program.compile != "none":
        raise ValueError(f"a plan traces the eager step but the program is compiled({program.compile!r}); leave it out")

    def watch(ops: Ops) -> Ops:
        table = balanced(ops)
        return recorder.watch(table if program.weights.is_head_sharded else shortened(table, recorder))

    return replace(program, watch=watch)


def _lengths(workload: Workload, num_ranks: int) -> list[int]:
    """Tokens of each sample of a batch."""
    total, longest = workload.tokens * num_ranks, workload.sample_tokens
    return [longest] * (total // longest) + [total % longest] * (total % longest > 0)


def _assumptions(setup: Setup, program: Program, num_ranks: int) -> list[str]:
    side, samples = setup.workload.image_side, Counter[tuple[int, str]]()
    for n in _lengths(setup.workload, num_ranks):
        grids = [" x ".join(map(str, m.grid[1:])) for m in setup.family.example(n, side, setup.cfg).images]
        samples[n, f"with an image of {grids[0]} inputs" if grids else "of text"] += 1
    kinds = [f"{count} x {n:,} tokens {what}" for (n, what), count in samples.items()]
    if side and all(what == "of text" for _, what in samples):
        kinds.append(f"no image of {side} x {side} inputs can be made or has room in a sample")
    found = [
        f"samples of a batch: {', '.join(kinds)}",
        "all text is supervised"
        + ("" if program.weights.is_head_sharded else "; of the loss two chunks of rows are traced and count for all"),
        "other ranks do as this one does",
        "the portable ops; memory without the allocator's rounding and kernels' workspaces",
    ]
    if any("experts" in leaf.axes for leaf in tree.leaves(program.specs)):
        found.append("experts: rows are spread evenly")
    return found


def _constant() -> Schedule:
    return schedule("constant", peak=1e-3, num_steps=1)
