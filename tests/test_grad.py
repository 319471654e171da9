"""`value_and_grad` against `torch.autograd` and `torch.func`."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmfn import tree
from mmfn.grad import value_and_grad


def params() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    return {"w": torch.randn(3, 4, generator=g), "layers": [torch.randn(4, 4, generator=g) for _ in range(2)]}


def fn(p: Any, x: Tensor, *, power: float = 2.0) -> Tensor:
    h = x @ p["w"]
    for w in p["layers"]:
        h = torch.tanh(h @ w)
    return h.abs().pow(power).sum()


def test_equals_torch_func_and_passes_arguments_through() -> None:
    x = torch.randn(5, 3)
    value, grads = value_and_grad(fn)(params(), x, power=3.0)
    want = torch.func.grad(lambda p: fn(p, x, power=3.0))(params())
    torch.testing.assert_close(value, fn(params(), x, power=3.0))
    assert tree.paths(grads) == tree.paths(params())
    for got, expected in zip(tree.leaves(grads), tree.leaves(want), strict=True):
        torch.testing.assert_close(got, expected)


def test_params_are_left_alone_and_results_detached() -> None:
    p = params()
    before = tree.map(torch.clone, p)
    (value, aux), grads = value_and_grad(lambda p: (fn(p, torch.ones(2, 3)), {"h": p["w"] * 2, "n": 3}), has_aux=True)(
        p
    )
    assert not value.requires_grad
    assert not aux["h"].requires_grad
    assert aux["n"] == 3
    assert not any(g.requires_grad for g in tree.leaves(grads))
    assert not any(x.requires_grad or x.grad is not None for x in tree.leaves(p))
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(p), tree.leaves(before), strict=True))


def test_works_under_no_grad_and_with_leaves_that_require_grad() -> None:
    p = tree.map(lambda x: x.requires_grad_(), params())
    with torch.no_grad():
        _, grads = value_and_grad(fn)(p, torch.ones(2, 3))
    assert tree.leaves(grads)[0].abs().sum() > 0
    assert tree.leaves(p)[0].grad is None


def test_a_leaf_without_influence_gets_zeros() -> None:
    _, grads = value_and_grad(lambda p: p["a"].sum())({"a": torch.ones(2), "b": torch.ones(3, 2)})
    assert torch.equal(grads["b"], torch.zeros(3, 2))


def test_checkpoint_and_custom_function_inside() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * 2

    def remat(p: Any, x: Tensor) -> Tensor:
        return checkpoint(lambda w: Double.apply(fn({**p, "w": w}, x)), p["w"], use_reentrant=False)

    _, got = value_and_grad(remat)(params(), torch.ones(2, 3))
    _, plain = value_and_grad(lambda p, x: 2 * fn(p, x))(params(), torch.ones(2, 3))
    for a, b in zip(tree.leaves(got), tree.leaves(plain), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("result", "shown"), [(torch.ones(2), r"shape \(2,\)"), (3.0, "float"), (None, "NoneType")])
def test_refuses_what_is_no_scalar(result: object, shown: str) -> None:
    with pytest.raises(ValueError, match=f"returns a scalar tensor; got {shown}"):
        value_and_grad(lambda p: result)({"a": torch.ones(1)})
