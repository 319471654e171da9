"""Rows to experts and back against their obvious forms: values, gradients, order, graphs."""

import pytest
import torch

from mmfn.ops import dispatch as module
from mmfn.ops.dispatch import combine, combine_reference, dispatch, dispatch_reference

SIZES = [(7, 2, 5, 3), (1, 1, 1, 1), (16, 4, 4, 2), (9, 3, 8, 1), (0, 2, 3, 4)]  # T, X, E, D
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 8e-3}


def draw(T, X, E, D, dtype=torch.float64):
    """x, experts of which some are none (E), and weights."""
    g = torch.Generator().manual_seed(T + X + E)
    x_TD = torch.randn(T, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    experts_TX = torch.stack([torch.randperm(E, generator=g)[:X] for _ in range(T)]) if T else torch.empty(0, X).long()
    experts_TX[1::3] = E
    weights_TX = torch.rand(T, X, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return x_TD, experts_TX, weights_TX


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_reference(size, dtype):
    x_TD, experts_TX, weights_TX = draw(*size, dtype)
    E, tol, found = size[2], TOLERANCE[dtype], []
    for send, bring in ((dispatch, combine), (dispatch_reference, combine_reference)):
        x_RD, counts_E, place_TX = send(x_TD, experts_TX, E)
        y_TD = bring(x_RD * 3, place_TX, weights_TX)
        dy_TD = torch.linspace(-1, 2, y_TD.numel(), dtype=dtype).view_as(y_TD)
        found.append((x_RD, counts_E, place_TX, y_TD, *torch.autograd.grad(y_TD, (x_TD, weights_TX), dy_TD)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=tol, atol=tol)
        assert got.dtype == want.dtype


def test_the_example():
    experts_TX = torch.tensor([[1, 0], [3, 3], [1, 2]])
    for fn in (dispatch, dispatch_reference):
        x_RD, counts_E, place_TX = fn(torch.tensor([[0.0], [1.0], [2.0]]), experts_TX, 3)
        assert x_RD.flatten().tolist() == [0, 0, 2, 2, 1, 1]
        assert counts_E.tolist() == [1, 2, 1]
        assert place_TX.tolist() == [[1, 0], [4, 5], [2, 3]]


def test_gradcheck():
    x_TD, experts_TX, weights_TX = draw(6, 2, 4, 3)
    _, _, place_TX = dispatch(x_TD, experts_TX, 4)
    y_RD = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dispatch(x, experts_TX, 4)[0], x_TD)
    assert torch.autograd.gradcheck(lambda y, w: combine(y, place_TX, w), (y_RD, weights_TX))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_compiled_equals_eager(dtype):
    torch._dynamo.reset()

    def run(x_TD, experts_TX, weights_TX):
        x_RD, _, place_TX = dispatch(x_TD, experts_TX, 5)
        return combine(x_RD * 2, place_TX, weights_TX)

    compiled = torch.compile(run, fullgraph=True, dynamic=False, backend="aot_eager")
    inputs = draw(7, 2, 5, 3, dtype)
    found = []
    for fn in (run, compiled):
        y_TD = fn(*inputs)
        found.append([y_TD, *torch.autograd.grad(y_TD.sum(), (inputs[0], inputs[2]))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_narrow_rows_are_added_in_float32():
    """256 and many ones: a sum in bfloat16 would stay 256."""
    y_RD = torch.ones(257, 1, dtype=torch.bfloat16)
    y_RD[0] = 256
    place_TX = torch.arange(257)[None]
    assert combine(y_RD, place_TX, torch.ones(1, 257, dtype=torch.bfloat16)).item() == 512
    x_TD = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    x_RD, _, _ = dispatch(x_TD, torch.zeros(1, 257, dtype=torch.int64), 1)
    assert torch.autograd.grad(x_RD, x_TD, y_RD)[0].item() == 512


@pytest.mark.parametrize("is_dense", [True, False], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("X", [1, 2, 4])
def test_narrow_sums_are_rounded_once_and_ties_to_even(X, dtype, is_dense, monkeypatch):
    """Bit by bit as the reference, forward and in the gradient of rows sent; in pieces of a few tokens."""
    monkeypatch.setattr(module, "WIDE_VALUES", 1000)
    x_TD, experts_TX, weights_TX = draw(64, X, 8, 64, dtype)
    x_RD, _, place_TX = dispatch(x_TD, experts_TX, 8)
    y_RD = (4 * x_RD.detach() + 1).to(dtype)
    y_RD = y_RD if is_dense else y_RD.T.contiguous().T
    assert torch.equal(combine(y_RD, place_TX, weights_TX), combine_reference(y_RD, place_TX, weights_TX))
    sums_TD = torch.autograd.grad(x_RD, x_TD, y_RD)[0]
    assert torch.equal(sums_TD, y_RD[place_TX].float().sum(1).to(dtype))


def test_weights_that_are_not_trained_get_no_gradient():
    x_TD, experts_TX, weights_TX = draw(6, 2, 4, 3)
    x_RD, _, place_TX = dispatch(x_TD, experts_TX, 4)
    y_TD = combine(x_RD, place_TX, weights_TX.detach())
    assert torch.autograd.grad(y_TD.sum(), x_TD)[0].shape == (6, 3)
    y_TD = combine(x_RD.detach(), place_TX, weights_TX)
    assert torch.autograd.grad(y_TD.sum(), weights_TX)[0].shape == (6, 2)


@pytest.mark.parametrize("fns", [(dispatch, combine), (dispatch_reference, combine_reference)], ids=["fast", "slow"])
def test_what_does_not_fit_is_refused(fns):
    send, bring = fns
    with pytest.raises(ValueError, match=r"x_TD \(3, 2\) and experts_TX \(4, 1\) must be \[T, D\] and \[T, X\]"):
        send(torch.zeros(3, 2), torch.zeros(4, 1, dtype=torch.int64), 2)
    place_TX = torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"y_RD \(5, 2\), place_TX \(3, 2\) and weights_TX \(3, 2\) must be"):
        bring(torch.zeros(5, 2), place_TX, torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"y_RD is torch.float32 and weights_TX torch.float64; cast the weights"):
        bring(torch.zeros(6, 2), place_TX, torch.zeros(3, 2, dtype=torch.float64))
