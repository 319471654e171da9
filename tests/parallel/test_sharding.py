"""Placement: what the table of rules decides, for every model and for a rule that no model has."""

import subprocess
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

import mmfn
from mmfn import models, tree
from mmfn.lora import lora
from mmfn.parallel.mesh.layout import AXES, GRIDS, Layout, Mesh, single_mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.parallel.program import Program, lower
from mmfn.parallel.weights.gather import Gather
from mmfn.parallel.weights.sharding import RULES, dims_by_axis, local, shard, shard_params, sharding_of, sizes_over
from mmfn.spec import EXPERTS, ZEROS, has_experts, spec
from tests.parallel.conformance import FAMILIES

TOY = {**RULES, "toy": "ep"}  # the axis of a model whose rows are cut over ep as experts are, but not in front
LAYOUT = Layout(replicate=2, dp=4, ep=2)


def test_the_table_names_axes_of_meshes_and_every_logical_axis_of_models() -> None:
    assert {axis for axis in RULES.values() if axis} <= {name for grid in GRIDS for name in grid[2:]} <= set(AXES)
    used = set()
    for config in FAMILIES.values():
        family = models.family(str(config["model_type"]))
        specs = family.specs(family.config_from_hf(config))
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
    message = r"text/w has axes 'embed q_haeds' but 'q_haeds' is no logical axis; use one of experts, embed, .* RULES"
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
