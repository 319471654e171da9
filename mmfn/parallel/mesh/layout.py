"""`Layout`, the sizes of a mesh, and `Mesh`, one rank's place in it.

All ranks form one grid (replicate, dp, ring, ulysses), ulysses innermost. A batch differs along replicate and dp; its
tokens are spread over ring and ulysses (together: cp). Dense parameters are sharded over dp and cp together, the axis
"shard"; those of experts lie on a second grid over the same ranks, (replicate, edp, ep) with edp * ep = shard.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mmfn import torch_private
from mmfn.errors import UserError, spell_count
from mmfn.parallel.mesh.axis import Axis, Group, Transport

AXES = {
    "replicate": ("replicate",),
    "dp": ("dp",),
    "ring": ("ring",),
    "ulysses": ("ulysses",),
    "cp": ("ring", "ulysses"),
    "shard": ("dp", "ring", "ulysses"),
    "batch": ("replicate", "dp"),
    "world": ("replicate", "dp", "ring", "ulysses"),
    "saves": ("replicate", "dp", "ring", "ulysses"),  # again, for a thread beside the step: they share no collective
    "edp": ("edp",),
    "ep": ("ep",),
}
GRIDS = (("replicate", "shard"), ("replicate", "edp", "ep"))
"""All ranks as a grid, for every kind of parameter: the ranks of the first axis hold copies, those of the second the
parts that a block gathers, those of each further one the parts they compute with."""
SCATTERED = ("shard", "edp")  # along which gradients are summed and cut
WIDEST = {"hccl": torch.float32}  # what a backend can add up, where that is less than float64
SAVE_TIMEOUT = timedelta(hours=1)  # how long ranks wait for each other in a save
Partition = tuple[tuple[int, ...], ...]  # the groups of ranks of one axis; every rank is in exactly one
Connect = Callable[[str, Partition], Transport]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the mesh axes. `cp` ranks share a batch; `ulysses` of them split heads, `cp / ulysses` form a ring.

    `ep` ranks share a set of experts; it divides dp * cp. Raises ValueError for sizes that break a rule.
    """

    replicate: int = 1
    dp: int = 1
    cp: int = 1
    ulysses: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise UserError(f"layout {self}: {field.name} is {getattr(self, field.name)} but must be at least 1")
        if self.cp % self.ulysses:
            raise UserError(f"layout {self}: ulysses {self.ulysses} must divide cp {self.cp}; change one of them")
        if self.shard % self.ep:
            raise UserError(f"layout {self}: ep {self.ep} must divide dp * cp = {self.shard}; change one of them")

    def __str__(self) -> str:
        sizes = [f"{f.name} {getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) > 1]
        return ", ".join(sizes) or "one device"

    @property
    def ring(self) -> int:
        """Ranks of a ring."""
        return self.cp // self.ulysses

    @property
    def shard(self) -> int:
        """Ranks over which a dense parameter is sharded."""
        return self.dp * self.cp

    @property
    def edp(self) -> int:
        """Ranks over which one expert is sharded."""
        return self.shard // self.ep

    @property
    def world(self) -> int:
        """All ranks."""
        return self.replicate * self.shard

    def check_world(self, world: int) -> None:
        """Raise ValueError unless the sizes multiply to `world`."""
        if self.world != world:
            raise UserError(
                f"layout {self}: replicate * dp * cp = {self.world} but there {'is' if world == 1 else 'are'} "
                f"{spell_count(world, 'rank')}; change the layout, or start {spell_count(self.world, 'rank')}"
            )

    def partition(self, name: str) -> Partition:
        """The groups of ranks of one axis in `AXES`, for all ranks."""
        is_expert = name in ("edp", "ep")
        dims = ("replicate", "edp", "ep") if is_expert else ("replicate", "dp", "ring", "ulysses")
        sizes = {name: getattr(self, name) for name in ("replicate", "dp", "ring", "ulysses", "edp", "ep")}
        ranks = torch.arange(self.world).view([sizes[d] for d in dims])
        inner = [dims.index(d) for d in AXES[name]]
        outer = [i for i in range(len(dims)) if i not in inner]
        groups = ranks.permute(*outer, *inner).reshape(-1, prod(sizes[d] for d in AXES[name]))
        return tuple(tuple(group) for group in groups.tolist())


@dataclass(frozen=True, kw_only=True, eq=False)
class Mesh:
    """One rank's axes, and for each of `GRIDS` the DeviceMesh on which parameters record their placement."""

    layout: Layout
    axes: Mapping[str, Axis]
    grids: tuple[DeviceMesh, ...]

    def __getitem__(self, name: str) -> Axis:
        return self.axes[name]

    def grid(self, axes: Collection[str]) -> DeviceMesh:
        """The first grid that has all these axes. Raises ValueError where none has."""
        for names, grid in zip(GRIDS, self.grids, strict=True):
            if set(axes) <= set(names):
                return grid
        raise UserError(f"no grid of ranks has the mesh axes {', '.join(axes)} together; add it to GRIDS")


def make_mesh(layout: Layout, rank: int, connect: Connect, device_type: str = "cpu", *, backend: bool = False) -> Mesh:
    """The mesh as rank `rank` sees it. `connect(axis name, groups)` makes the transport of an axis of several ranks.

    With `backend` the two DeviceMeshes own process groups, which torch.compile asks them for.
    """

    def axis(name: str) -> Axis:
        partition = layout.partition(name)
        group = next(g for g in partition if rank in g)
        transport = connect(name, partition) if len(group) > 1 else None
        return Axis(name=name, size=len(group), index=group.index(rank), transport=transport)

    def device_mesh(names: tuple[str, ...]) -> DeviceMesh:
        ranks = torch.arange(layout.world).view([getattr(layout, name) for name in names])
        settings = torch_private.mesh_settings(rank=rank, has_groups=backend)
        return DeviceMesh(device_type, ranks, mesh_dim_names=names, **settings)

    return Mesh(
        layout=layout,
        axes={name: axis(name) for name in AXES},
        grids=tuple(map(device_mesh, GRIDS)),
    )


def distributed_mesh(layout: Layout, device_type: str = "cpu", timeout: timedelta | None = None) -> Mesh:
    """The mesh of real ranks; torch.distributed must be initialised. Axes over the same ranks share a process group.

    `timeout`: how long a collective may take, default torch's own. Raises ValueError when the layout does not fit the
    number of ranks.
    """
    layout.check_world(dist.get_world_size())
    return make_mesh(layout, dist.get_rank(), process_groups(timeout), device_type, backend=True)


def process_groups(timeout: timedelta | None = None, backend: str | None = None) -> Connect:
    """What connects real ranks: one process group for all axes over the same ranks, as groups hold sockets and memory.

    Parameters' axes have a second one, in which gradients are summed while weights are gathered in the first. ep has a
    name of its own for its group, by which recomputation tells its all-to-alls from those of other axes. saves
    has a group of its own, on the CPU, in which ranks wait for the slowest disk. `backend`: default that of
    torch.distributed's own group.
    """
    groups: dict[Partition, Group] = {}

    def connect(name: str, partition: Partition) -> Transport:
        if name == "saves":
            return _new_group(partition, max(timeout or SAVE_TIMEOUT, SAVE_TIMEOUT), "gloo")
        if partition not in groups:
            groups[partition] = _new_group(partition, timeout, backend)
        if name in SCATTERED and not groups[partition].scatters:
            scatters = _new_group(partition, timeout, backend).name
            groups[partition] = replace(groups[partition], scatters=scatters)
        return _renamed(groups[partition], "ep") if name == "ep" else groups[partition]

    return connect


def _new_group(partition: Partition, timeout: timedelta | None, backend: str | None) -> Group:
    own, _ = dist.new_subgroups_by_enumeration(list(map(list, partition)), timeout, backend)  # type: ignore[no-untyped-call]
    return Group(own.group_name, own.size(), WIDEST.get(backend or dist.get_backend(), torch.float64))


def _renamed(group: Group, name: str) -> Group:
    """The same process group under one more name."""
    other = replace(group, name=f"{group.name}/{name}")
    torch_private.rename_group(group.name, other.name)
    return other


def by_rows(mesh: Mesh) -> Mesh:
    """The same ranks, all of them with rows of their own: those of cp become further ranks of dp.

    Parameters lie where they lay, as they are sharded over dp and cp together. What needs no gradient can do without
    splitting rows, whose activations are not kept.
    """
    alone = {name: Axis(name=name) for name in ("ring", "ulysses", "cp")}
    axes = {**mesh.axes, **alone, "dp": mesh["shard"], "batch": mesh["world"]}
    return replace(mesh, layout=replace(mesh.layout, dp=mesh.layout.shard, cp=1, ulysses=1), axes=axes)


def single_mesh() -> Mesh:
    """The mesh of one device."""

    def connect(name: str, partition: Sequence[Sequence[int]]) -> Transport:
        raise AssertionError(f"one device has no axis {name} to connect")

    return make_mesh(Layout(), 0, connect)
