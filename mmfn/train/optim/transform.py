"""`Transform(init, update)`: what optimizers are made of, and how transforms are combined.

A chain makes one pass over memory: `clip_by_global_norm` only sets `Update.scale`, and the transform that writes
parameters folds it in. Leaves are keyed by slash path throughout, so optimizer state needs no second structure:
`state["m"]["text/embed/weight"]`.

What never changes during a run is known before the first update: `Transform.update` takes the `Facts` of every leaf and
returns the function that runs in each step. So patterns are resolved (and misspelt ones refused) once, outside of any
graph, and a transform that wraps another hands it other facts.

Donation: the tensors of `Update.params`, `Update.grads` and of the state given to an update function are consumed;
it may overwrite and return them. `mmfn.train.step.make_step` is the one place that decides whether a caller's
tensors are given away.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from mmfn import tree
from mmfn.dtypes import wide
from mmfn.errors import UserError
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.layout import Mesh
from mmfn.parallel.weights.sharding import cuts
from mmfn.spec import ParamSpec
from mmfn.torch_private import storage_key
from mmfn.train.schedule import Schedule
from mmfn.tree import Tree

T = TypeVar("T")
Leaves = dict[str, Tensor]  # slash path -> tensor
Rules = Sequence[tuple[str, float]]  # (regex over paths, value); first full match wins

LAYER = re.compile(r"(.*/layers)/(\d+)/.*")  # a stack and the number of a block in it
KERNELS = ("fused", "traced", "reference")
"""Fused in-place kernels; the same as operators `torch.compile` can put into a graph; the written formulas."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """One update on its way through a chain.

    `params`, `grads`: tensors by path, on a mesh this rank's shards, of all leaves or (see `on_host`) of some, which
    alone are updated then; gradients have the dtype of their parameter or wider. `norm`: 0-D, the global gradient norm.
    `finite`: 0-D bool; where false, parameters and state stay as they are. `lr`: 0-D, the run's learning rate, and
    `step`: 0-D, the number of completed steps, what other schedules start from. `scale`: 0-D factor the gradients are
    still to be multiplied with (None: 1). `kernel`: how leaves are written, a name in `KERNELS`; the caller's choice,
    never found out here.
    """

    params: Leaves
    grads: Leaves
    norm: Tensor
    finite: Tensor
    lr: Tensor
    step: Tensor
    scale: Tensor | None = None
    kernel: str = "fused"


@dataclass(frozen=True, kw_only=True)
class Rate:
    """The learning rate of a leaf: a schedule (None: the run's) times a factor."""

    scale: float = 1.0
    schedule: Schedule | None = None

    def at(self, u: Update) -> Tensor:
        """0-D learning rate of an update."""
        return (u.lr if self.schedule is None else self.schedule(u.step)) * self.scale


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is static about a leaf.

    `shape`: of the whole leaf; `parts`: see `ParamSpec`. `cuts`: where this rank's shard is cut, `(dim, axis)` for each
    axis of several ranks; `copies`: the axis of ranks that hold the same shard. `distance`: in blocks, see `distances`.
    `rate` and `is_decayed`: see `by_path`.
    """

    shape: tuple[int, ...]
    parts: int = 1
    cuts: tuple[tuple[int, Axis], ...] = ()
    copies: Axis = field(default_factory=lambda: Axis(name="replicate"))
    distance: int = 0
    rate: Rate = Rate()
    is_decayed: bool = True


UpdateFn = Callable[[Update, Tree], tuple[Update, Tree]]  # (update, state) -> (update, state)


@dataclass(frozen=True, kw_only=True)
class Transform:
    """`init(params: Leaves) -> state`; `update(facts by path) -> UpdateFn`.

    `is_traceable`: it may be compiled. `on_host`: what it moves from the host and back (see `on_host`). `stage`: one of
    `STAGES`, or "" for one that may stand anywhere in a chain.
    """

    init: Callable[[Leaves], Tree]
    update: Callable[[Mapping[str, Facts]], UpdateFn]
    is_traceable: bool = True
    on_host: frozenset[str] = frozenset()
    stage: str = ""


WORK = {"scale": "scale gradients", "write": "update parameters", "read": "read updated parameters"}
STAGES = tuple(WORK)  # in the order of a chain


def facts_of(specs: Tree, mesh: Mesh) -> dict[str, Facts]:
    """The facts, by path, of the leaves that are trained, as a rank of `mesh` holds them.

    `specs`: of all leaves (ParamSpec), since a block stands where it does whether or not those around it are frozen.
    """
    leaves: list[tuple[str, ParamSpec]] = tree.items(specs)
    far, copies = distances([path for path, _ in leaves]), mesh["replicate"]
    return {
        path: Facts(shape=spec.shape, parts=spec.parts, cuts=cuts(spec, mesh, path), copies=copies, distance=far[path])
        for path, spec in leaves
        if not spec.is_frozen
    }


def distances(paths: Sequence[str]) -> dict[str, int]:
    """How many blocks behind the end each leaf is, for layer-wise learning rates as for fine-tuning encoders.

    The distance of a block is counted back from the last one of its stack (`.../layers/7/...`), which has 0. Leaves
    outside of stacks stand behind all text blocks and have 0, but embeddings (and positions) before the first block
    of theirs. Source: Bao et al. 2022 (BEiT), appendix; Clark et al. 2020 (ELECTRA), section 3.
    """
    found = {path: LAYER.fullmatch(path) for path in paths}
    last: dict[str, int] = {}
    for match in filter(None, found.values()):
        last[match[1]] = max(last.get(match[1], 0), int(match[2]))

    def distance(path: str) -> int:
        if match := found[path]:
            return last[match[1]] - int(match[2])
        stack = f"{path.split('/')[0]}/layers"
        is_input = any(part in ("embed", "patch_embed", "positions") for part in path.split("/"))
        return last[stack] + 1 if is_input and stack in last else 0

    return {path: distance(path) for path in paths}


def chain(*transforms: Transform) -> Transform:
    """Apply transforms left to right; the state is the list of their states.

    Raises ValueError when there are none, and for one behind what it should come before: a clip behind adamw clips
    nothing.
    """
    if not transforms:
        raise UserError("chain() received no transform; give at least one, such as adamw()")
    stages = [t.stage for t in transforms if t.stage]
    for before, stage in pairwise(stages):
        if STAGES.index(stage) < STAGES.index(before):
            raise UserError(
                f"chain() got what is to {WORK[stage]} behind what is to {WORK[before]}, where it changes nothing or "
                "comes a step late; put it before: chain(clip_by_global_norm(1.0), adamw(), ema(0.999))"
            )

    def update(facts: Mapping[str, Facts]) -> UpdateFn:
        fns = [t.update(facts) for t in transforms]

        def run(u: Update, state: Tree) -> tuple[Update, Tree]:
            new = []
            for fn, own in zip(fns, state, strict=True):
                u, own = fn(u, own)
                new.append(own)
            return u, new

        return run

    return Transform(
        init=lambda params: [t.init(params) for t in transforms],
        update=update,
        is_traceable=all(t.is_traceable for t in transforms),
        on_host=frozenset().union(*(t.on_host for t in transforms)),
        stage="write" if "write" in stages else (stages or [""])[-1],
    )


def masked(transform: Transform, patterns: Sequence[str]) -> Transform:
    """Restrict `transform` to the leaves whose path fully matches one of the regexes; others pass untouched.

    Several masked transforms in a chain update different leaves by different rules. The global norm stays that of all
    leaves. Raises ValueError, at `init` and `update`, for a pattern that matches no path.
    """

    def init(params: Leaves) -> Tree:
        return transform.init({p: params[p] for p in _select(params, patterns)})

    def update(facts: Mapping[str, Facts]) -> UpdateFn:
        chosen = _select(facts, patterns)
        inner = transform.update({p: facts[p] for p in chosen})

        def run(u: Update, state: Tree) -> tuple[Update, Tree]:
            given = [p for p in chosen if p in u.params]
            part = replace(u, params={p: u.params[p] for p in given}, grads={p: u.grads[p] for p in given})
            done, state = inner(part, state)
            return replace(u, params={**u.params, **done.params}), state

        return run

    return replace(transform, init=init, update=update)


def master(transform: Transform) -> Transform:
    """Update float32 copies of the parameters that are narrower; such a parameter is the rounding of its copy.

    State: `{"master": the copies by path, "inner": the state of transform}`. Without them updates below half a unit in
    the last place of a bfloat16 parameter (1 / 256 of its size) are lost.
    """

    def init(params: Leaves) -> Tree:
        copies = {p: x.to(wide(x.dtype)) for p, x in params.items() if x.dtype != wide(x.dtype)}
        return {"master": copies, "inner": transform.init({**params, **copies})}

    def update(facts: Mapping[str, Facts]) -> UpdateFn:
        inner = transform.update(facts)

        def run(u: Update, state: Tree) -> tuple[Update, Tree]:
            copies = state["master"]
            done, own = inner(replace(u, params={**u.params, **copies}), state["inner"])
            for path in copies:
                u.params[path].copy_(done.params[path])
            return replace(done, params=u.params), {"master": {p: done.params[p] for p in copies}, "inner": own}

        return run

    return replace(transform, init=init, update=update)


def zeros_like(params: Leaves) -> Leaves:
    """A zero for every parameter value, in the dtype to accumulate in."""
    return {p: torch.zeros(x.shape, dtype=wide(x.dtype), device=x.device) for p, x in params.items()}


def own(grads: Sequence[Tensor]) -> list[Tensor]:
    """`grads`, each dense in its own memory, copied where needed: kernels walk raw memory and overwrite it.

    Autograd may return one tensor for two leaves, an expanded one, or a transposed one.
    """
    seen: set[tuple[int, int]] = set()
    out = []
    for grad in grads:
        owned = grad.clone(memory_format=torch.contiguous_format) if _place(grad) in seen else grad.contiguous()
        seen.add(_place(owned))
        out.append(owned)
    return out


def values(paths: Mapping[str, object], rules: Sequence[tuple[str, T]], default: T) -> dict[str, T]:
    """`tree.mask` over paths: the value of each; a rule that matches nothing raises ValueError."""
    found: dict[str, T] = tree.mask(dict.fromkeys(paths, 0), rules, default)
    return found


def _place(x: Tensor) -> tuple[int, int]:
    """Where a tensor's memory starts; unlike an address it is also known on the meta device."""
    return storage_key(x.untyped_storage()), int(x.storage_offset())


def _select(paths: Mapping[str, object], patterns: Sequence[str]) -> list[str]:
    chosen = values(paths, [(pattern, True) for pattern in patterns], False)
    return [p for p in paths if chosen[p]]
