"""The plan of a training step: its trace and its leaves, put together for one rank of a layout."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import lcm

from mmfn import tree
from mmfn.batch import Batch
from mmfn.models.work import counts_of, flops_of
from mmfn.parallel.mesh.layout import Layout, Mesh
from mmfn.parallel.planning import extrapolate as scaling
from mmfn.parallel.planning.alike import recording_mesh
from mmfn.parallel.planning.devices import Device
from mmfn.parallel.planning.plan import Leaf, Plan, make_plan, plan_leaves
from mmfn.parallel.planning.trace import Recorder, Trace
from mmfn.parallel.program import Program
from mmfn.train.checkpoint.estimate import describe_sizes, sizes_of
from mmfn.train.flops import model_work
from mmfn.train.objective import resolve
from mmfn.train.planning.step_trace import PlannedStep, make_shares, rank_state, trace_step
from mmfn.train.planning.workload import lengths_of


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one rank of a layout does in a step, on whatever device: all of a plan but the time."""

    trace: Trace
    leaves: Sequence[Leaf]
    mesh: Mesh
    rank: int
    tokens: int
    model_flops: int
    balance: Mapping[str, float]
    notes: Sequence[str]
    assumptions: Sequence[str]
    is_fused: bool = False

    def on(self, device: Device, title: str = "plan") -> Plan:
        """The plan on a device."""
        return make_plan(
            self.trace,
            self.leaves,
            self.mesh,
            title=title,
            rank=self.rank,
            device=device,
            tokens=self.tokens,
            model_flops=self.model_flops,
            balance=self.balance,
            notes=self.notes,
            assumptions=self.assumptions,
            is_fused=self.is_fused,
        )


def plan(
    setup: PlannedStep, layout: Layout, device: Device, *, rank: int = 0, all_layers: bool = False, title: str = "plan"
) -> Plan:
    """The plan of one rank of `layout` on a device; see `measure`."""
    return measure(setup, layout, rank=rank, all_layers=all_layers).on(device, title)


def measure(setup: PlannedStep, layout: Layout, *, rank: int = 0, all_layers: bool = False) -> Measured:
    """What one rank of `layout` does in a step.

    Deep stacks of equal blocks are traced at three depths and extended where that is exact, unless `all_layers`.
    Raises ValueError for a layout the program refuses, and for a compiled program: the eager step is what is traced.
    """
    stacks = setup.family.stacks(setup.cfg)
    *_, (last, L) = stacks.items()
    V = sum(stacks[name] for name in setup.family.towers(setup.cfg))  # blocks before those of the last stack
    mesh = recording_mesh(layout, rank)
    program = setup.build(setup.cfg, mesh)
    blocks = program.specs[last]["layers"]
    reach = 2 if program.weights.is_hosted and layout.world > 1 else 1  # how many blocks ahead something is started
    behind = program.weights.sums_under_way if layout.world > 1 else 0
    num_special = max(setup.family.taps(setup.cfg), program.num_special) + reach - 1
    depths = None if all_layers else scaling.choose_depths(blocks, num_special, V, lcm(program.period, reach), behind)
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
    leaves, checkpoint = _leaves(setup, program, depths)
    return Measured(
        trace=trace or run(L),
        leaves=leaves,
        mesh=mesh,
        rank=rank,
        tokens=setup.workload.tokens * setup.workload.micro_batches,
        model_flops=_model_flops(setup, program, whole),
        balance=_balance(whole, shares[0], mesh["cp"].size),
        notes=[*program.notes, checkpoint, how],
        assumptions=_assumptions(setup, program, mesh["cp"].size),
        is_fused=setup.is_fused,
    )


def _model_flops(setup: PlannedStep, program: Program, whole: Batch) -> int:
    """What the model needs for this rank's part of the batches of a step."""
    work = model_work(setup.family, setup.cfg, program.specs, resolve(setup.objective))
    flops = sum(flops_of(work, counts_of(whole)).values())
    return flops * setup.workload.micro_batches // program.mesh["cp"].size


