"""`Resharded`: whole weights that autograd does not keep from a block's forward to its backward.

Of a whole weight that is saved, or a view of one, autograd is given only what part of which weight it is. Where the
backward first asks for one, the block's weights are gathered again, all at once; each is gone with the last node that
saved it. Nothing is computed again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mmfn import tree
from mmfn.parallel.weights.gather import BlockWeights, Gather
from mmfn.parallel.weights.recompute import Recomputed
from mmfn.parallel.weights.views import View
from mmfn.torch_private import saving_hooks, storage_key
from mmfn.tree import Tree


def wrap_stack_with_reshard(stack: Callable[..., Any], gather: Gather, take: Callable[..., Tree]) -> Callable[..., Any]:
    """`ops.stack` whose blocks give their whole weights back behind their forward, and gather them again.

    `take`: the gather that the backward calls, `gather` itself or around it what watches it. Blocks that are computed
    again gather again in any case. Not inside of graphs, which save what they like.
    """

    def run_stack(run: Callable[..., Any], block: Any, layers: Sequence[Tree], *xs: Any, **kwargs: Any) -> Any:
        def run_block(block: Any, params: Any, *xs: Any) -> tuple[Tensor, Any]:
            if isinstance(block, Recomputed):
                out: tuple[Tensor, Any] = run(block, params, *xs)
                return out
            return Resharded(params, take).run(run, block, *xs)

        return stack(run_block, block, [gather.block(params) for params in layers], *xs, **kwargs)

    return run_stack


@dataclass(eq=False)
class _Whole:
    """A whole weight that nodes have saved: None from the forward until a backward asks for a weight of the block."""

    tensor: Tensor | None = None


@dataclass(frozen=True)
class _WholeView:
    """A saved tensor as a part of a whole weight."""

    whole: _Whole
    view: View


@dataclass(eq=False)
class Resharded:
    """The saved weights of one block, each alive as long as a node that saved it: this knows them, and keeps none."""

    block: BlockWeights
    take: Callable[[BlockWeights], Tree]
    saved: WeakValueDictionary[int, _Whole] = field(default_factory=WeakValueDictionary, init=False)  # by position
    by_storage: dict[int, tuple[int, Tensor]] = field(default_factory=dict, init=False)  # position and leaf

    def run(self, run: Callable[..., Any], block: Any, *xs: Any) -> tuple[Tensor, Any]:
        """The block's forward. What it saves that is no weight goes where it would go without this."""
        outer = saving_hooks()

        def pack(x: Tensor) -> Any:
            view = self._view(x)
            return view if view is not None else x if outer is None else outer[0](x)

        def unpack(saved: Any) -> Tensor:
            if isinstance(saved, _WholeView):
                return self._unpack(saved)
            x: Tensor = saved if outer is None else outer[1](saved)
            return x

        self.block.on_take = self._begin
        with saved_tensors_hooks(pack, unpack):
            out: tuple[Tensor, Any] = run(block, self.block, *xs)
        self.block.on_take, self.block.is_gathered_again = None, bool(self.saved)
        self.by_storage.clear()
        return out

    def _begin(self, leaves: Sequence[Tensor]) -> None:
        """The block has its weights. Some may share a storage; then one of them stands for it."""
        for i, (weight, leaf) in enumerate(zip(self.block.weights, leaves, strict=True)):
            if weight.place is not None or weight.host is not None:
                self.by_storage.setdefault(storage_key(leaf.untyped_storage()), (i, leaf))

    def _view(self, x: Tensor) -> _WholeView | None:
        """What a tensor is of a whole weight, None where it is no part of one."""
        position, weight = self.by_storage.get(storage_key(x.untyped_storage()), (-1, x))
        if position < 0 or x.dtype != weight.dtype or (view := View.of(x, int(weight.storage_offset()))) is None:
            return None
        whole = self.saved.get(position)
        if whole is None:
            whole = self.saved[position] = _Whole()
        return _WholeView(whole, view)

    @torch.no_grad()
    def _unpack(self, saved: _WholeView) -> Tensor:
        if saved.whole.tensor is None:
            leaves = tree.leaves(self.take(self.block))
            for position, whole in self.saved.items():
                whole.tensor = leaves[position]
        weight = saved.whole.tensor
        assert weight is not None, "a view keeps its weight in `saved`"
        return saved.view.on(weight)
