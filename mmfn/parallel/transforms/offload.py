"""`offload`: what the device does not need for a while lies in the host's memory meanwhile."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mmfn import tree
from mmfn.errors import UserError
from mmfn.parallel.program import Program, Transform, noted
from mmfn.parallel.weights.gather import BlockWeights, Weight
from mmfn.parallel.weights.host_memory import HostMemory, counted_empty
from mmfn.parallel.weights.prefetch import on_gradient
from mmfn.parallel.weights.sharding import local
from mmfn.parallel.weights.streams import Arrival
from mmfn.parallel.weights.views import View, flat_storage
from mmfn.torch_private import storage_key

OFFLOAD_KINDS = ("activations", "parameters")
LEAST_BYTES = 4096  # what is smaller stays: a copy costs more than it saves


def offload(what: str) -> Transform:
    """Keep on the host what blocks keep for their backward, or the parameters between their uses.

    "activations": while a block runs, what the one before keeps is copied out, and freed when the block is done; when
    the gradient reaches a block, what the one before keeps is copied back. So the device holds that of two blocks, and
    the last block of a stack keeps its own. With `remat("full")` that is the blocks' inputs alone; what "selective"
    saves stays. Weights a block has gathered or fetched are part of what it keeps, unless it is computed again.

    "parameters": this rank's shards, or whole leaves (`weights.hosted.to_host`), are copied to the device when a
    block gathers them, the frozen ones too. The copies are freed when it is done with them: with `remat` at the end of
    its forward, and again of its backward; without, or with `keep_gathered`, of its backward alone. With `prefetch` the
    copies of the next block are under way while one runs. So with `remat("full")` the device holds, in place of all
    parameters, those of two blocks (of several ranks: gathered, and the shards of a third), embedding or head while in
    use, and from their forward on those of what is no block and keeps them for its backward (mergers of a tower).
    Gradients stay on the device until the update, which moves groups of leaves: the optimizer must be wrapped in
    `on_host(..., what=("parameters",))`. A compiled block's copies are part of its graph, and none of them ahead.

    Copies run on a stream of their own from and to pinned memory, and the host never waits. Placements do not change.
    Raises ValueError for anything else (the state of an optimizer: `mmfn.train.optim.on_host`), and when the program is
    lowered with `compiled("step")`.
    """
    if what not in OFFLOAD_KINDS:
        kinds = " or ".join(map(repr, OFFLOAD_KINDS))
        raise UserError(f"offload({what!r}) is unknown; use {kinds}, and on_host for an optimizer's state")

    def transform(program: Program) -> Program:
        if what == "parameters":
            hosted = replace(program, weights=replace(program.weights, is_hosted=True))
            return noted(hosted, "offload: parameters to the host")
        stack = wrap_stack_with_offload(program.ops.stack, HostMemory())
        done = replace(program, ops=replace(program.ops, stack=stack), is_offloaded=True)
        return noted(done, "offload: activations to the host")

    return transform


def wrap_stack_with_offload(stack: Callable[..., Any], memory: HostMemory) -> Callable[..., Any]:
    """`ops.stack` whose blocks keep their activations on the host."""

    def outer(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        last: list[_Stash] = []  # of the block before

        def run_block(block: Any, params: Any, x: Tensor, *xs: Any) -> tuple[Tensor, Any]:
            own, before = _Stash(memory, _storages((params, xs))), last.pop() if last else None
            if before is not None:
                before.send()
            with saved_tensors_hooks(own.pack, own.unpack):
                x, out = run(block, params, x, *xs)
            if not x.requires_grad:
                own.kept.clear()  # of a frozen block: no gradient comes to bring it back
            last.append(own)
            if before is not None:
                before.release()
            return on_gradient(x, partial(_reached, own, before)), out

        return stack(run_block, *args, **kwargs)

    return outer


@dataclass(eq=False)
class _Stored:
    """One storage: `flat` on its device, `host` on the host, or (while a copy is under way) both."""

    flat: Tensor | None
    device: torch.device
    host: Tensor | None = None


@dataclass(frozen=True)
class _StoredView:
    """A saved tensor as a part of its storage."""

    stored: _Stored
    view: View


@dataclass(eq=False)
class _Stash:
    """What one block keeps for its backward, by storage; `stays`: storages that are not the block's own."""

    memory: HostMemory
    stays: set[int]
    kept: dict[int, _Stored] = field(default_factory=dict)
    sent: Arrival = field(default_factory=Arrival)
    fetched: Arrival = field(default_factory=Arrival)

    @torch.no_grad()
    def pack(self, x: Tensor) -> Tensor | _StoredView:
        """Note a tensor that autograd saves."""
        storage = x.untyped_storage()
        key = storage_key(storage)
        if key in self.stays or storage.nbytes() < LEAST_BYTES or (view := View.of(x)) is None:
            return x.detach()
        if key not in self.kept:
            self.kept[key] = _Stored(flat_storage(x), x.device)
        return _StoredView(self.kept[key], view)

    @torch.no_grad()
    def unpack(self, saved: Tensor | _StoredView) -> Tensor:
        """The saved tensor; usually it has been fetched ahead."""
        if isinstance(saved, Tensor):
            return saved
        if saved.stored.flat is None:
            self.fetch()
        self.fetched.wait()
        assert saved.stored.flat is not None, "fetched"
        return saved.view.on(saved.stored.flat)

    @torch.no_grad()
    def send(self) -> None:
        """Start the copies to the host."""
        pairs = []
        for stored in self.kept.values():
            assert stored.flat is not None, "sent once"
            stored.host = self.memory.take(stored.flat)
            pairs.append((stored.host, stored.flat))
        self.sent = self.memory.copy(pairs)

    def release(self) -> None:
        """Free the device's memory, behind the copies."""
        self.sent.wait()
        for stored in self.kept.values():
            stored.flat = None

    @torch.no_grad()
    def fetch(self) -> None:
        """Start the copies back, and give the host's buffers back behind them."""
        if not self.kept:
            return
        pairs = []
        for stored in self.kept.values():
            assert stored.host is not None, "fetched once"
            stored.flat = counted_empty(stored.host, stored.device, "offloaded")
            pairs.append((stored.flat, stored.host))
            stored.host = None
        self.fetched = self.memory.copy(pairs)
        self.memory.give([host for _, host in pairs])
        self.kept.clear()  # from here on, only autograd keeps them

    def reach(self) -> None:
        """The gradient is here: what was never sent is let go, and nothing is freed while it is still on its way."""
        if any(stored.flat is None for stored in self.kept.values()):
            self.fetch()  # no gradient came through the block behind
        self.fetched.wait()
        self.kept.clear()


def _reached(own: _Stash, before: _Stash | None) -> None:
    own.reach()
    if before is not None:
        before.fetch()


def _storages(values: Any) -> set[int]:
    """Storages of all tensors, those of parameters on their way to `gather` included."""
    found: set[int] = set()
    for value in tree.leaves(values):
        if isinstance(value, BlockWeights):
            found |= _storages(value.weights)
        elif isinstance(value, Tensor | Weight):
            found.add(storage_key(local(value.leaf if isinstance(value, Weight) else value).untyped_storage()))
    return found
