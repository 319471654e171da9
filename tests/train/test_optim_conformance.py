"""Every optimizer of `optim_cases` against its oracle, by every kernel, on every mesh; and what a bad step leaves."""

from functools import partial

import pytest
import torch

from mmfn import tree
from mmfn.parallel.mesh.layout import Layout
from mmfn.parallel.mesh.virtual import run_virtual
from mmfn.train.optim import KERNELS
from tests.train.optim_cases import CASES, Case, draw, train

NUM_STEPS = 100
LAYOUTS = (
    Layout(dp=2),
    Layout(dp=3),
    Layout(dp=4),
    Layout(cp=2, dp=2),
    Layout(replicate=2),
    Layout(replicate=2, dp=2),
    Layout(replicate=3, dp=2),
    Layout(dp=2, ep=2),
    Layout(dp=4, ep=2),
    Layout(dp=3, ep=3),  # of 4 experts the last rank has none
    Layout(replicate=2, dp=4, ep=2),
)
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.mark.parametrize("kernel", KERNELS)
@each_case
def test_100_steps_are_the_oracles(case: Case, kernel: str) -> None:
    params, opt, _ = train(case.make(), range(NUM_STEPS), kernel=kernel)
    expected = case.oracle({p: x.requires_grad_() for p, x in draw(0).items()}, NUM_STEPS)
    start = draw(0)
    for path, found in case.read(params, opt).items():
        torch.testing.assert_close(found, expected[path].detach(), rtol=1e-12, atol=1e-12, msg=path)
        assert not torch.equal(found, start[path])


@pytest.mark.parametrize("name", ["muon", "sgd with nesterov", "master", "ema"])  # every operator there is
def test_one_graph_serves_all_steps(name: str) -> None:
    torch._dynamo.reset()
    (case,) = [case for case in CASES if case.name == name]
    jit = partial(torch.compile, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = train(case.make(), range(4), kernel="traced", poisoned=2, jit=jit)
    expected = train(case.make(), range(4), poisoned=2)
    for one, other in zip(tree.leaves(list(found[:2])), tree.leaves(list(expected[:2])), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@each_case
def test_a_mesh_is_one_device(case: Case, layout: Layout) -> None:
    params, opt, norms = train(case.make(), range(2))
    world = run_virtual(layout, lambda mesh: train(case.make(), range(2), mesh))
    for found, state, found_norms in world.results:
        torch.testing.assert_close(torch.stack(found_norms), torch.stack(norms), rtol=1e-14, atol=0)
        for path, expected in params.items():
            torch.testing.assert_close(found[path], expected, rtol=1e-10, atol=1e-12, msg=path)
            assert torch.equal(found[path], world.results[0][0][path]), f"{path} differs between ranks"
        for path, expected in tree.items(opt):
            torch.testing.assert_close(dict(tree.items(state))[path], expected, rtol=1e-10, atol=1e-12, msg=path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@each_case
def test_a_step_that_is_not_finite_changes_nothing(case: Case, kernel: str, dtype: torch.dtype) -> None:
    before = train(case.make(), range(2), kernel=kernel, dtype=dtype)
    after = train(case.make(), range(3), kernel=kernel, dtype=dtype, poisoned=2)
    assert torch.isnan(after[2][2])
    assert_bitwise(after[:2], before[:2])
    moved = train(case.make(), range(3), kernel=kernel, dtype=dtype)
    assert not torch.equal(moved[0]["tall/weight"], before[0]["tall/weight"])


@pytest.mark.parametrize("layout", [Layout(dp=2), Layout(replicate=2, dp=2), Layout(dp=4, ep=2)], ids=str)
@each_case
def test_a_gradient_of_one_rank_that_is_not_finite_changes_nothing_anywhere(case: Case, layout: Layout) -> None:
    before = run_virtual(layout, lambda mesh: train(case.make(), range(1), mesh)).results
    after = run_virtual(layout, lambda mesh: train(case.make(), range(2), mesh, poisoned=1)).results
    for one, other in zip(before, after, strict=True):
        assert torch.isnan(other[2][1])
        assert_bitwise(other[:2], one[:2])


def assert_bitwise(found: object, expected: object) -> None:
    pairs = list(zip(tree.leaves(list(found)), tree.leaves(list(expected)), strict=True))  # type: ignore[call-overload]
    assert pairs
    for one, other in pairs:
        assert one.dtype == other.dtype
        assert torch.equal(
            one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8)
        )
