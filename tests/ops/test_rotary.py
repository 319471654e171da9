"""rotary against the formula of transformers (rotate_half) and the properties of a rotation."""

import pytest
import torch

from mmfn.ops.rotary import rotary, rotary_reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
SIZES = [(5, 3, 8, 4), (7, 1, 8, 3), (1, 2, 2, 1), (0, 2, 4, 2), (33, 8, 64, 32), (4, 2, 5, 2)]  # T, H, C, R


def draw(T, H, C, R, dtype):
    generator = torch.Generator().manual_seed(T + C)
    x = torch.randn(T, H, C, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    angle = torch.randn(T, R, dtype=torch.float64, generator=generator)
    return x, angle.cos().to(dtype), angle.sin().to(dtype)


def rotate_half_form(x, cos, sin):
    """The form of transformers: cos and sin doubled, the halves swapped with a sign."""
    R = cos.shape[-1]
    turned, rest = x[..., : 2 * R], x[..., 2 * R :]
    cos, sin = (torch.cat([a, a], dim=-1)[:, None] for a in (cos, sin))
    swapped = torch.cat([-turned[..., R:], turned[..., :R]], dim=-1)
    return torch.cat([turned * cos + swapped * sin, rest], dim=-1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("fn", [rotary, rotary_reference])
def test_equals_rotate_half(fn, size, dtype):
    x, cos, sin = draw(*size, dtype)
    before, dy, tol = x.detach().clone(), torch.ones_like(x).cumsum(0), TOLERANCE[dtype]
    actual, expected = fn(x, cos, sin), rotate_half_form(x, cos, sin)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected, atol=tol, rtol=tol)
    grads = [torch.autograd.grad(y, x, dy) for y in (actual, expected)]
    torch.testing.assert_close(grads[0], grads[1], atol=10 * tol, rtol=10 * tol)
    assert torch.equal(x, before)


def test_gradcheck_and_length_is_kept():
    x, cos, sin = draw(4, 2, 7, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotary(x, cos, sin), x)
    torch.testing.assert_close(rotary(x, cos, sin).norm(dim=-1), x.norm(dim=-1))


def test_heads_that_are_a_view_of_one_projection():
    x, cos, sin = draw(6, 9, 8, 4, torch.float64)
    q, expected = x[:, 2:5], rotate_half_form(x[:, 2:5], cos, sin)
    torch.testing.assert_close(rotary(q, cos, sin), expected)
    dy = torch.randn(8, 3, 6, dtype=torch.float64).permute(2, 1, 0)
    grads = [torch.autograd.grad(y, x, dy) for y in (rotary(q, cos, sin), expected)]
    torch.testing.assert_close(grads[0], grads[1])


def test_bfloat16_by_float32_angles_is_computed_in_float32():
    x, cos, sin = draw(6, 2, 8, 3, torch.float32)
    narrow = x.detach().bfloat16().requires_grad_()
    actual, expected = rotary(narrow, cos, sin), rotary_reference(narrow.detach().float(), cos, sin)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected.bfloat16(), atol=0, rtol=0)
    assert torch.autograd.grad(actual.sum(), narrow)[0].dtype == torch.bfloat16


# torch itself uses what it deprecates when inductor is imported
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(backend):
    x, cos, sin = draw(5, 2, 8, 3, torch.float32)
    run = torch.compile(rotary, fullgraph=True, dynamic=False, backend=backend)
    actual, expected = run(x, cos, sin), rotary(x, cos, sin)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
    grads = [torch.autograd.grad(y.square().sum(), x) for y in (actual, expected)]
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-5)


def test_bad_angles_are_refused():
    x, cos, sin = draw(5, 2, 8, 3, torch.float32)
    with pytest.raises(ValueError, match=r"cos_TR \(4, 3\)"):
        rotary(x, cos[:4], sin[:4])
    with pytest.raises(ValueError, match="2R <= C"):
        rotary(x[..., :5], cos, sin)
    with pytest.raises(ValueError, match="constants"):
        rotary(x, cos.requires_grad_(), sin)
