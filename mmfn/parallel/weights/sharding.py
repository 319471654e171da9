"""Where a parameter lives: `Sharding`, cutting a whole tensor into shards and joining shards again.

A leaf on a mesh is a DTensor, which records placement and whole shape; what computes is its local shard. Dims are cut
by DTensor's rule: ceil(n / ranks) rows each, so the last ranks may hold fewer rows or none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from mmfn import tree
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.layout import Mesh
from mmfn.spec import ParamSpec
from mmfn.tree import Tree


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """A device mesh and one placement per mesh dim."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]

    def __str__(self) -> str:
        names = self.mesh.mesh_dim_names or ()
        cuts = [
            f"{name} on dim {p.dim}" for name, p in zip(names, self.placements, strict=True) if isinstance(p, Shard)
        ]
        return " and ".join(cuts) or "replicated"


def sharding_of(spec: ParamSpec, mesh: Mesh) -> Sharding:
    """The rule for all parameters: dim 0 over "shard"; leaves with experts first over ep, and their dim 1 over edp."""
    if spec.axes[0] == "experts":
        return Sharding(mesh=mesh.expert, placements=(Replicate(), Shard(1), Shard(0)))
    return Sharding(mesh=mesh.dense, placements=(Replicate(), Shard(0)))


def cuts(spec: ParamSpec, mesh: Mesh) -> tuple[tuple[int, Axis], ...]:
    """Where a rank's shard is cut: `(dim, axis)` for each axis of several ranks."""
    sharding = sharding_of(spec, mesh)
    placed = zip(sharding.mesh.mesh_dim_names or (), sharding.placements, strict=True)
    found = [(p.dim, mesh[name]) for name, p in placed if isinstance(p, Shard)]
    return tuple((dim, axis) for dim, axis in found if axis.size > 1)


def shard_params(params: Tree, specs: Tree, mesh: Mesh) -> Tree:
    """Whole tensors, equal on all ranks -> DTensors of this rank's shards (copies). No communication."""
    return tree.map(lambda leaf, spec: shard(leaf, sharding_of(spec, mesh)), params, specs)


def shard(whole: Tensor, sharding: Sharding, device: torch.device | None = None) -> DTensor:
    """This rank's part of a whole tensor, as a DTensor; only the part is moved to `device`."""
    part, mesh = whole, sharding.mesh
    place = mesh.get_coordinate() or ()
    for size, index, placement in zip(mesh.shape, place, sharding.placements, strict=True):
        if isinstance(placement, Shard):
            start, stop = rows(part.shape[placement.dim], size, index)
            part = part.narrow(placement.dim, start, stop - start)
    return wrap(part.clone(memory_format=torch.contiguous_format).to(device=device), whole.shape, sharding)


def rows(num_rows: int, size: int, index: int) -> tuple[int, int]:
    """First and last (exclusive) row of rank `index` of `size`."""
    each = -(-num_rows // size)
    return min(index * each, num_rows), min((index + 1) * each, num_rows)


def wrap(local: Tensor, shape: torch.Size, sharding: Sharding) -> DTensor:
    """A local shard as a DTensor of the whole `shape`; it stays where it is, if that is not the mesh's device."""
    stride = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
    is_away = local.device.type != sharding.mesh.device_type
    own = local.to("meta") if is_away else local  # from_local moves all but meta tensors to the mesh's device
    out = DTensor.from_local(
        own, sharding.mesh, sharding.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    out._local_tensor = local
    return out


def local(leaf: Tensor) -> Tensor:
    """The shard of a DTensor, sharing its memory and outside autograd; any other tensor itself."""
    return leaf._local_tensor.detach() if isinstance(leaf, DTensor) else leaf


def like(values: Tensor, leaf: Tensor) -> Tensor:
    """Undo `local`: a shard placed as `leaf` is; `values` itself for a plain leaf."""
    if not isinstance(leaf, DTensor):
        return values
    own = leaf._local_tensor
    if values.shape == own.shape and values.untyped_storage()._cdata == own.untyped_storage()._cdata:
        return leaf
    return wrap(values, leaf.shape, Sharding(mesh=leaf.device_mesh, placements=tuple(leaf.placements)))


def placed(state: Tree, params: Mapping[str, Tensor]) -> Tree:
    """Optimizer state on shards -> the same, placed: a leaf keyed by a parameter's path is placed as that parameter.

    Only tensors of the shard's own shape are; others (counts) stay plain.
    """

    def place(path: str, values: Tensor) -> Tensor:
        parts = path.split("/")
        leaf = next((params[name] for i in range(len(parts)) if (name := "/".join(parts[i:])) in params), None)
        return values if leaf is None or local(leaf).shape != values.shape else like(values, leaf)

    return tree.map_with_path(place, state)


def whole(leaf: Tensor, mesh: Mesh) -> Tensor:
    """The whole tensor of a DTensor leaf, on every rank; all ranks must call it. A plain tensor itself."""
    if not isinstance(leaf, DTensor):
        return leaf
    names, out, shape = leaf.device_mesh.mesh_dim_names or (), local(leaf), list(leaf.shape)
    for name, placement in reversed(list(zip(names, leaf.placements, strict=True))):
        if isinstance(placement, Shard):
            out = _join(out, placement.dim, shape[placement.dim], mesh[name])
    return out


def whole_params(params: Tree, mesh: Mesh) -> Tree:
    """`whole` of every leaf, in path order."""
    flat, structure = tree.flatten(params)
    return tree.unflatten(structure, [whole(leaf, mesh) for leaf in flat])


def whole_on_host(params: Tree, mesh: Mesh, *, is_kept: bool) -> Tree:
    """`whole` of every leaf in the host's memory, one after the other; without `is_kept` the leaves as they are.

    All ranks must call it.
    """
    flat, structure = tree.flatten(params)
    for i, leaf in enumerate(flat):
        full = whole(leaf, mesh)
        flat[i] = full.cpu() if is_kept else leaf
    return tree.unflatten(structure, flat)


def _join(part: Tensor, dim: int, num_rows: int, axis: Axis) -> Tensor:
    each = -(-num_rows // axis.size)
    front = part.movedim(dim, 0)
    padded = torch.cat([front, front.new_zeros(each - front.shape[0], *front.shape[1:])])
    return axis.all_gather(padded, "whole")[:num_rows].movedim(0, dim).contiguous()
