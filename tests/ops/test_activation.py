"""Activations against torch's functions and their definitions: values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from mmfn.ops import activation

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
PAIRS = [
    (activation.gelu, activation.gelu_reference, lambda x: F.gelu(x)),
    (activation.gelu_tanh, activation.gelu_tanh_reference, lambda x: F.gelu(x, approximate="tanh")),
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(9, 5), (1,), (0, 3), (2, 3, 4)], ids=str)
def test_swiglu(shape, dtype):
    generator = torch.Generator().manual_seed(1)
    gate, up, dy = (3 * torch.randn(shape, dtype=dtype, generator=generator) for _ in range(3))
    leaves, tol = (gate.requires_grad_(), up.requires_grad_()), TOLERANCE[dtype]
    ys = [activation.swiglu(*leaves), activation.swiglu_reference(*leaves), F.silu(gate) * up]
    grads = [torch.autograd.grad(y, leaves, dy) for y in ys]
    for y, grad in zip(ys, grads, strict=True):
        torch.testing.assert_close(y, ys[-1], atol=tol, rtol=tol)
        torch.testing.assert_close(grad, grads[-1], atol=tol, rtol=tol)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("fn", "reference", "oracle"), PAIRS, ids=["gelu", "gelu_tanh"])
def test_gelu(fn, reference, oracle, dtype):
    x, tol = torch.linspace(-6, 6, 49, dtype=dtype).requires_grad_(), TOLERANCE[dtype]
    expected = oracle(x)
    dx = torch.autograd.grad(expected.sum(), x)
    for y in (fn(x), reference(x)):
        torch.testing.assert_close(y, expected, atol=tol, rtol=tol)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x), dx, atol=tol, rtol=tol)


def test_known_values():
    one = torch.ones((), dtype=torch.float64)
    assert activation.gelu(one).item() == pytest.approx(0.8413447460685429, abs=1e-15)  # Phi(1)
    assert activation.swiglu(one, 2 * one).item() == pytest.approx(2 / (1 + 2.718281828459045**-1), abs=1e-15)
    assert activation.gelu_tanh(one).item() != activation.gelu(one).item()


def test_large_values_do_not_overflow():
    x = torch.tensor([-80.0, 80.0], requires_grad=True)
    for fn in (activation.gelu, activation.gelu_tanh, lambda x: activation.swiglu(x, torch.ones(2))):
        y = fn(x)
        torch.testing.assert_close(y, torch.tensor([0.0, 80.0]), atol=1e-6, rtol=1e-6)
        assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()
