"""bfloat16: random rounding without a generator, moments kept in it, and float32 copies of parameters."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mmfn.dtypes import wide
from mmfn.parallel.mesh.layout import Layout, Mesh, single_mesh
from mmfn.parallel.mesh.virtual import run_virtual
from mmfn.train import optim
from mmfn.train.gradients import scan_gradients
from mmfn.train.optim import KERNELS, Leaves
from mmfn.train.optim.rounding import round_
from mmfn.tree import Tree
from tests.train.optim_cases import CLIP, DECAY, adamw, composed, draw, groups, set_rates, train


def rounded(values: torch.Tensor, count: int) -> torch.Tensor:
    out = torch.empty(values.shape, dtype=torch.bfloat16)
    round_(out, values, torch.tensor(float(count)))
    return out.float()


def test_rounding_is_to_a_neighbour_and_right_on_average() -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.randn(40_000, generator=g) * torch.exp(4 * torch.randn(40_000, generator=g))
    unit = (values.abs().log2().floor() - 7).exp2()  # of the last place
    total = torch.zeros_like(values, dtype=torch.float64)
    for count in range(1, 65):
        error = (rounded(values, count) - values) / unit
        assert error.abs().max() < 1
        total += error
        assert abs(error.mean().item()) < 0.01  # over values: 0.4 / sqrt(40,000), five times
    assert (total / 64).abs().max() < 0.35  # over counts: 0.5 / sqrt(64), five times
    assert (total / 64).std() < 0.06
    assert abs((total / 64).mean().item()) < 1.5e-3


def test_what_is_exact_stays_and_the_same_call_gives_the_same() -> None:
    g = torch.Generator().manual_seed(1)
    exact = torch.randn(1000, generator=g).bfloat16().float()
    assert torch.equal(rounded(exact, 7), exact)
    values = torch.randn(1000, generator=g)
    assert torch.equal(rounded(values, 7), rounded(values, 7))
    assert not torch.equal(rounded(values, 7), rounded(values, 8))
    parts = torch.cat([rounded(values[:300], 7), rounded(values[300:], 7)])
    assert torch.equal(parts, rounded(values, 7))


def test_a_moment_moves_that_rounding_to_nearest_would_hold() -> None:
    """Second moments near 1 while squared gradients are near 0.25: they fall, and to nearest they would never move."""
    g = torch.Generator().manual_seed(2)
    start = torch.linspace(0.75, 1.25, 2048).bfloat16()
    values, nearest, expected = start.clone(), start.clone(), start.double()
    for count in range(1, 1001):
        squares = 0.5 * torch.rand(2048, generator=g)
        round_(values, values.float() * 0.999 + 0.001 * squares, torch.tensor(float(count)))
        nearest = (nearest.float() * 0.999 + 0.001 * squares).bfloat16()
        expected = expected * 0.999 + 0.001 * squares
    torch.testing.assert_close(values.double().mean(), expected.mean(), rtol=0.01, atol=0)
    assert torch.equal(nearest, start)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_training_with_narrow_moments_stays_close(dtype: torch.dtype, kernel: str) -> None:
    tx = composed(adamw(moments_dtype=torch.bfloat16))
    params, opt, _ = train(tx, range(50), dtype=dtype, kernel=kernel)
    wide, _, _ = train(composed(adamw()), range(50), dtype=dtype, kernel=kernel)
    assert {x.dtype for kind in "mv" for x in opt[1][kind].values()} == {torch.bfloat16}
    start = draw(0, dtype)
    for path, expected in wide.items():
        moved = (expected.float() - start[path].float()).norm()
        unit = torch.finfo(dtype).eps * expected.float().norm()
        assert (params[path].float() - expected.float()).norm() < 0.1 * moved + unit, path


def test_narrow_moments_are_the_same_on_every_layout() -> None:
    """Bitwise: the chance is a function of the value, not of its place. Without clipping and fused kernels, whose last
    digit depends on how a loop is cut, all values agree."""
    tx = optim.adamw(moments_dtype=torch.bfloat16)

    def run(mesh: Mesh) -> tuple[Leaves, Tree, list[Tensor]]:
        return train(tx, range(3), mesh, dtype=torch.float32, kernel="reference")

    params, opt, _ = run(single_mesh())
    for layout in (Layout(dp=3), Layout(dp=4, ep=2)):
        for found, state, _ in run_virtual(layout, run).results:
            assert all(torch.equal(found[p], x) for p, x in params.items())
            assert all(torch.equal(state[kind][p], x) for kind in "mv" for p, x in opt[kind].items())


@pytest.mark.parametrize("kernel", KERNELS)
def test_master_is_the_float32_run_and_parameters_its_rounding(kernel: str) -> None:
    params, opt, _ = train(composed(optim.master(adamw())), range(50), dtype=torch.bfloat16, kernel=kernel)
    theirs = {p: x.float().requires_grad_() for p, x in draw(0, torch.bfloat16).items()}
    oracle = torch.optim.AdamW(groups(theirs, list(theirs), DECAY), betas=(0.8, 0.95), eps=1e-6)
    for i in range(50):
        for path, grad in draw(i + 1, torch.bfloat16).items():
            theirs[path].grad = grad.float()
        torch.nn.utils.clip_grad_norm_(theirs.values(), CLIP)
        set_rates(oracle, list(theirs), i)
        oracle.step()
    for path, copy in opt[1]["master"].items():
        torch.testing.assert_close(copy, theirs[path].detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(params[path], copy.bfloat16())
    assert opt[1]["master"].keys() == params.keys()


def test_master_of_wide_parameters_is_nothing() -> None:
    assert optim.master(optim.adamw()).init(draw(0, torch.float32))["master"] == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_micro_batches_are_summed_in_float32_or_wider(dtype: torch.dtype) -> None:
    """In bfloat16, 256 + 1 is 256: a sum in the gradients' own dtype would lose all micro-batches but the first."""
    values = [256.0, 1.0, 1.0, 1.0]

    def gradients(params: Any, batch: Any, sums: None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"x": torch.full((3,), values[batch], dtype=dtype)}, {"loss": torch.tensor(1.0)}

    total, sums = scan_gradients(gradients, {}, range(4))
    assert total["x"].dtype == wide(dtype)
    assert total["x"].tolist() == [259.0] * 3
    assert sums["loss"] == 4
    alone, _ = scan_gradients(gradients, {}, [0])
    assert alone["x"].dtype == dtype
