"""Traces of the real training step: the step of a config, traced for one rank of any mesh, without values or ranks.

Nothing here knows what a model does: the step is built as training builds it and runs under a recorder. Its kernels are
those of an accelerator; in bfloat16 a CPU's loss needs other memory (`mmfn.ops.vocabulary_attention`), mostly less.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmfn import tree
from mmfn.batch import IGNORE, Batch, is_on_host
from mmfn.errors import UserError
from mmfn.models import Family
from mmfn.ops import Ops
from mmfn.ops.cross_entropy import chunk_rows
from mmfn.ops.kernel import wrapping
from mmfn.ops.route import RouteConfig
from mmfn.parallel.mesh.layout import Layout, Mesh
from mmfn.parallel.planning.alike import recording_mesh
from mmfn.parallel.planning.trace import Recorder, Trace
from mmfn.parallel.program import Program
from mmfn.parallel.weights.hosted import host_copy
from mmfn.parallel.weights.sharding import local, shard_params
from mmfn.spec import meta_params
from mmfn.train.objective import Named
from mmfn.train.optim import Transform
from mmfn.train.planning.workload import Workload, make_batch
from mmfn.train.schedule import Schedule, schedule
from mmfn.train.step import init_state, make_step

Build = Callable[[Any, Mesh], Program]  # (cfg, mesh) -> how a rank runs a model of that config


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """A step to plan: what `make_step` takes, with a function for the program, which is built for several depths.

    `kernels`: the name of the table of ops that the program is built with, `packages`: what is laid over it.
    `is_fused`: whether training compiles it, which changes its time alone.
    """

    family: Family
    cfg: Any
    build: Build
    optimizer: Transform
    workload: Workload
    dtype: torch.dtype = torch.float32
    objective: Named = "per_token_loss"
    kernels: str = "portable"
    packages: tuple[str, ...] = ()
    is_fused: bool = False


def trace_step(
    setup: PlannedStep,
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
        state = rank_state(setup, program, recorder)
        recorder.begin()
        step(state, shares)
    return recorder.trace()


def make_shares(setup: PlannedStep, program: Program, *, is_fake: bool = True) -> tuple[Batch, list[Batch]]:
    """The batch of the ranks that share one, and the micro-batches of the program's rank: its share and copies of it.

    With `is_fake` what encoders read is on the meta device.
    """
    with Recorder(is_fake=is_fake):
        whole = make_batch(setup.family, setup.cfg, setup.workload, program.mesh["cp"].size)
        share = program.split(whole)
        return whole, [share, *(tree.map(torch.clone, share) for _ in range(setup.workload.micro_batches - 1))]


def balanced(ops: Ops) -> Ops:
    """The table with a router that deals tokens to the experts in turn: a plan does not know better."""

    def route(logits_TE: Tensor, cfg: RouteConfig, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        weights_TX, experts_TX, probs_TE = ops.route(logits_TE, cfg, bias_E)
        return weights_TX, torch.arange(experts_TX.numel()).view(experts_TX.shape) % logits_TE.shape[1], probs_TE

    return replace(ops, route=wrapping(route, ops.route))


def shortened(ops: Ops, recorder: Recorder) -> Ops:
    """The table with a loss that goes through two chunks of rows only, whose work counts for all: chunks are alike."""

    def linear_cross_entropy(
        x_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        weights_T: Tensor,
        *,
        chunk: int | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        index_N = ((labels_T != IGNORE) & (weights_T != 0)).nonzero()[:, 0]
        N, rows = index_N.numel(), chunk or chunk_rows(weight_VD.shape[0], ops.logit_bytes)
        num_traced = 2 * -(-N // -(-N // rows)) if N else 0
        if 2 * num_traced >= N:
            return ops.linear_cross_entropy(x_TD, weight_VD, labels_T, weights_T, chunk=chunk, **options)
        short_T = labels_T.index_fill(0, index_N[num_traced:], IGNORE)
        del index_N
        if options.get("num_labels") is not None:
            options["num_labels"] = torch.tensor(num_traced)
        with recorder.standing_for(N, num_traced):
            return ops.linear_cross_entropy(x_TD, weight_VD, short_T, weights_T, chunk=chunk, **options)

    return replace(ops, linear_cross_entropy=wrapping(linear_cross_entropy, ops.linear_cross_entropy))


def rank_state(setup: PlannedStep, program: Program, recorder: Recorder) -> dict[str, Any]:
    """A rank's state; the recorder counts what is made under the name it is given as a phase."""
    recorder.phase = "parameters"
    params = meta_params(program.specs, setup.dtype)
    if not recorder.is_fake:
        params = tree.map(lambda x: torch.zeros(x.shape, dtype=x.dtype), params)
    if program.mesh.layout.world > 1:
        params = shard_params(params, program.specs, program.mesh)
    if program.weights.is_hosted:
        params = tree.map(lambda leaf: host_copy(leaf, local(leaf).device), params)
    recorder.phase = "optimizer"
    return init_state(params, setup.optimizer, program.specs)


def _watched(program: Program, recorder: Recorder) -> Program:
    if program.compile != "none":
        raise UserError(f"a plan traces the eager step but the program is compiled({program.compile!r}); leave it out")

    def watch(ops: Ops) -> Ops:
        table = balanced(ops)
        return recorder.watch(table if program.weights.is_head_sharded else shortened(table, recorder))

    return replace(program, watch=watch)


def _constant() -> Schedule:
    return schedule("constant", peak=1e-3, num_steps=1)
