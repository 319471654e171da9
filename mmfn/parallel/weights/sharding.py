"""Where a parameter lives: `Sharding`, cutting a whole tensor into shards and joining shards again.

A leaf on a mesh is a DTensor, which records placement and whole shape; what computes is its local shard. Dims are cut
by DTensor's rule: ceil(n / ranks) rows each, so the last ranks may hold fewer rows or none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from mmfn import tree
from mmfn.errors import UserError
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.layout import Mesh
from mmfn.spec import EXPERTS, ParamSpec
from mmfn.torch_private import local_tensor, set_local_tensor_, storage_key
from mmfn.tree import Tree

Rules = Mapping[str, str | None]

RULES: Rules = {
    EXPERTS: "ep",  # rows travel to their experts (`expert_parallel`)
    "audio_channels": None,
    "audio_embed": None,
    "audio_heads": None,
    "audio_mlp": None,
    "delta_heads": None,
    "embed": None,
    "gate": None,
    "head_dim": None,
    "kernel": None,
    "kv_heads": None,
    "lora": None,
    "merged": None,
    "mlp": None,
    "positions": None,
    "q_heads": None,
    "router": None,
    "taps": None,
    "tower_inputs": None,
    "vision_embed": None,
    "vision_heads": None,
    "vision_mlp": None,
    "vocab": None,
}
"""Every logical axis, and the mesh axis whose ranks compute with a part of it each; None: they compute with all of it.

A dim with a mesh axis is cut over it; of the others the first is cut over the ranks that gather it before they compute.
A new row takes a transform that computes with parts, and where its axis is new, a grid that has it (`layout.GRIDS`).
"""


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """A device mesh and one placement per mesh dim."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]

    @property
    def axis(self) -> str:
        """The axis over which a block gathers it."""
        _, axis, *_ = self.mesh.mesh_dim_names or ()
        return axis

    @property
    def dim(self) -> int:
        """The dim that is cut over `axis`."""
        dim: int = self.placements[1].dim  # type: ignore[attr-defined]
        return dim

    def __str__(self) -> str:
        names = self.mesh.mesh_dim_names or ()
        cuts = [
            f"{name} on dim {p.dim}" for name, p in zip(names, self.placements, strict=True) if isinstance(p, Shard)
        ]
        return " and ".join(cuts) or "replicated"


def dims_by_axis(spec: ParamSpec, path: str = "a parameter", rules: Rules = RULES) -> dict[str, int]:
    """The dims that `rules` cut, by mesh axis. Raises ValueError for a logical axis without a rule."""
    for name in spec.axes:
        if name not in rules:
            raise UserError(
                f"{path} has axes {' '.join(spec.axes)!r} but {name!r} is no logical axis; use one of "
                f"{', '.join(rules)}, or add it to RULES in mmfn/parallel/weights/sharding.py"
            )
    axes = enumerate(rules[name] for name in spec.axes)
    return {axis: dim for dim, axis in axes if axis is not None}


def sharding_of(spec: ParamSpec, mesh: Mesh, path: str = "a parameter", rules: Rules = RULES) -> Sharding:
    """Where a parameter lies. A dense one is cut by dim 0 over "shard"; experts by dim 0 over ep and by dim 1 over edp.

    Raises ValueError for a logical axis without a rule, and for a parameter of which `rules` cut every dim.
    """
    dim_of = dims_by_axis(spec, path, rules)
    grid = mesh.grid(dim_of)
    _, parts, *_ = names = grid.mesh_dim_names or ()
    rest = [dim for dim in range(len(spec.shape)) if dim not in dim_of.values()]
    if not rest:
        raise UserError(
            f"{path} of shape {spec.shape} and axes {' '.join(spec.axes)!r} has no dim to cut over {parts}; give it "
            "one without a mesh axis"
        )
    dim_of = {**dim_of, parts: rest[0]}
    return Sharding(mesh=grid, placements=tuple(Shard(dim_of[n]) if n in dim_of else Replicate() for n in names))


def sizes_over(specs: Tree, axis: str) -> dict[str, int]:
    """Path -> size of the dim that is cut over a mesh axis, of leaves that have one."""
    dims = [(path, spec, dims_by_axis(spec, path)) for path, spec in tree.items(specs)]
    return {path: spec.shape[dim_of[axis]] for path, spec, dim_of in dims if axis in dim_of}


def cuts(spec: ParamSpec, mesh: Mesh, path: str = "a parameter") -> tuple[tuple[int, Axis], ...]:
    """Where a rank's shard is cut: `(dim, axis)` for each axis of several ranks."""
    sharding = sharding_of(spec, mesh, path)
    placements = zip(sharding.mesh.mesh_dim_names or (), sharding.placements, strict=True)
    pairs = [(p.dim, mesh[name]) for name, p in placements if isinstance(p, Shard)]
    return tuple((dim, axis) for dim, axis in pairs if axis.size > 1)


def shard_params(params: Tree, specs: Tree, mesh: Mesh, device: torch.device | None = None) -> Tree:
    """Whole tensors, equal on all ranks -> DTensors of this rank's shards (copies, on `device`). No communication."""
    return tree.map_with_path(
        lambda path, leaf, spec: shard(leaf, sharding_of(spec, mesh, path), device), params, specs
    )


