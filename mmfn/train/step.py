"""The training step: `step(state, microbatches) -> (state, metrics)`, a pure function over a pytree of state.

`state = {"params", "opt", "guard", "step"}`: the parameter tree, the optimizer's state, the counters of skipped steps
(`mmfn.train.guard`) and the number of steps, an int64 0-D tensor on the host. Everything that is decided from values
(clipping, skipping a step) is decided on the device, so a step never waits for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfn import tree
from mmfn.batch import Batch
from mmfn.dtypes import wide
from mmfn.errors import UserError
from mmfn.grad import value_and_grad
from mmfn.lora import salts_of
from mmfn.models import Family
from mmfn.parallel.mesh.layout import Mesh
from mmfn.parallel.mesh.step_sums import all_counts, norm_and_sums
from mmfn.parallel.program import Program, lower
from mmfn.parallel.weights.host_memory import complete
from mmfn.parallel.weights.hosted import copy_of, handles, to_host
from mmfn.parallel.weights.sharding import check_alike, check_shards, like, local, place_state, shardings
from mmfn.spec import trained_paths
from mmfn.train import optim
from mmfn.train.guard import PLAIN, Guard
from mmfn.train.objective import Named, Objective, loss_fn, resolve, weigh
from mmfn.train.optim import Leaves, Transform, Update, UpdateFn, facts_of
from mmfn.train.rule_updates import RuleUpdate, rule_updates
from mmfn.train.schedule import Schedule
from mmfn.tree import Tree

State = dict[str, Any]
Metrics = dict[str, Tensor]
Step = Callable[[State, Sequence[Batch]], tuple[State, Metrics]]
Gradients = Callable[[Tree, Batch], tuple[Leaves, Metrics]]


def init_state(
    params: Tree,
    optimizer: Transform,
    specs: Tree | None = None,
    guard: Guard = PLAIN,
    device: torch.device | None = None,
) -> State:
    """The state before the first step. It holds `params` themselves: a donating step overwrites them.

    `device`: where steps are computed, needed where parameters are not there (default: where they are). An optimizer
    that moves parameters finds them in the host's memory: those that do not lie there yet, pinned, are copied.

    On a mesh the optimizer runs on shards, and what it keeps for a leaf is placed as the leaf is. It keeps nothing for
    leaves that `specs` (those of the program; default: every leaf is trained) say are frozen. Raises ValueError where
    some leaves are shards and others whole.
    """
    check_alike(params)
    device = device or local(tree.leaves(params)[0]).device
    if "parameters" in optimizer.on_host:
        params = to_host(params, device)
    leaves = dict(tree.items(params))
    if specs is not None:
        leaves = {path: leaves[path] for path in trained_paths(specs)}
    opt = optimizer.init({path: local(leaf) for path, leaf in leaves.items()})
    return {
        "params": params,
        "opt": place_state(opt, leaves),
        "guard": guard.init(device),
        "step": torch.zeros((), dtype=torch.int64),
    }


def make_step(
    family: Family,
    cfg: Any,
    program: Program,
    objective: Named,
    optimizer: Transform,
    *,
    schedule: Schedule,
    guard: Guard = PLAIN,
    donate: bool = True,
    seed: int | None = 0,
) -> Step:
    """Build `step(state, microbatches) -> (state, metrics)`.

    Token weights are computed once over all micro-batches (unless these come weighed, as those of a run do, which has
    the counts of all ranks on the host: `objective.weigh_by`), their gradients are summed (several: in float32 or
    wider), and the optimizer runs once. `metrics`, all 0-D tensors: `loss`, `tokens` (supervised), `grad_norm` (before
    clipping), `lr`, `skipped` (1 where loss or gradient norm are not finite, or a spike by `guard`: then parameters and
    `state["opt"]` stay as they were) and `in_a_row` (skipped steps up to this one).

    `donate`: the given state is consumed, its tensors overwritten and returned; with False it is left as it was. This
    is the only place where that is decided. On a mesh, `microbatches` are this rank's shares (`program.split` of each),
    equally many on all ranks and with one number of segments, and the metrics those of the global batch.

    `seed`: of the dropout masks of adapters, which are functions of (seed, step, path, token, feature) and so the same
    on any mesh and in any split (None: masks without values, for a plan).

    Under `compiled("layer")` the update is one graph beside those of the blocks; under `compiled("step")` a step with
    one micro-batch is one graph, and one with several runs a graph per micro-batch and one for the update (one graph
    can recompute activations for one backward pass only).

    Raises ValueError for an unknown objective, for optimizer patterns that match no parameter, where only one of
    program and optimizer takes parameters to lie on the host, and, when called, for an empty list of micro-batches and
    for parameters that are not cut as the program's mesh cuts them.
    """
    program = lower(program)
    _check_hosted(program, optimizer)
    paths = trained_paths(program.specs)
    places = [i for i, leaf in enumerate(tree.leaves(program.specs)) if not leaf.is_frozen]
    expected = shardings(program.specs, program.mesh)
    exchange, salts = partial(all_counts, mesh=program.mesh), salts_of(program.specs, seed)
    chosen = resolve(objective)
    gradients = _gradients(paths, places, family, cfg, program, chosen)
    is_compiled = program.compile != "none" and optimizer.is_traceable
    if program.compile == "step" and not optimizer.is_traceable:
        raise UserError("compiled('step') has no place for an optimizer on_host; use compiled('layer')")
    kernel = "traced" if is_compiled else "fused"
    ruled, update_ruled = rule_updates(family, cfg, program.specs, program.mesh)
    ruled_places = [i for i, path in enumerate(tree.paths(program.specs)) if path in ruled]
    optimize = optimizer.update(facts_of(program.specs, program.mesh))
    apply_ = _apply(optimize, update_ruled, schedule, guard, kernel, program.mesh)

    def ready(state: State, microbatches: Sequence[Batch]) -> list[Batch]:
        """The micro-batches with the weights of their tokens, and what they drop in this step."""
        is_weighed = bool(microbatches) and all(batch.is_weighed for batch in microbatches)
        weighed = list(microbatches) if is_weighed else weigh(microbatches, chosen, exchange)
        if salts is None:
            return weighed
        own = salts(state["step"], weighed[0].tokens_T.device)
        return [replace(batch, salts=own) for batch in weighed]

    def one(state: State, batch: Batch) -> tuple[State, Metrics]:
        (given,) = ready(state, [batch])
        return update(state, apply_, *gradients(state["params"], given))

    def update(state: State, run: Callable[..., Any], grads: Leaves, sums: Metrics) -> tuple[State, Metrics]:
        written = zip((*paths, *ruled), _select(state["params"], (*places, *ruled_places)), strict=True)
        leaves = {path: local(leaf) for path, leaf in written}
        kept = {"opt": tree.map(local, state["opt"]), "guard": state["guard"]}
        new, metrics = run(leaves, grads, kept, state["step"], sums)
        return new, metrics

    run_one = program.jit(one) if program.compile == "step" else one
    run_gradients = program.jit(gradients) if program.compile == "step" else gradients
    run_apply = program.jit(apply_) if is_compiled else apply_

    @torch.no_grad()
    def step(state: State, microbatches: Sequence[Batch]) -> tuple[State, Metrics]:
        check_shards(state["params"], expected)
        if not donate:
            if optimizer.on_host and microbatches:
                complete(microbatches[0].tokens_T.device)  # copies to the host may be under way
            state = tree.map(copy_of, state)
        with program.compiling():
            if program.compile == "step" and len(microbatches) == 1:
                new, metrics = run_one(state, microbatches[0])
            else:
                grads, sums = scan_gradients(run_gradients, state["params"], ready(state, microbatches))
                owned = dict(zip(grads, optim.own(list(grads.values())), strict=True))
                new, metrics = update(state, run_apply, owned, sums)
        opt = tree.map(like, new["opt"], state["opt"])  # outside of any graph: it looks at memory
        return {"params": state["params"], "opt": opt, "guard": new["guard"], "step": state["step"] + 1}, metrics

    return step


def _check_hosted(program: Program, optimizer: Transform) -> None:
    is_moved = "parameters" in optimizer.on_host
    if program.weights.is_hosted and not is_moved:
        raise UserError(
            "the program has offload('parameters') but the optimizer updates parameters on the device; wrap it in "
            "on_host(..., what=('parameters',))"
        )
    if is_moved and not program.weights.is_hosted:
        raise UserError(
            "the optimizer is on_host(..., what=('parameters', ...)) but the program has its parameters on the device; "
            "add offload('parameters') to it"
        )


def _select(params: Tree, places: Sequence[int]) -> list[Any]:
    leaves = tree.leaves(params)
    return [leaves[i] for i in places]


def _gradients(
    paths: Sequence[str], places: Sequence[int], family: Family, cfg: Any, program: Program, objective: Objective
) -> Gradients:
    """Gradients of the leaves at `places`: autograd knows of no others, and keeps nothing for what lies before them."""

    def loss(trained: Sequence[Tensor], params: Tree, values: Tree, batch: Batch) -> tuple[Tensor, Metrics]:
        leaves, structure = tree.flatten(params)
        for i, leaf in zip(places, trained, strict=True):
            leaves[i] = leaf
        given = program.enter(tree.unflatten(structure, leaves), values)
        return loss_fn(given, batch, family, cfg, program.ops, objective)

    differentiate = value_and_grad(loss, has_aux=True)

    def gradients(params: Tree, batch: Batch) -> tuple[Leaves, Metrics]:
        stands = handles(params, batch.tokens_T.device) if program.weights.is_hosted else params
        (_, metrics), grads = differentiate(_select(stands, places), stands, params, batch)
        return {path: local(grad) for path, grad in zip(paths, grads, strict=True)}, metrics

    return gradients


def _apply(
    update: UpdateFn, update_ruled: RuleUpdate, schedule: Schedule, guard: Guard, kernel: str, mesh: Mesh
) -> Callable[..., tuple[State, Metrics]]:
    """`apply_(params, grads, kept, step, sums) -> (kept, metrics)`: one update of this rank's shards.

    Parameters, those that a gradient and those that a rule updates, are written in place. `kept`: "opt" and "guard" of
    the state. `sums`: this rank's shares of metrics and counts, summed here along with the norm.
    """

    def apply_(params: Leaves, grads: Leaves, kept: State, step: Tensor, sums: Metrics) -> tuple[State, Metrics]:
        lr = schedule(step)
        norm, sums = norm_and_sums(optim.global_norm(grads), sums, mesh)
        is_taken, counters = guard.judge(kept["guard"], sums["loss"], norm)
        sums = update_ruled(params, sums, is_taken)
        trained = {path: params[path] for path in grads}
        given = Update(params=trained, grads=grads, norm=norm, finite=is_taken, lr=lr, step=step, kernel=kernel)
        _, opt = update(given, kept["opt"])
        skips = {"skipped": (~is_taken).to(torch.int64), "in_a_row": counters["in_a_row"]}
        return {"opt": opt, "guard": counters}, {**sums, "grad_norm": norm, "lr": lr, **skips}

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
            dtype = wide(grad.dtype)
            total[path] = grad.to(dtype) + more.pop(path).to(dtype)
        sums = {name: value + metrics[name] for name, value in sums.items()}
    return total, sums
