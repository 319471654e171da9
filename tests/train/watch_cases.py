"""Passes of tiny models, watched or plain, and ops that are wrong."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmfn import ops as tables
from mmfn import tree
from mmfn.batch import Batch
from mmfn.ops import Ops
from mmfn.parallel.context.token_order import segment_multiple
from mmfn.parallel.mesh.layout import Layout, Mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.parallel.program import Program, lower, pipe
from mmfn.parallel.transforms.context_parallel import context_parallel
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.expert_parallel import expert_parallel
from mmfn.parallel.transforms.precision import precision
from mmfn.parallel.transforms.remat import remat
from mmfn.parallel.weights.sharding import shard_params
from mmfn.train.gradients import gradients_of
from mmfn.train.objective import Objective, weigh
from mmfn.train.run.replay.judge import Judge
from mmfn.train.run.replay.watch import Watch
from tests import tiny
from tests.batches import packed, wide


def batch_of(name: str, dtype: torch.dtype) -> Batch:
    model = tiny.model_of(name)
    batch = packed(model, tiny.random_samples(model, 2, 3))
    (weighed,) = weigh([wide(batch) if dtype == torch.float64 else batch], "per_token_loss")
    return weighed


def differentiate(
    name: str, ops: Ops, watch: Watch | None = None, dtype: torch.dtype = torch.float32, kind: str = "none"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients and metrics of a tiny model, by a watched program or a plain one."""
    model = tiny.model_of(name)
    transforms = [remat(kind), *([precision(compute=dtype)] if dtype == torch.bfloat16 else [])]
    base = ops if watch is None else watch.table(ops)
    program = lower(pipe(Program.of(model.family.specs(model.cfg), base), *transforms))
    program = program if watch is None else watch.program(program)
    params = tree.map(lambda leaf: leaf.to(dtype), model.params)
    with torch.no_grad():
        return gradients_of(model.family, model.cfg, program, Objective(z_loss=1e-3))(params, batch_of(name, dtype))


def watched(name: str, ops: Ops, **how: Any) -> Watch:
    watch = Watch(Judge(ops=tables.reference(), dtype=torch.float64))
    differentiate(name, ops, watch, **how)
    return watch


Bend = Callable[[Tensor], Tensor]


def off(x: Tensor) -> Tensor:
    """One element off by a thousandth of the largest."""
    bent = x.clone()
    bent.view(-1)[x.numel() // 2] += 1e-3 * x.abs().max()
    return bent


def nan(x: Tensor) -> Tensor:
    """One element is no number."""
    bent = x.clone()
    bent.view(-1)[x.numel() // 2] = torch.nan
    return bent


def scaled(x: Tensor) -> Tensor:
    """All elements a thousandth too large."""
    return x * 1.001


class Bent(torch.autograd.Function):
    """`bend(x)` forward, or the identity whose gradient is bent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bend: Bend, is_forward: bool) -> Tensor:
        ctx.bend, ctx.is_forward = bend, is_forward
        return bend(x) if is_forward else x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad if ctx.is_forward else ctx.bend(grad), None, None


def faulty(ops: Ops, name: str, call: int | None, bend: Bend, *, is_forward: bool) -> Ops:
    """The table with an op whose `call`-th call (from 1; None: every one) gives a wrong first result, or a wrong
    gradient of its first input."""
    right, count = getattr(ops, name), [0]

    def wrong(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if call is not None and count[0] != call:
            return right(*args, **kwargs)
        if not is_forward:
            return right(Bent.apply(args[0], bend, False), *args[1:], **kwargs)
        out = right(*args, **kwargs)
        first, *rest = out if isinstance(out, tuple) else (out,)
        first = Bent.apply(first, bend, True)
        return (first, *rest) if isinstance(out, tuple) else first

    return replace(ops, **{name: replace(right, fn=wrong)})


def on_ranks(ops: Ops, has_watch: bool) -> list[tuple[Watch, dict[str, Tensor]]]:
    """Of two ranks that share tokens, by a ring, and experts: the watch and this rank's gradients."""
    model, layout = tiny.model_of("moe"), Layout(cp=2, ep=2)
    heads = {"num_heads": model.cfg.decoder.num_heads, "num_kv_heads": model.cfg.decoder.num_kv_heads}
    samples = tiny.random_samples(model, 2, 3)
    batch = packed(model, samples, segment_multiple=segment_multiple("ring", layout))
    (batch,) = weigh([batch], "per_token_loss")
    params = tree.map(Tensor.float, model.params)

    def rank(mesh: Mesh) -> tuple[Watch, dict[str, Tensor]]:
        watch = Watch(Judge(ops=tables.reference(), dtype=torch.float64))
        base = Program.of(model.family.specs(model.cfg), watch.table(ops) if has_watch else ops, mesh)
        ring = context_parallel("ring", **heads, towers=model.family.towers(model.cfg))
        program = lower(pipe(base, ring, expert_parallel(), data_parallel(), remat("full")))
        program = watch.program(program) if has_watch else program
        shards = shard_params(params, program.specs, mesh)
        with torch.no_grad():
            compute = gradients_of(model.family, model.cfg, program, Objective())
            return watch, compute(shards, program.split(batch))[0]

    return virtual(layout, rank)
