"""Interpolated rows against their obvious form, and taps against torch's own interpolations."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from mmfn.models.layers import interpolation
from mmfn.ops.interpolate import interpolate, interpolate_reference

SIZES = [(9, 7, 4, 3), (1, 1, 1, 1), (30, 5, 16, 8), (16, 0, 4, 5), (25, 40, 16, 1)]  # N, P, K, D
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2}
GRIDS = [(4, 6), (2, 2), (1, 1), (24, 24), (36, 10), (49, 35), (3, 5), (1, 8)]


def draw(N, P, K, D, dtype=torch.float64):
    g = torch.Generator().manual_seed(N + P + K)
    table_ND = torch.randn(N, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    parts_PK = torch.randn(P, K, generator=g, dtype=torch.float64)
    return table_ND, torch.randint(N, (P, K), generator=g), parts_PK.to(torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_reference(size, dtype):
    table_ND, rows_PK, parts_PK = draw(*size, dtype)
    found = []
    for fn in (interpolate, interpolate_reference):
        y_PD = fn(table_ND, rows_PK, parts_PK)
        dy_PD = torch.linspace(-1, 2, y_PD.numel(), dtype=y_PD.dtype).view_as(y_PD)
        found.append((y_PD, *torch.autograd.grad(y_PD, table_ND, dy_PD)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert got.dtype == want.dtype
    assert found[0][0].dtype == torch.promote_types(dtype, torch.float32)


def test_the_example():
    table_ND = torch.tensor([[0.0], [1.0], [4.0]])
    for fn in (interpolate, interpolate_reference):
        assert fn(table_ND, torch.tensor([[1, 2], [0, 0]]), torch.tensor([[0.5, 0.5], [2.0, 1.0]])).tolist() == [
            [2.5],
            [0],
        ]


def test_gradcheck():
    table_ND, rows_PK, parts_PK = draw(6, 5, 4, 3)
    assert torch.autograd.gradcheck(lambda table: interpolate(table, rows_PK, parts_PK), table_ND)


def test_compiled_equals_eager():
    torch._dynamo.reset()
    table_ND, rows_PK, parts_PK = draw(9, 7, 4, 3)
    found = []
    for fn in (interpolate, torch.compile(interpolate, backend="aot_eager", fullgraph=True, dynamic=False)):
        y_PD = fn(table_ND, rows_PK, parts_PK)
        found.append((y_PD, *torch.autograd.grad(y_PD.square().sum(), table_ND)))
    assert all(torch.equal(got, want) for got, want in zip(*found, strict=True))
    torch._dynamo.reset()


@pytest.mark.parametrize(("fn", "is_lean"), [(interpolate, True), (interpolate_reference, False)])
def test_no_row_of_a_tap_is_copied(fn, is_lean):
    """Forward and backward allocate nothing larger than the result; the reference does."""
    table_ND, rows_PK, parts_PK = draw(30, 64, 16, 32, torch.float32)
    fn(table_ND, rows_PK, parts_PK)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        torch.autograd.grad(fn(table_ND, rows_PK, parts_PK), table_ND, torch.ones(64, 32))
    largest = max(event.self_cpu_memory_usage for event in seen.events())
    assert largest >= 64 * 32 * 4
    assert (largest <= 64 * 16 * 8) == is_lean  # places are int64: [P, K] of them take more than [P, D] of float32


def test_what_does_not_fit_is_refused():
    table_ND, rows_PK, parts_PK = draw(6, 5, 4, 3)
    for args in ((table_ND[0], rows_PK, parts_PK), (table_ND, rows_PK[0], parts_PK), (table_ND, rows_PK, parts_PK.T)):
        for fn in (interpolate, interpolate_reference):
            with pytest.raises(ValueError, match=r"must be \[N, D\] and twice \[P, K\]"):
                fn(*args)
    with pytest.raises(ValueError, match="parts_PK requires a gradient"):
        interpolate(table_ND, rows_PK, parts_PK.requires_grad_())


def coords(height, width):
    row, column = (x.flatten() for x in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    return torch.stack([row, column, torch.full_like(row, height), torch.full_like(row, width)], 1).to(torch.int32)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 24])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_bicubic_taps_are_those_of_grid_sample(grid, side):
    """As GLM-4.5V calls it: not aligned at corners, the border repeated."""
    table_ND = torch.randn(side * side, 5, generator=torch.Generator().manual_seed(side), dtype=torch.float64)
    coords_P4 = coords(*grid)
    place_P2 = (coords_P4[:, :2].double() + 0.5) / coords_P4[:, 2:] * 2 - 1
    image = table_ND.view(1, side, side, 5).permute(0, 3, 1, 2)
    want = F.grid_sample(
        image, place_P2.flip(1)[None, :, None], mode="bicubic", align_corners=False, padding_mode="border"
    )
    got_PD = interpolate(table_ND, *interpolation.bicubic(coords_P4, side, torch.float64))
    torch.testing.assert_close(got_PD, want[0, :, :, 0].T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", [1, 2, 3, 24])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_bilinear_taps_are_a_resize_of_the_table(grid, side):
    table_ND = torch.randn(side * side, 5, generator=torch.Generator().manual_seed(side), dtype=torch.float64)
    image = table_ND.view(1, side, side, 5).permute(0, 3, 1, 2)
    want = F.interpolate(image, grid, mode="bilinear", align_corners=True)[0].flatten(1).T
    got_PD = interpolate(table_ND, *interpolation.bilinear(coords(*grid), side, torch.float64))
    torch.testing.assert_close(got_PD, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("taps", [interpolation.bilinear, interpolation.bicubic])
def test_parts_add_up_to_one_and_float32_keeps_them(taps):
    coords_P4 = coords(98, 70)
    rows_PK, parts_PK = taps(coords_P4, 24, torch.float32)
    _, exact_PK = taps(coords_P4, 24, torch.float64)
    assert rows_PK.dtype == torch.int64
    assert rows_PK.min() == 0
    assert rows_PK.max() == 24 * 24 - 1
    torch.testing.assert_close(parts_PK.sum(1), torch.ones(len(parts_PK)), rtol=0, atol=1e-5)
    assert exact_PK.dtype == torch.float64