def shardings(specs: Tree, mesh: Mesh) -> dict[str, Sharding | None]:
    """Path -> where a parameter lies, for `check_shards`; None on one device, where it is whole."""
    is_alone = mesh.layout.world == 1
    return {path: None if is_alone else sharding_of(spec, mesh, path) for path, spec in tree.items(specs)}


def check_shards(params: Tree, expected: Mapping[str, Sharding | None]) -> None:
    """Raise ValueError for a parameter that does not lie where a program takes it to lie.

    A whole tensor on a mesh would be trained by each rank for itself: nothing sums its gradient.
    """
    for (path, sharding), leaf in zip(expected.items(), tree.leaves(params), strict=True):
        if not isinstance(leaf, DTensor):
            if sharding is not None:
                raise UserError(
                    f"{path} is a whole tensor but the program's mesh cuts it by {sharding}; cut all parameters with "
                    "shard_params(params, program.specs, mesh), behind add_adapters"
                )
            continue
        if sharding is None or (leaf.device_mesh, tuple(leaf.placements)) != (sharding.mesh, sharding.placements):
            there = Sharding(mesh=leaf.device_mesh, placements=tuple(leaf.placements))
            raise UserError(
                f"{path} was cut for another mesh: by {there} of {tuple(leaf.device_mesh.shape)} ranks, where the "
                f"program's has {'one device' if sharding is None else f'{sharding} of {tuple(sharding.mesh.shape)}'}; "
                "cut the whole parameters for this mesh with shard_params"
            )


def check_alike(params: Tree) -> None:
    """Raise ValueError where some parameters are shards and others whole."""
    paths = {isinstance(leaf, DTensor): path for path, leaf in reversed(tree.items(params))}
    if len(paths) == 2:
        raise UserError(
            f"{paths[False]} is a whole tensor but {paths[True]} a shard; cut all parameters with "
            "shard_params(params, program.specs, mesh), behind add_adapters"
        )


def shard_ranges(shape: Sequence[int], sharding: Sharding) -> tuple[tuple[int, int], ...]:
    """`(start, stop)`, for every dim of a whole tensor, of this rank's part: empty ones where it has none."""
    ranges, place = [(0, size) for size in shape], sharding.mesh.get_coordinate() or ()
    for size, index, placement in zip(sharding.mesh.shape, place, sharding.placements, strict=True):
        if isinstance(placement, Shard):
            first, last = ranges[placement.dim]
            start, stop = rows(last - first, size, index)
            ranges[placement.dim] = first + start, first + stop
    return tuple(ranges)


def shard_shape(shape: Sequence[int], sharding: Sharding) -> tuple[int, ...]:
    """Shape of this rank's part of a whole tensor."""
    return tuple(stop - start for start, stop in shard_ranges(shape, sharding))


def shard(whole: Tensor, sharding: Sharding, device: torch.device | None = None) -> DTensor:
    """This rank's part of a whole tensor, as a DTensor; only the part is moved to `device`."""
    part = whole[tuple(slice(start, stop) for start, stop in shard_ranges(whole.shape, sharding))]
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
    set_local_tensor_(out, local)
    return out


def local(leaf: Tensor) -> Tensor:
    """The shard of a DTensor, sharing its memory and outside autograd; any other tensor itself."""
    return local_tensor(leaf).detach() if isinstance(leaf, DTensor) else leaf


def like(values: Tensor, leaf: Tensor) -> Tensor:
    """Undo `local`: a shard placed as `leaf` is; `values` itself for a plain leaf."""
    if not isinstance(leaf, DTensor):
        return values
    own = local_tensor(leaf)
    if values.shape == own.shape and storage_key(values.untyped_storage()) == storage_key(own.untyped_storage()):
        return leaf
    return wrap(values, leaf.shape, Sharding(mesh=leaf.device_mesh, placements=tuple(leaf.placements)))


def place_state(state: Tree, params: Mapping[str, Tensor]) -> Tree:
    """Optimizer state on shards -> the same, placed: a leaf keyed by a parameter's path is placed as that parameter.

    Only tensors of the shard's own shape are; others (counts) stay plain.
    """

    def place(path: str, values: Tensor) -> Tensor:
        parts = path.split("/")
        leaf = next((params[name] for i in range(len(parts)) if (name := "/".join(parts[i:])) in params), None)
        if not isinstance(leaf, DTensor) or local_tensor(leaf).shape != values.shape:
            return values
        return like(values, leaf)

    return tree.map_with_path(place, state)


def whole(leaf: Tensor, mesh: Mesh, dim: int | None = None) -> Tensor:
    """The whole tensor of a DTensor leaf, or one whole along `dim` alone, on every rank; all ranks must call it.

    A plain tensor itself.
    """
    if not isinstance(leaf, DTensor):
        return leaf
    names, out, shape = leaf.device_mesh.mesh_dim_names or (), local(leaf), list(leaf.shape)
    for name, placement in reversed(list(zip(names, leaf.placements, strict=True))):
        if isinstance(placement, Shard) and dim in (None, placement.dim):
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
