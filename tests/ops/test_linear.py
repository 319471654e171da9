"""The linear op against its sum over products, and against torch's."""

import pytest
import torch
import torch.nn.functional as F

from mmfn.ops.linear import linear, linear_reference


@pytest.mark.parametrize("leading", [(4,), (2, 3), (0,), ()], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_equals_the_reference(has_bias, leading):
    g = torch.Generator().manual_seed(0)
    shapes = [(*leading, 5), (3, 5), (3,)]
    x, weight, bias = (torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes)
    leaves = (x, weight, bias) if has_bias else (x, weight)
    found = []
    for fn in (linear, linear_reference, F.linear):
        y = fn(x, weight, bias if has_bias else None)
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for got, want, of_torch in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
        assert torch.equal(got, of_torch)


@pytest.mark.parametrize("fn", [linear, linear_reference])
def test_what_does_not_fit_is_refused(fn):
    with pytest.raises(ValueError, match=r"x_D \(2, 4\) and weight_FD \(3, 5\) must be \[..., D\] and \[F, D\]"):
        fn(torch.zeros(2, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"bias_F has shape \(2,\) but the weight 3 rows"):
        fn(torch.zeros(2, 5), torch.zeros(3, 5), torch.zeros(2))
    with pytest.raises(ValueError, match=r"x_D is .*float32 and weight_FD .*float64; cast both"):
        fn(torch.zeros(2, 5), torch.zeros(3, 5, dtype=torch.float64))
