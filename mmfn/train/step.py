"""The training step: `step(state, microbatches) -> (state, metrics)`, a pure function over a pytree of state.

`state = {"params", "opt", "guard", "step"}`: the parameter tree, the optimizer's state, the counters of skipped steps
(`mmfn.train.guard`) and the number of steps, an int64 0-D tensor on the host. Everything that is decided from values
(clipping, skipping a step) is decided on the device, so a step never waits for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from mmfn import tree
from mmfn.batch import Batch
from mmfn.errors import UserError
from mmfn.lora import Salts, salts_of
from mmfn.models import Family
from mmfn.parallel.mesh.layout import Mesh
from mmfn.parallel.mesh.step_sums import all_counts
from mmfn.parallel.program import Program, lower
from mmfn.parallel.weights.host_memory import complete
from mmfn.parallel.weights.hosted import copy_of, to_host
from mmfn.parallel.weights.sharding import Sharding, check_alike, check_shards, like, local, place_state, shardings
from mmfn.spec import trained_paths
from mmfn.train.gradients import Gradients, Metrics, gradients_of, scan_gradients
from mmfn.train.guard import PLAIN, Guard
from mmfn.train.objective import Named, Objective, loss_weights, resolve, weigh
from mmfn.train.optim import Leaves, Transform, own
from mmfn.train.schedule import Schedule
from mmfn.train.update import Apply, update_of
from mmfn.tree import Tree

State = dict[str, Any]
Step = Callable[[State, Sequence[Batch]], tuple[State, Metrics]]


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

    Raises ValueError for an unknown objective, for a weight of a loss that the model does not have, for optimizer
    patterns that match no parameter, where only one of program and optimizer takes parameters to lie on the host, and,
    when called, for an empty list of micro-batches and for parameters that are not cut as the program's mesh cuts them.
    """
    program = lower(program)
    _check_hosted(program, optimizer)
    chosen = resolve(objective)
    loss_weights(chosen, family, cfg)  # an unknown name is found first
    gradients = gradients_of(family, cfg, program, chosen)
    kernel = "traced" if program.compile != "none" and optimizer.is_traceable else "fused"
    leaves, apply_ = update_of(family, cfg, program, optimizer, schedule, guard, kernel)
    return _Step(
        program=program,
        prepare=partial(prepare, objective=chosen, mesh=program.mesh, salts=salts_of(program.specs, seed)),
        gradients=gradients,
        leaves=leaves,
        apply_=apply_,
        donate=donate,
        has_copies=bool(optimizer.on_host),
    )


def prepare(
    microbatches: Sequence[Batch], step: Tensor, *, objective: Objective, mesh: Mesh, salts: Salts | None
) -> list[Batch]:
    """Micro-batches with the weights of their tokens, and what is dropped of them in this step."""
    is_weighed = bool(microbatches) and all(batch.is_weighed for batch in microbatches)
    weighed = list(microbatches) if is_weighed else weigh(microbatches, objective, partial(all_counts, mesh=mesh))
    if salts is None:
        return weighed
    of_step = salts(step, weighed[0].tokens_T.device)
    return [replace(batch, salts=of_step) for batch in weighed]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Step:
    """What `make_step` returns: the pieces of a step, and how they follow each other, eager or as graphs."""

    program: Program
    prepare: Callable[[Sequence[Batch], Tensor], list[Batch]]
    gradients: Gradients
    leaves: Callable[[Tree], Leaves]
    apply_: Apply
    donate: bool
    has_copies: bool  # the optimizer's copies to and from the host may be under way

    def __post_init__(self) -> None:
        if self.program.compile == "step" and self.has_copies:
            raise UserError("compiled('step') has no place for an optimizer on_host; use compiled('layer')")

    @torch.no_grad()
    def __call__(self, state: State, microbatches: Sequence[Batch]) -> tuple[State, Metrics]:
        """`(state, metrics)` behind the step; see `make_step`."""
        check_shards(state["params"], self._shardings)
        if not self.donate:
            if self.has_copies and microbatches:
                complete(microbatches[0].tokens_T.device)
            state = tree.map(copy_of, state)
        with self.program.compiling():
            if self.program.compile == "step" and len(microbatches) == 1:
                memory, metrics = self._whole_graph(state, microbatches[0])
            else:
                batches = self.prepare(microbatches, state["step"])
                sums = self.program.gradient_sums()
                grads, shares = scan_gradients(self._gradients_graph, state["params"], batches, sums)
                owned = dict(zip(grads, own(list(grads.values())), strict=True))
                memory, metrics = self._update(self._apply_graph, state, owned, shares)
        opt = tree.map(like, memory["opt"], state["opt"])  # outside of any graph: it looks at memory
        return {"params": state["params"], "opt": opt, "guard": memory["guard"], "step": state["step"] + 1}, metrics

    def _update(self, apply_: Apply, state: State, grads: Leaves, sums: Metrics) -> tuple[State, Metrics]:
        memory = {"opt": tree.map(local, state["opt"]), "guard": state["guard"]}
        return apply_(self.leaves(state["params"]), grads, memory, state["step"], sums)

    def _whole(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """A step of one micro-batch."""
        (ready,) = self.prepare([batch], state["step"])
        return self._update(self.apply_, state, *self.gradients(state["params"], ready, None))

    @cached_property
    def _shardings(self) -> dict[str, Sharding | None]:
        return shardings(self.program.specs, self.program.mesh)

    @cached_property
    def _whole_graph(self) -> Callable[..., tuple[State, Metrics]]:
        return self.program.jit(self._whole)

    @cached_property
    def _gradients_graph(self) -> Gradients:
        return self.program.jit(self.gradients) if self.program.compile == "step" else self.gradients

    @cached_property
    def _apply_graph(self) -> Apply:
        is_graph = self.program.compile != "none" and not self.has_copies
        return self.program.jit(self.apply_) if is_graph else self.apply_


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