def _leaves(setup: PlannedStep, program: Program, depths: scaling.Depths | None) -> tuple[list[Leaf], str]:
    """Every leaf of the state, and what a checkpoint of it takes.

    Blocks that repeat are declared alike, so one period of them is made and copied.
    """
    specs, recorder = program.specs, Recorder(is_fake=True)
    *_, (stack, num_blocks) = setup.family.stacks(setup.cfg).items()
    first = num_blocks if depths is None else depths.first
    specs = {**specs, stack: {**specs[stack], "layers": specs[stack]["layers"][:first]}}
    wide = setup.workload.micro_batches > 1  # gradients are summed in float32 or wider
    itemsize = max(4, setup.dtype.itemsize) if wide else None
    with recorder:
        state = rank_state(setup, replace(program, specs=specs), recorder)
        leaves = plan_leaves(state["params"], state["opt"], specs, program.mesh, itemsize)
    alike = {index: [index] for index in range(first)}  # the blocks that each one stands for
    if depths is not None:
        for index in range(first, num_blocks):
            alike[first - depths.period + (index - first) % depths.period].append(index)

    def copies(path: str) -> Iterator[str]:
        found = re.fullmatch(rf"(.*\b{stack}/layers/)(\d+)(/.*)", path)
        if found is None:
            yield path
            return
        for index in alike[int(found[2])]:
            yield f"{found[1]}{index}{found[3]}"

    known = {path: replace(leaf, path=path) for leaf in leaves for path in copies(leaf.path)}
    everything = ((path, leaf) for one, leaf in tree.items(state) for path in copies(one))
    sizes = sizes_of(everything, program.mesh["world"])
    return [known[path] for path in tree.paths(program.specs)], describe_sizes(sizes)


def _balance(whole: Batch, share: Batch, num_ranks: int) -> dict[str, float]:
    """The real part of what the ranks of a batch compute: all have the static size of the one with most."""
    rows = {
        name: (int(t.segments[0].host_N[-1]), share.towers[name].coords_P4.shape[0]) for name, t in whole.towers.items()
    }
    return {
        "tokens": int((whole.segment_T < whole.num_segments).sum()) / (num_ranks * share.tokens_T.shape[0]),
        **{name: real / max(1, num_ranks * size) for name, (real, size) in rows.items()},
    }


def _stand_in(setup: PlannedStep) -> str:
    """See `ops.planned_table`."""
    by = f" with {' and '.join(setup.packages)}" if setup.packages else ""
    return (", planned as portable ones" if setup.kernels == "npu" else "") + by


def _assumptions(setup: PlannedStep, program: Program, num_ranks: int) -> list[str]:
    side, samples = setup.workload.image_side, Counter[tuple[int, str]]()
    for n in lengths_of(setup.workload, num_ranks):
        grids = [" x ".join(map(str, m.grid[1:])) for m in setup.family.example(n, side, setup.cfg).images]
        samples[n, f"with an image of {grids[0]} inputs" if grids else "of text"] += 1
    kinds = [f"{count} x {n:,} tokens {what}" for (n, what), count in samples.items()]
    if side and all(what == "of text" for _, what in samples):
        kinds.append(f"no image of {side} x {side} inputs can be made or has room in a sample")
    lines = [
        f"samples of a batch: {', '.join(kinds)}",
        "all text is supervised"
        + ("" if program.weights.is_head_sharded else "; of the loss two chunks of rows are traced and count for all"),
        "other ranks do as this one does",
        f"the {setup.kernels} ops{_stand_in(setup)}; memory without the allocator's rounding and undeclared workspaces",
    ]
    if any("experts" in leaf.axes for leaf in tree.leaves(program.specs)):
        lines.append("experts: rows are spread evenly")
    return lines
