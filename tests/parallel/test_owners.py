"""Whole matrices computed by one rank each: exact, nothing twice, by the fewest exchanges."""

import pytest
import torch
from torch import Tensor

from mmfn.parallel.mesh.layout import Layout, Mesh
from mmfn.parallel.mesh.virtual import run_virtual
from mmfn.parallel.weights.matrix_owners import on_owners
from mmfn.parallel.weights.sharding import rows


@pytest.mark.parametrize("num_matrices", [1, 2, 4, 7])
@pytest.mark.parametrize("num_rows", [1, 5, 8])
@pytest.mark.parametrize(
    "layout", [Layout(), Layout(dp=2), Layout(dp=3), Layout(replicate=2), Layout(replicate=2, dp=3)], ids=str
)
def test_every_matrix_is_computed_whole_and_once(layout: Layout, num_rows: int, num_matrices: int) -> None:
    g = torch.Generator().manual_seed(0)
    x_NRC = torch.randn(num_matrices, num_rows, 3, generator=g, dtype=torch.float64)

    def run(mesh: Mesh) -> tuple[Tensor, list[Tensor]]:
        seen: list[Tensor] = []

        def fn(whole_NRC: Tensor) -> Tensor:
            seen.extend(x.clone() for x in whole_NRC if x.any())
            return whole_NRC @ whole_NRC.mT @ whole_NRC

        axis = mesh["shard"]
        start, stop = rows(num_rows, axis.size, axis.index)
        own = x_NRC[:, start:stop].contiguous()
        return on_owners(fn, own, num_rows, axis, mesh["replicate"], "test"), seen

    world = run_virtual(layout, run)
    whole = torch.cat([y for y, _ in world.results[: layout.dp]], dim=1)
    torch.testing.assert_close(whole, x_NRC @ x_NRC.mT @ x_NRC, rtol=1e-14, atol=1e-14)
    for rank, (y, _) in enumerate(world.results):
        assert torch.equal(y, world.results[rank % layout.dp][0])
    worked = [x for _, seen in world.results for x in seen]
    assert len(worked) == num_matrices
    assert all(any(torch.equal(x, y) for y in worked) for x in x_NRC)
    kinds = [call.name for call in world.calls[0]]
    assert kinds == ["all_to_all"] * (layout.dp > 1) + ["all_gather"] * (layout.replicate > 1) + ["all_to_all"] * (
        layout.dp > 1
    )
