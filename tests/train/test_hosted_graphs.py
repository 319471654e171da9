"""Compiled steps whose parameters lie on the host: what their graphs copy, and the numbers of eager ones."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

from mmfn import tree
from mmfn.parallel.mesh.layout import single_mesh
from mmfn.parallel.transforms.compiled import compiled
from mmfn.parallel.transforms.remat import remat
from mmfn.parallel.weights.hosted import fetch_in_graph
from tests.tiny import model_of
from tests.train.hosted_cases import ALL, COMPILED, Case
from tests.train.hosted_steps import take_steps

# torch's compiler reads `.grad` of non-leaf inputs and hides the warning by a means that "error" defeats
QUIET_DYNAMO = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@QUIET_DYNAMO
@pytest.mark.parametrize("kind", ["selective", pytest.param("full", marks=pytest.mark.slow), "none"])
def test_graphs_copy_where_a_gather_is_a_part_of_them(kind: str) -> None:
    """Blocks that keep some results copy again what they compute again, so that they free their copies as eager ones
    do; other blocks are given copies, which run ahead of them."""
    copies: dict[str, list[int]] = {"forward": [], "backward": []}

    def count(graph: torch.fx.GraphModule, _: Any, part: str) -> Any:
        copies[part].append(sum(node.target is fetch_in_graph._opoverload for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=partial(count, part="forward"),
        bw_compiler=partial(count, part="backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    again = remat(kind, save=("attention",) if kind == "selective" else ())
    case = Case(transforms=(again, compiled("layer", backend=backend)))
    take_steps(case, single_mesh(), is_hosted=True, is_watched=False)
    model = model_of(case.family, case.num_layers)
    specs = model.family.specs(model.cfg)
    num_leaves = [len(tree.leaves(specs[name]["layers"][0])) for name in ("vision", "text")]
    assert copies["forward"] == (num_leaves if kind == "selective" else [0, 0])
    assert len(copies["backward"]) == 2
    assert all((0 < num <= max(num_leaves)) == (kind == "selective") for num in copies["backward"])


@QUIET_DYNAMO
@pytest.mark.parametrize("name", [n if n == "remat" else pytest.param(n, marks=pytest.mark.slow) for n in COMPILED])
def test_compiled_layers(name: str) -> None:
    """Against the same program in eager execution, with its parameters on the device."""
    dtype = torch.float32 if "bfloat16" in name else torch.float64
    case = Case(transforms=COMPILED[name], dtype=dtype, what=ALL)
    graph = replace(case, transforms=(*case.transforms, compiled("layer", backend="aot_eager")))

    want = take_steps(case, single_mesh(), is_hosted=False, is_watched=False)
    got = take_steps(graph, single_mesh(), is_hosted=True, is_watched=False)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    for (_, state), (_, own) in zip(want, got, strict=True):
        for path, x in state.items():
            torch.testing.assert_close(own[path], x, rtol=tolerance, atol=tolerance)
