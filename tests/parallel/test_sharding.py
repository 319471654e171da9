"""Placement: what the table of rules decides, for every model and for a rule that no model has."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

import mmfn
from mmfn import tree
from mmfn.lora import add_adapters, lora
from mmfn.parallel.mesh.layout import AXES, GRIDS, Layout, Mesh, single_mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.parallel.planning.alike import recording_mesh
from mmfn.parallel.program import Program, lower, pipe
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.weights.gather import Gather
from mmfn.parallel.weights.sharding import RULES, dims_by_axis, local, shard, shard_params, sharding_of, sizes_over
from mmfn.spec import EXPERTS, ZEROS, has_experts, spec
from mmfn.train.optim import adamw
from mmfn.train.schedule import schedule
from mmfn.train.step import init_state, make_step
from tests.parallel.conformance import Cell, batch_of
from tests.tiny import TINY, TRAINED, model_of

TOY = {**RULES, "toy": "ep"}  # the axis of a model whose rows are cut over ep as experts are, but not in front
LAYOUT = Layout(replicate=2, dp=4, ep=2)


def test_the_table_names_axes_of_meshes_and_every_logical_axis_of_models() -> None:
    assert {axis for axis in RULES.values() if axis} <= {name for grid in GRIDS for name in grid[2:]} <= set(AXES)
    used = set()
    for name in TINY:
        model = model_of(name)
        specs = model.family.specs(model.cfg)
        adapters = lora(specs, rank=2, alpha=1.0, targets=[r".*/attention/.*"])
        used |= {name for leaf in tree.leaves([specs, adapters]) for name in leaf.axes}
    assert used == set(RULES)


def test_only_the_table_and_the_declaration_know_the_name_of_a_rule() -> None:
    """Who asks where a leaf lies asks the table, and who asks for experts `has_experts`."""
    root = Path(mmfn.__file__).parent
    found = subprocess.run(["grep", "-rnE", r"axes.*[\"']experts[\"']", str(root)], capture_output=True, text=True)
    assert found.stdout == ""
    assert has_experts({"x": spec((2, 3), "experts embed", ZEROS)})
    assert not has_experts(spec((2, 3), "embed mlp", ZEROS))


def test_a_rule_places_its_dim_and_the_first_of_the_others_is_cut() -> None:
    w = spec((6, 5, 4), "embed toy mlp", ZEROS)
    assert dims_by_axis(w, rules=TOY) == {"ep": 1}
    x = torch.arange(120.0).view(6, 5, 4)[:, :4]

    def run(mesh: Mesh) -> torch.Tensor:
        sharding = sharding_of(w, mesh, rules=TOY)
        assert sharding.placements == (Replicate(), Shard(0), Shard(1))
        leaf = shard(x, sharding)
        gathered: torch.Tensor = Gather(mesh=mesh)({"w": leaf})["w"]
        assert local(leaf).shape == (3, 2, 4)
        assert torch.equal(gathered, x.chunk(2, 1)[mesh["ep"].index])
        return gathered

    assert len(virtual(LAYOUT, run)) == 8


def test_sizes_of_what_a_rule_cuts() -> None:
    specs = {"a": spec((6, 5), "experts mlp", ZEROS), "b": spec((7, 5), "embed mlp", ZEROS)}
    assert sizes_over(specs, RULES[EXPERTS] or "") == {"a": 6}


def test_an_axis_without_a_rule_is_refused_by_leaf_and_name() -> None:
    specs = {"text": {"w": spec((4, 4), "embed q_haeds", ZEROS)}}
    message = (
        r"text/w has axes 'embed q_haeds' but 'q_haeds' is no logical axis; use one of experts, .*, embed, .* RULES"
    )
    with pytest.raises(ValueError, match=message):
        lower(Program.of(specs))
    with pytest.raises(ValueError, match=message):
        shard_params({"text": {"w": torch.zeros(4, 4)}}, specs, single_mesh())


def test_a_leaf_without_a_dim_to_cut_is_refused() -> None:
    message = r"x of shape \(8,\) and axes 'experts' has no dim to cut over edp; give it one without a mesh axis"
    with pytest.raises(ValueError, match=message):
        sharding_of(spec((8,), "experts", ZEROS), single_mesh(), "x")
    with pytest.raises(ValueError, match="no grid of ranks has the mesh axes ep, cp together; add it to GRIDS"):
        single_mesh().grid(["ep", "cp"])


def take_step(mesh: Mesh, params: Any, specs: Any) -> None:
    """The first step of a program on `mesh` with parameters as they are given."""
    model = model_of("dense", 2)
    program = pipe(Program.of(specs, mesh=mesh), data_parallel())
    rate = schedule("constant", peak=1e-3, num_steps=1)
    step = make_step(model.family, model.cfg, program, "per_token_loss", adamw(), schedule=rate)
    cell = Cell(layout=mesh.layout, name="", transforms=())
    step(init_state(params, adamw(), specs), [batch_of(cell, mesh["batch"].index, mesh["batch"].size)])


@pytest.mark.parametrize("layout", [Layout(dp=2), Layout(replicate=2)], ids=str)
def test_whole_parameters_on_a_mesh_are_refused(layout: Layout) -> None:
    model = model_of("dense", 2)
    specs = model.family.specs(model.cfg)
    message = r"text/embed/weight is a whole tensor but the program's mesh cuts it by shard on dim 0; cut all .* behind"
    with pytest.raises(ValueError, match=message):
        virtual(layout, lambda mesh: take_step(mesh, model.params, specs))


def test_adapters_that_are_added_behind_the_cut_are_refused() -> None:
    model = model_of("dense", 2)
    specs = TRAINED["lora of all"](model.family, model.cfg)

    def run(mesh: Mesh) -> None:
        params = add_adapters(shard_params(model.params, model.family.specs(model.cfg), mesh), specs, 0)
        take_step(mesh, params, specs)

    message = r"attention/k/lora/weight/a is a whole tensor but text/embed/weight a shard; .* behind add_adapters"
    with pytest.raises(ValueError, match=message):
        virtual(Layout(dp=2), run)


def test_parameters_of_another_mesh_are_refused() -> None:
    model = model_of("dense", 2)
    specs = model.family.specs(model.cfg)

    def run(mesh: Mesh) -> None:
        other = recording_mesh(Layout(replicate=2, dp=2), mesh["world"].index)
        with pytest.raises(ValueError, match=r"text/embed/weight was cut for another mesh: .* of \(2, 2\) ranks"):
            take_step(mesh, shard_params(model.params, specs, other), specs)
        with pytest.raises(ValueError, match=r"of \(1, 4\) ranks, where the program's has one device"):
            take_step(single_mesh(), shard_params(model.params, specs, mesh), specs)

    virtual(Layout(dp=4), run)
