"""Layouts and meshes: the grid of ranks, its rules and its axes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mmfn.parallel.mesh.layout import AXES, Layout, Mesh, make_mesh, process_groups, single_mesh
from mmfn.parallel.mesh.virtual import virtual

EIGHT = Layout(replicate=2, dp=2, cp=2, ulysses=2, ep=4)
LAYOUTS = [Layout(), Layout(dp=3), Layout(dp=2, cp=4, ulysses=2, ep=2), EIGHT]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", AXES)
def test_groups_of_an_axis_hold_every_rank_once(layout: Layout, name: str) -> None:
    groups = layout.partition(name)
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world))
    assert len({len(group) for group in groups}) == 1


def test_order_of_ranks() -> None:
    """replicate, dp, ring, ulysses, the last one innermost; edp and ep divide the same ranks, ep innermost."""
    layout = Layout(replicate=2, dp=2, cp=4, ulysses=2, ep=4)
    assert layout.partition("ulysses")[:2] == ((0, 1), (2, 3))
    assert layout.partition("ring")[:2] == ((0, 2), (1, 3))
    assert layout.partition("cp")[:2] == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert layout.partition("dp")[0] == (0, 4)
    assert layout.partition("batch")[0] == (0, 4, 8, 12)
    assert layout.partition("shard") == (tuple(range(8)), tuple(range(8, 16)))
    assert layout.partition("ep")[0] == (0, 1, 2, 3)
    assert layout.partition("edp")[0] == (0, 4)
    assert layout.partition("replicate")[0] == (0, 8)
    assert (layout.world, layout.shard, layout.ring, layout.edp) == (16, 8, 2, 2)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_rank_knows_its_place(layout: Layout) -> None:
    def place(mesh: Mesh) -> dict[str, Any]:
        everyone = {name: mesh[name].all_gather(torch.tensor([mesh["world"].index]), "test").tolist() for name in AXES}
        assert (mesh.grid(()).get_coordinate() or [])[1] == mesh["shard"].index
        assert list(mesh.grid(("ep",)).get_coordinate() or [])[1:] == [mesh["edp"].index, mesh["ep"].index]
        assert all(everyone[name][mesh[name].index] == mesh["world"].index for name in AXES)
        return everyone

    for rank, everyone in enumerate(virtual(layout, place)):
        for name in AXES:
            assert tuple(everyone[name]) == next(group for group in layout.partition(name) if rank in group)


def test_one_device_has_no_transport() -> None:
    mesh = single_mesh()
    assert mesh.layout.world == 1
    assert all(mesh[name].size == 1 and mesh[name].transport is None for name in AXES)
    x = torch.randn(3)
    axis = mesh["world"]
    for out in (axis.all_gather(x, ""), axis.reduce_scatter(x, ""), axis.all_reduce(x, ""), axis.shift(x, 1, "")):
        assert out is x


def test_bad_sizes_are_refused_with_the_rule() -> None:
    with pytest.raises(ValueError, match="dp is 0 but must be at least 1"):
        Layout(dp=0)
    with pytest.raises(ValueError, match="ulysses 3 must divide cp 4"):
        Layout(cp=4, ulysses=3)
    with pytest.raises(ValueError, match=r"ep 4 must divide dp \* cp = 6"):
        Layout(dp=3, cp=2, ep=4)
    with pytest.raises(ValueError, match=r"replicate \* dp \* cp = 8 but there are 4 ranks; .* start 8 ranks"):
        EIGHT.check_world(4)
    EIGHT.check_world(8)
    assert str(EIGHT) == "replicate 2, dp 2, cp 2, ulysses 2, ep 4"
    assert str(Layout()) == "one device"


def test_an_axis_of_one_rank_is_never_connected() -> None:
    asked: list[str] = []

    def connect(name: str, partition: Any) -> Any:
        asked.append(name)

    make_mesh(Layout(dp=2), 1, connect)
    assert sorted(asked) == ["batch", "dp", "edp", "saves", "shard", "world"]


def test_axes_over_the_same_ranks_share_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def new_subgroups(ranks: list[list[int]], timeout: Any, backend: str | None) -> Any:
        made.append((ranks, backend))
        return SimpleNamespace(group_name=str(len(made)), size=lambda: len(ranks[0])), None

    monkeypatch.setattr(dist, "new_subgroups_by_enumeration", new_subgroups)
    mesh = make_mesh(Layout(dp=2, cp=2), 3, process_groups(backend="gloo"))
    assert made == [
        ([[0, 2], [1, 3]], "gloo"),  # dp, batch
        ([[0, 1], [2, 3]], "gloo"),  # ring, cp
        ([[0, 1, 2, 3]], "gloo"),  # shard, world, edp
        ([[0, 1, 2, 3]], "gloo"),  # sums of gradients, which do not stand behind gathers of weights
        ([[0, 1, 2, 3]], "gloo"),  # saves, whose collectives may not meet those of a step
    ]
    assert mesh["dp"].transport is mesh["batch"].transport is not mesh["cp"].transport
    assert mesh["world"].transport is mesh["shard"].transport is mesh["edp"].transport is not mesh["saves"].transport
    assert (mesh["shard"].transport.name, mesh["shard"].transport.scatters) == ("3", "4")
    assert mesh["dp"].transport.scatters == ""
