"""`on_host`: an optimizer whose state lies in the host's memory between updates."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

import torch

from mmfn import tree
from mmfn.parallel.host_memory import HOST_DEVICE, Arrival, HostMemory, counted_empty
from mmfn.train.optim.transform import Facts, Leaves, Transform, Update, UpdateFn
from mmfn.tree import Tree

GROUP_VALUES = 2**26  # values of the leaves that are updated together: 0.5 GiB of AdamW's moments


def on_host(transform: Transform, group_values: int = GROUP_VALUES) -> Transform:
    """`transform`, whose state is the same but lies on the host; single numbers (counts) stay on the device.

    Leaves are updated in groups of up to `group_values` values, counted of whole leaves, so that the ranks of a mesh
    agree. While one group is updated, the state of the next is copied in and that of the one before out: the device
    holds that of three groups. Copies run on a stream of their own and the host does not wait for them: read the state
    on the device, or synchronise before. The update is not traced: it stays eager under `compiled("layer")`, and
    `compiled("step")` is refused.
    """
    memory = HostMemory()

    def init(params: Leaves) -> Tree:
        device = next(iter(params.values())).device
        state = transform.init({path: leaf.to(HOST_DEVICE) for path, leaf in params.items()})
        return tree.map(lambda x: memory.take(x, device).copy_(x) if x.ndim else x.to(device), state)

    def update(facts: Mapping[str, Facts]) -> UpdateFn:
        fn, groups = transform.update(facts), _groups(facts, group_values)

        def run(u: Update, state: Tree) -> tuple[Update, Tree]:
            device = next(iter(u.params.values())).device
            kept = [_without(state, facts.keys() - set(group)) for group in groups]
            done: list[Tree] = []
            coming, leaving = _copy_in(kept[0], device, memory), Arrival()
            for i, group in enumerate(groups):
                own, coming = coming, _copy_in(kept[i + 1], device, memory) if i + 1 < len(groups) else coming
                own.arrival.wait()
                part = replace(u, params={p: u.params[p] for p in group}, grads={p: u.grads[p] for p in group})
                _, new = fn(part, own.state)
                leaving.wait()  # until here, `moved` keeps what leaves
                moved = [(old, x) for old, x in zip(tree.leaves(kept[i]), tree.leaves(new), strict=True) if x.ndim]
                leaving = memory.copy(moved)
                done.append(tree.map(lambda old, x: old if x.ndim else x, kept[i], new))
            leaving.wait()
            return u, _join(done)

        return run

    return Transform(init=init, update=update, is_traceable=False)


class _Moved(NamedTuple):
    """State on its way to the device."""

    state: Tree
    arrival: Arrival


def _copy_in(kept: Tree, device: torch.device, memory: HostMemory) -> _Moved:
    """A copy on the device: also of single numbers, which a transform may overwrite for each group."""
    state = tree.map(lambda x: counted_empty(x, device, "optimizer") if x.ndim else x.clone(), kept)
    pairs = [(to, x) for to, x in zip(tree.leaves(state), tree.leaves(kept), strict=True) if x.ndim]
    return _Moved(state, memory.copy(pairs))


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
