"""The helper for functions with a backward of their own: one rule, entered as a Function, an operator or in a graph."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmfn.ops.custom import Context, function, operator
from mmfn.ops.eager import is_eager

ran = []


class Mode(TorchDispatchMode):
    def __init__(self, is_eager: bool) -> None:
        super().__init__()
        self.is_eager, self.names = is_eager, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def _scaled(x: Tensor, y: Tensor, power: int) -> tuple[Tensor, Tensor]:
    ran.append("scaled")
    return x**power * y, x**power


def _scaled_fake(x: Tensor, y: Tensor, power: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _save(ctx: Context, inputs, outputs) -> None:
    x, y, ctx.settings = inputs
    ctx.save_for_backward(x, y, outputs[1])


def _gradient(ctx: Context, dout: Tensor, *_) -> tuple[Tensor | None, ...]:
    x, y, powered = ctx.saved_tensors
    needs_x, needs_y, _ = ctx.needs_input_grad
    power = ctx.settings
    dx = SCALED(x, dout * y, power - 1)[0] * power if needs_x else None
    return dx, powered * dout if needs_y else None, None


SCALED = operator("mmfn_test::scaled", _scaled, _scaled_fake)
scaled = SCALED.with_gradient(_save, _gradient)


def leaves(*needs: bool) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    pair = (torch.rand(5, dtype=torch.float64, generator=g) + 0.5 for _ in range(2))
    return tuple(x.requires_grad_(need) for x, need in zip(pair, needs or (True, True), strict=True))


def outcome(fn, *needs: bool) -> list[Tensor]:
    inputs = leaves(*needs)
    out = fn(*inputs)
    return [out.detach(), *torch.autograd.grad(out.sum(), [x for x in inputs if x.requires_grad])]


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_all_entries_give_the_bits_of_the_formula(needs):
    want = outcome(lambda x, y: x**3 * y, *needs)
    torch._dynamo.reset()
    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    for run in (scaled, compiled):
        for a, b in zip(outcome(lambda x, y, run=run: run(x, y, 3), *needs), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-14, atol=0)
    with Mode(is_eager=False) as mode:
        watched = outcome(lambda x, y: scaled(x, y, 3), *needs)
    assert all(torch.equal(a, b) for a, b in zip(watched, outcome(lambda x, y: scaled(x, y, 3), *needs), strict=True))
    assert mode.names.count("mmfn_test::scaled") == (2 if needs[0] else 1)


def test_the_python_function_runs_where_execution_is_eager():
    for is_plain, seen in ((True, False), (False, True)):
        with Mode(is_eager=is_plain) as mode:
            assert is_eager(torch.ones(1)) == is_plain
            scaled(*leaves(), 2)
        assert ("mmfn_test::scaled" in mode.names) == seen
    ran.clear()
    scaled(*leaves(), 2)
    assert ran == ["scaled"]


def test_the_gradient_is_no_function_to_differentiate_again():
    x, y = leaves()
    (dx,) = torch.autograd.grad(scaled(x, y, 3).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_functions_keep_nothing_but_what_they_save():
    square = function(lambda ctx, x: ctx.save_for_backward(x) or x * x, lambda ctx, dy: 2 * ctx.saved_tensors[0] * dy)
    x = leaves()[0]
    torch.testing.assert_close(torch.autograd.grad(square(x).sum(), x)[0], 2 * x.detach())


def test_operators_are_registered_well():
    torch.library.opcheck(torch.ops.mmfn_test.scaled.default, (*leaves(), 3))
