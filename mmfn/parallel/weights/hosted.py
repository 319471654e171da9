"""Parameters that lie in the host's memory: how they get there, and how a block gets copies of them on its device.

What autograd differentiates is a handle on the device, which has a parameter's shape, dtype and placement but the
memory of one value. Handle and values travel together (`gather.Weight`) to `Gather`, which copies them.
"""

from typing import Any

import torch
from torch import Tensor

from mmfn import tree
from mmfn.parallel.weights.host_memory import HOST, HOST_DEVICE, counted_empty, is_pinned_for
from mmfn.parallel.weights.sharding import like, local
from mmfn.tree import Tree


def to_host(params: Tree, device: torch.device) -> Tree:
    """Parameters in the host's memory, placed as they are: copies that are pinned for `device`, leaf by leaf.

    A leaf that is pinned already is returned itself. Where `device` is the CPU, all of them are.
    """
    if not is_pinned_for(device):
        return params
    return tree.map(lambda leaf: leaf if local(leaf).is_pinned() else host_copy(leaf, device), params)


def host_copy(leaf: Tensor, device: torch.device) -> Tensor:
    """A copy of one leaf in the host's memory, placed as it is."""
    own = local(leaf)
    return like(counted_empty(own, HOST_DEVICE, HOST, is_pinned_for(device)).copy_(own), leaf)


def copy_of(leaf: Tensor) -> Tensor:
    """A copy of a leaf, placed and pinned as it is."""
    own = local(leaf)
    is_pinned = own.device.type == "cpu" and own.is_pinned()
    return like(torch.empty_like(own, pin_memory=True).copy_(own) if is_pinned else own.clone(), leaf)


def to_device(params: Tree, device: torch.device) -> Tree:
    """Parameters on a device, placed as they are: all of them at once, as what comes after training needs them.

    Copies are behind the last update on the device's current stream. On the CPU the leaves themselves.
    """
    return tree.map(lambda leaf: like(local(leaf).to(device), leaf), params)


def handles(params: Tree, device: torch.device) -> Tree:
    """What stands on the device for parameters on the host; see above."""

    def stand(leaf: Tensor) -> Tensor:
        own = local(leaf)
        return like(torch.empty((), dtype=own.dtype, device=device).expand(own.shape), leaf)

    return tree.map(stand, params)


def stand_for(handle: Tensor, values: Tensor) -> Tensor:
    """Values whose gradient is that of their handle, if this needs one; they must have no other use."""
    out: Tensor = _StandFor.apply((values,), handle) if handle.requires_grad else values  # type: ignore[no-untyped-call]
    return out


class _StandFor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: tuple[Tensor], handle: Tensor) -> Tensor:
        return values[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, grad


@torch.library.custom_op("mmfn::fetch", mutates_args=())
def fetch_in_graph(handle: Tensor, host: Tensor) -> Tensor:
    """A copy of `host` on the device of its handle, to which its gradient goes: one operator, for a graph."""
    return torch.empty(host.shape, dtype=host.dtype, device=handle.device).copy_(host, non_blocking=True)


@fetch_in_graph.register_fake
def _(handle: Tensor, host: Tensor) -> Tensor:
    return torch.empty(host.shape, dtype=host.dtype, device=handle.device)


fetch_in_graph.register_autograd(lambda ctx, grad: (grad, None))
