"""`reshard_after_forward` on real ranks, eager and compiled: which whole weights are alive, and the bits of a step."""

from typing import Any
from unittest.mock import patch

import pytest
import torch

from mmfn.parallel.mesh.layout import Layout, distributed_mesh
from mmfn.parallel.transforms.compiled import compiled
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.weights.gradient_sums import GradientSums
from tests.parallel.conformance import Cell, outcome
from tests.parallel.ranks import run_ranks
from tests.parallel.whole_weights import watched


def steps_of_ranks(kind: str, backend: str) -> dict[str, Any]:
    """Runs on every rank: the step with weights kept and released, and whole weights alive where the backward begins
    to send gradients and at most."""
    found: dict[str, Any] = {}
    for name in ("kept", "released"):
        torch._dynamo.reset()
        transforms = (data_parallel(reshard_after_forward=name == "released"), compiled(kind, backend=backend))
        cell = Cell(layout=Layout(dp=2), name=name, transforms=transforms, num_layers=3)
        first: list[int] = []
        add = GradientSums.add

        def noting(self: GradientSums, *args: Any, add: Any = add, first: list[int] = first) -> None:
            first.append(alive())
            add(self, *args)

        with watched() as (alive, counts), patch.object(GradientSums, "add", noting):
            found[name] = outcome(cell, distributed_mesh(cell.layout))
        found[f"{name} alive"] = torch.tensor([first[0], max(counts), len(counts)])
    return found


@pytest.mark.dist
@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        pytest.param("none", "eager", marks=pytest.mark.slow),  # a step of `test_ranks` is like it
        pytest.param("layer", "aot_eager", marks=pytest.mark.slow),
        pytest.param("layer", "inductor", marks=pytest.mark.slow),
    ],
)
def test_real_ranks_have_the_same_bits(kind: str, backend: str) -> None:
    """Compiled blocks too, whose graphs save what they like of the weights they are given."""
    for found in run_ranks(2, steps_of_ranks, kind, backend):
        assert found["kept"].keys() == found["released"].keys()
        assert all(torch.equal(found["released"][path], x) for path, x in found["kept"].items())
        kept, released = found["kept alive"].tolist(), found["released alive"].tolist()
        assert kept[0] > 5 * released[0]
        assert kept[1] > 2 * released[1]
        assert released[2] == kept[2] + 3 + 2, "once more for each block"
