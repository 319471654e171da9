"""The training step: `step(state, microbatches) -> (state, metrics)`, a pure function over a pytree of state.

`state = {"params", "opt", "step"}`: the parameter tree, the optimizer's state and the number of steps taken, an int64
0-D tensor on the host. Everything that is decided from values (clipping, skipping a non-finite step) is decided on the
device, so a step never waits for it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfn import tree
from mmfn.batch import Batch
from mmfn.grad import value_and_grad
from mmfn.models import Family
from mmfn.ops import Ops
from mmfn.parallel.mesh import Mesh
from mmfn.parallel.program import Program, lower
from mmfn.parallel.reduce import all_counts, norm_and_sums
from mmfn.parallel.sharding import like, local, placed
from mmfn.train import optim
from mmfn.train.objective import Objective, loss_fn, resolve, weigh
from mmfn.train.optim import Leaves, Transform, Update, UpdateFn
from mmfn.train.schedule import Schedule
from mmfn.tree import Tree

State = dict[str, Any]
Metrics = dict[str, Tensor]
Step = Callable[[State, Sequence[Batch]], tuple[State, Metrics]]
Gradients = Callable[[Tree, Batch], tuple[Leaves, Metrics]]


def init_state(params: Tree, optimizer: Transform) -> State:
    """The state before the first step. It holds `params` themselves: a donating step overwrites them.

    On a mesh the optimizer runs on shards, and what it keeps for a leaf is placed as the leaf is.
    """
    leaves = dict(tree.items(params))
    opt = optimizer.init({path: local(leaf) for path, leaf in leaves.items()})
    return {"params": params, "opt": placed(opt, leaves), "step": torch.zeros((), dtype=torch.int64)}


def make_step(
    family: Family,
    cfg: Any,
    program: Program,
    objective: str | Objective,
    optimizer: Transform,
    *,
    schedule: Schedule,
    donate: bool = True,
) -> Step:
    """Build `step(state, microbatches) -> (state, metrics)`.

    Token weights are computed once over all micro-batches, their gradients are summed (several: in float32 or wider),
    and the optimizer runs once. `metrics`, all 0-D tensors: `loss`, `tokens` (supervised), `grad_norm` (before
    clipping), `lr`, `skipped` (1 where the gradient norm is not finite: then only `state["step"]` advances).

    `donate`: the given state is consumed, its tensors overwritten and returned; with False it is left as it was. This
    is the only place where that is decided. On a mesh, `microbatches` are this rank's shares (`program.split` of each),
    equally many on all ranks and with one number of segments, and the metrics those of the global batch.

    Under `compiled("layer")` the update is one graph beside those of the blocks; under `compiled("step")` a step with
    one micro-batch is one graph, and one with several runs a graph per micro-batch and one for the update (one graph
    can recompute activations for one backward pass only).

    Raises ValueError for an unknown objective, for optimizer patterns that match no parameter, and, when called, for
    an empty list of micro-batches.
    """
    program = lower(program)
    paths = tree.paths(program.specs)
    exchange = partial(all_counts, mesh=program.mesh)
    weights = resolve(objective)
    gradients = _gradients(paths, family, cfg, program.ops)
    kernel = "fused" if program.compile == "none" else "traced"
    apply_ = _apply(optimizer.update(paths), schedule, kernel, program.mesh)

    def one(state: State, batch: Batch) -> tuple[Tree, Metrics]:
        (weighed,) = weigh([batch], weights, exchange)
        return update(state, apply_, *gradients(state["params"], weighed))

    def update(state: State, run: Callable[..., Any], grads: Leaves, sums: Metrics) -> tuple[Tree, Metrics]:
        leaves = {path: local(leaf) for path, leaf in zip(paths, tree.leaves(state["params"]), strict=True)}
        opt, metrics = run(leaves, grads, tree.map(local, state["opt"]), state["step"], sums)
        return opt, metrics

    run_one = program.jit(one) if program.compile == "step" else one
    run_gradients = program.jit(gradients) if program.compile == "step" else gradients
    run_apply = apply_ if program.compile == "none" else program.jit(apply_)

    @torch.no_grad()
    def step(state: State, microbatches: Sequence[Batch]) -> tuple[State, Metrics]:
        if not donate:
            state = tree.map(lambda leaf: like(local(leaf).clone(), leaf), state)
        with program.compiling():
            if program.compile == "step" and len(microbatches) == 1:
                opt, metrics = run_one(state, microbatches[0])
            else:
                weighed = weigh(microbatches, weights, exchange)
                grads, sums = scan_gradients(run_gradients, state["params"], weighed)
                owned = dict(zip(grads, optim.own(list(grads.values())), strict=True))
                opt, metrics = update(state, run_apply, owned, sums)
        opt = tree.map(like, opt, state["opt"])  # outside of any graph: it looks at memory
        return {"params": state["params"], "opt": opt, "step": state["step"] + 1}, metrics

    return step


def _gradients(paths: Sequence[str], family: Family, cfg: Any, ops: Ops) -> Gradients:
    differentiate = value_and_grad(lambda params, batch: loss_fn(params, batch, family, cfg, ops), has_aux=True)

    def gradients(params: Tree, batch: Batch) -> tuple[Leaves, Metrics]:
        (_, metrics), grads = differentiate(params, batch)
        return {path: local(grad) for path, grad in zip(paths, tree.leaves(grads), strict=True)}, metrics

    return gradients


def _apply(update: UpdateFn, schedule: Schedule, kernel: str, mesh: Mesh) -> Callable[..., tuple[Tree, Metrics]]:
    """`apply_(params, grads, opt, step, sums) -> (opt, metrics)`: one optimizer update of this rank's shards.

    Parameters are written in place. `sums`: this rank's shares of metrics, summed here along with the norm.
    """

    def apply_(params: Leaves, grads: Leaves, opt: Tree, step: Tensor, sums: Metrics) -> tuple[Tree, Metrics]:
        lr = schedule(step)
        norm, sums = norm_and_sums(optim.global_norm(grads), sums, mesh)
        finite = torch.isfinite(norm)
        given = Update(params=params, grads=grads, norm=norm, finite=finite, lr=lr, kernel=kernel)
        _, opt = update(given, opt)
        return opt, {**sums, "grad_norm": norm, "lr": lr, "skipped": (~finite).to(torch.int64)}

    return apply_


def scan_gradients(gradients: Gradients, params: Tree, microbatches: Sequence[Batch]) -> tuple[Leaves, Metrics]:
    """Sum `gradients(params, batch) -> (leaves, metrics)` over micro-batches, in float32 or wider if there are several.

    The running sum is built leaf by leaf, freeing each gradient behind it; out of place, since autograd may return one
    tensor for two leaves.
    """
    total, sums = gradients(params, microbatches[0])
    for batch in microbatches[1:]:
        more, metrics = gradients(params, batch)
        for path, grad in total.items():
            dtype = optim.wide(grad.dtype)
            total[path] = grad.to(dtype) + more.pop(path).to(dtype)
        sums = {name: value + metrics[name] for name, value in sums.items()}
    return total, sums
