"""Dtypes of computation and of gradient sums; what travels in which is in `test_gather.py`."""

from typing import Any

import pytest
import torch

from mmfn.parallel.data_parallel import data_parallel
from mmfn.parallel.mesh import Layout, single_mesh
from mmfn.parallel.precision import precision
from mmfn.parallel.program import Program, lower, pipe
from tests.parallel.conformance import Cell, one_device, outcome, run_cell


def test_facts() -> None:
    program = pipe(Program.of(None), precision(compute=torch.bfloat16, reduce=torch.float32))
    assert (program.compute_dtype, program.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert program.notes == ("precision: compute torch.bfloat16, gradient sums torch.float32",)
    assert pipe(Program.of(None), precision()).notes == ("precision: compute as stored, gradient sums as computed",)


def test_one_device_computes_in_it_and_keeps_its_parameters() -> None:
    gather = lower(pipe(Program.of(None), precision(compute=torch.bfloat16))).ops.gather
    leaf = torch.randn(3, requires_grad=True)
    out = gather({"a": [leaf]})["a"][0]
    assert out.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    assert grad.dtype == leaf.dtype == torch.float32


@pytest.mark.parametrize("reduce", [None, torch.float32])
@pytest.mark.parametrize("layout", [Layout(), Layout(dp=2), Layout(replicate=2)], ids=str)
def test_a_step_in_bfloat16_is_near_one_in_float64(layout: Layout, reduce: Any) -> None:
    """Loss and norm; single gradients of a model this small are noise of rounding where they cancel."""
    transforms = (data_parallel(), precision(compute=torch.bfloat16, reduce=reduce))
    cell = Cell(layout=layout, name="bf16", transforms=transforms, dtype=torch.bfloat16)
    if layout.world == 1:
        found = outcome(cell, single_mesh())
    else:
        world = run_cell(cell)
        found = world.results[0]
        travels = {(c.site, c.dtype) for c in world.calls[0] if c.site in ("weights", "gradients")}
        weights = {("weights", torch.bfloat16)} if layout.shard > 1 else set()
        assert travels == weights | {("gradients", reduce or torch.bfloat16)}
    want = one_device(cell)
    for name in ("loss", "grad_norm"):
        error = (found[f"metrics/{name}"].double() / want[f"metrics/{name}"] - 1).abs()
        assert 0 < error < 0.03, name
    assert all(x.dtype == torch.float64 for name, x in found.items() if name.startswith("params/"))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"precision got compute=torch\.int64 but it must be floating-point"):
        precision(compute=torch.int64)
    with pytest.raises(ValueError, match=r"precision got reduce=torch\.bool"):
        precision(reduce=torch.bool)
