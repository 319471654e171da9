"""`on_host`: an optimizer whose state, or whose parameters, lie in the host's memory between updates."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from mmfn import tree
from mmfn.errors import UserError
from mmfn.parallel.weights.host_memory import HOST_DEVICE, HostMemory, counted_empty
from mmfn.parallel.weights.streams import Arrival
from mmfn.train.optim.transform import Facts, Leaves, Transform, Update, UpdateFn
from mmfn.tree import Tree

GROUP_VALUES = 2**26  # values of the leaves that are updated together: 0.5 GiB of AdamW's moments
HOST_KINDS = ("optimizer", "parameters")


def on_host(
    transform: Transform,
    group_values: int = GROUP_VALUES,
    *,
    what: Collection[str] = ("optimizer",),
    device: torch.device | None = None,
) -> Transform:
    """`transform`, whose state is the same but lies on the host; single numbers (counts) stay on the device.

    `what`: "optimizer", its state; "parameters", those that are updated, of a program with `offload("parameters")`;
    or both. `device`: where updates are made, needed with parameters that are not there (default: where they are).

    Leaves are updated in groups of up to `group_values` values, counted of whole leaves, so that the ranks of a mesh
    agree. While one group is updated, what the next needs is copied in and that of the one before out: the device
    holds that of three groups. Copies run on a stream of their own and the host does not wait for them: read the state
    on the device, or synchronise before. The update is not traced: it stays eager under `compiled("layer")`, and
    `compiled("step")` is refused. Gradients are on the device, all of them, and parameters are written in place: it
    wraps all that reads or writes them. Raises ValueError where `what` names nothing, or something else.
    """
    if not what or not set(what) <= set(HOST_KINDS):
        raise UserError(f"on_host got what={list(what)} but moves optimizer and parameters; name one of them or both")
    memory, kinds = HostMemory(), frozenset(what)

    def init(params: Leaves) -> Tree:
        place = device or next(iter(params.values())).device
        state = transform.init({path: leaf.to(HOST_DEVICE) for path, leaf in params.items()})
        if "optimizer" not in kinds:
            return tree.map(lambda x: x.to(place), state)
        return tree.map(lambda x: memory.take(x, place).copy_(x) if x.ndim else x.to(place), state)

    def update(facts: Mapping[str, Facts]) -> UpdateFn:
        fn, groups = transform.update(facts), _groups(facts, group_values)

        def run(u: Update, state: Tree) -> tuple[Update, Tree]:
            place = next(iter(u.grads.values())).device
            kept = [
                _Kept({p: u.params[p] for p in group}, _without(state, facts.keys() - set(group))) for group in groups
            ]
            done: list[Tree] = []
            coming, leaving = _copy_in(kept[0], kinds, place, memory), Arrival()
            for i, group in enumerate(groups):
                own = coming
                if i + 1 < len(groups):
                    coming = _copy_in(kept[i + 1], kinds, place, memory)
                own.arrival.wait()
                part = replace(u, params=own.params, grads={p: u.grads[p] for p in group})
                _, new = fn(part, own.state)
                leaving.wait()  # until here, `moved` keeps what leaves
                moved = _moved(kept[i], own._replace(state=new), kinds)
                leaving = memory.copy(moved)
                done.append(tree.map(lambda old, x: old if x.ndim and "optimizer" in kinds else x, kept[i].state, new))
            leaving.wait()
            return u, _join(done)

        return run

    moved = transform.on_host | kinds
    return Transform(init=init, update=update, is_traceable=False, on_host=moved, stage=transform.stage)


class _Kept(NamedTuple):
    """What a group of leaves is updated from, where it lies between updates."""

    params: Leaves
    state: Tree


class _Moved(NamedTuple):
    """The same on its way to the device."""

    params: Leaves
    state: Tree
    arrival: Arrival


def _copy_in(kept: _Kept, kinds: frozenset[str], device: torch.device, memory: HostMemory) -> _Moved:
    """A copy on the device: also of single numbers, which a transform may overwrite for each group."""

    def make(x: Tensor) -> Tensor:
        if not x.ndim:
            return x.clone()
        return counted_empty(x, device, "optimizer") if "optimizer" in kinds else x

    params, state = kept.params, tree.map(make, kept.state)
    if "parameters" in kinds:
        params = {path: counted_empty(x, device, "parameters") for path, x in params.items()}
    there = _Moved(params, state, Arrival())
    return there._replace(arrival=memory.copy([(to, x) for x, to in _moved(kept, there, kinds)]))


def _moved(kept: _Kept, there: _Moved, kinds: frozenset[str]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of what lies on the host and its copy on the device."""
    pairs: list[tuple[Tensor, Tensor]] = []
    if "optimizer" in kinds:
        both = zip(tree.leaves(kept.state), tree.leaves(there.state), strict=True)
        pairs += [(x, copy) for x, copy in both if x.ndim]
    if "parameters" in kinds:
        pairs += [(x, there.params[path]) for path, x in kept.params.items()]
    return pairs


def _groups(facts: Mapping[str, Facts], group_values: int) -> list[list[str]]:
    """Paths in order, cut where a group would become too large; a group has at least one leaf."""
    groups: list[list[str]] = [[]]
    total = 0
    for path, known in facts.items():
        total += prod(known.shape)
        if groups[-1] and total > group_values:
            groups.append([])
            total = prod(known.shape)
        groups[-1].append(path)
    return groups


def _without(state: Tree, paths: Collection[str]) -> Tree:
    """The state without what is keyed by some paths."""
    if isinstance(state, Mapping):
        return {key: _without(value, paths) for key, value in state.items() if key not in paths}
    return [_without(value, paths) for value in state] if isinstance(state, list) else state


def _join(states: Sequence[Tree]) -> Tree:
    """States of different leaves as one; of what is keyed by none, the first."""
    first = states[0]
    if isinstance(first, Mapping):
        keys = {key: None for state in states for key in state}
        return {key: _join([state[key] for state in states if key in state]) for key in keys}
    return [_join(list(same)) for same in zip(*states, strict=True)] if isinstance(first, list) else first
