"""rms_norm and layer_norm against torch's own functions: values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from mmfn.ops import norm

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
SHAPES = [(7, 3, 16), (5, 1), (1, 33), (0, 4), (8,), (64, 2, 64)]
EPS = 1e-6


def draw(shape, dtype, *, offset=0.0):
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    x = torch.randn(shape, dtype=torch.float64, generator=generator) + offset
    return x.to(dtype).requires_grad_()


def torch_rms_norm(x, weight, eps):
    return F.rms_norm(x, weight.shape, weight, eps)


def torch_layer_norm(x, weight, bias, eps):
    return F.layer_norm(x, weight.shape, weight, bias, eps)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fn", [norm.rms_norm, norm.rms_norm_reference])
def test_rms_norm_equals_torch(fn, shape, dtype):
    x, weight, dy = draw(shape, dtype), draw(shape[-1:], dtype, offset=1.0), draw(shape, dtype).detach()
    before = x.detach().clone()
    actual, expected = fn(x, weight, EPS), torch_rms_norm(x, weight, EPS)
    tol = TOLERANCE[dtype]
    torch.testing.assert_close(actual, expected, atol=tol, rtol=tol)
    grads = [torch.autograd.grad(y, (x, weight), dy) for y in (actual, expected)]
    torch.testing.assert_close(grads[0], grads[1], atol=10 * tol, rtol=10 * tol)  # sums over rows
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fn", [norm.layer_norm, norm.layer_norm_reference])
def test_layer_norm_equals_the_definition(fn, shape, dtype):
    x, weight, bias = draw(shape, dtype, offset=2.0), draw(shape[-1:], dtype), draw(shape[-1:], dtype, offset=1.0)
    dy, tol = draw(shape, dtype).detach(), TOLERANCE[dtype]
    eps = 1e-2  # a single channel has no variance at all: eps decides
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    expected = (centred / (centred.pow(2).mean(-1, keepdim=True) + eps) ** 0.5 * weight.double() + bias.double()).to(
        dtype
    )
    actual = fn(x, weight, bias, eps)
    torch.testing.assert_close(actual, expected, atol=10 * tol, rtol=10 * tol)
    grads = [torch.autograd.grad(y, (x, weight, bias), dy) for y in (actual, expected)]
    torch.testing.assert_close(grads[0], grads[1], atol=100 * tol, rtol=10 * tol)  # float32 cancels where D = 1


def test_layer_norm_reference_equals_torch():
    x, weight, bias = draw((9, 24), torch.float64), draw((24,), torch.float64), draw((24,), torch.float64)
    torch.testing.assert_close(norm.layer_norm_reference(x, weight, bias, EPS), torch_layer_norm(x, weight, bias, EPS))


def test_rms_norm_gradcheck():
    x, weight = draw((4, 2, 6), torch.float64), draw((6,), torch.float64)
    assert torch.autograd.gradcheck(lambda x, weight: norm.rms_norm(x, weight, EPS), (x, weight))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fn", [norm.rms_norm_gated, norm.rms_norm_gated_reference])
def test_rms_norm_gated_equals_its_parts_of_torch(fn, shape, dtype):
    x, weight = draw(shape, dtype), draw(shape[-1:], dtype, offset=1.0)
    gate, dy = (draw((*shape, 2), dtype)[..., i].detach() for i in range(2))
    gate.requires_grad_()
    before = [t.detach().clone() for t in (x, gate, weight)]
    actual, expected = fn(x, gate, weight, EPS), torch_rms_norm(x, weight, EPS) * F.silu(gate)
    tol = TOLERANCE[dtype]
    torch.testing.assert_close(actual, expected, atol=tol, rtol=tol)
    grads = [torch.autograd.grad(y, (x, gate, weight), dy) for y in (actual, expected)]
    torch.testing.assert_close(grads[0], grads[1], atol=10 * tol, rtol=10 * tol)  # sums over rows
    assert all(torch.equal(a, b) for a, b in zip((x, gate, weight), before, strict=True))


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_rms_norm_gated_with_one_frozen_input(frozen):
    inputs = [draw((6, 8), torch.float64), draw((6, 8), torch.float64, offset=0.5), draw((8,), torch.float64)]
    inputs[frozen].requires_grad_(False)
    leaves = [x for x in inputs if x.requires_grad]
    fns = (norm.rms_norm_gated, norm.rms_norm_gated_reference)
    grads = [torch.autograd.grad(fn(*inputs, EPS).square().sum(), leaves) for fn in fns]
    torch.testing.assert_close(grads[0], grads[1])


def test_rms_norm_gated_has_the_casts_of_transformers():
    """Bit for bit in bfloat16, where its weight is one too."""
    qwen = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    x, gate = draw((16, 64), torch.bfloat16), draw((16, 64), torch.bfloat16, offset=0.3)
    weight = draw((64,), torch.bfloat16, offset=1.0)
    theirs = qwen.Qwen3_5RMSNormGated(64, eps=EPS).bfloat16()
    theirs.weight = torch.nn.Parameter(weight.detach().clone())
    want = theirs(x, gate)
    assert torch.equal(norm.rms_norm_gated_reference(x, gate, weight, EPS), want)
    actual = norm.rms_norm_gated(x, gate, weight, EPS)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, want, atol=0, rtol=2**-7)  # one unit in the last place
    grads = torch.autograd.grad(actual.sum(), (x, gate, weight))
    wide = [t.detach().double().requires_grad_() for t in (x, gate, weight)]
    exact = torch.autograd.grad(norm.rms_norm_gated(*wide, EPS).sum(), wide)
    for a, b in zip(grads, exact, strict=True):
        torch.testing.assert_close(a.double(), b, atol=0.01, rtol=0.02)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_rms_norm_with_one_frozen_input(frozen):
    x, weight = draw((6, 8), torch.float64), draw((8,), torch.float64)
    (x if frozen == "x" else weight).requires_grad_(False)
    leaf = weight if frozen == "x" else x
    grads = [torch.autograd.grad(fn(x, weight, EPS).square().sum(), leaf) for fn in (norm.rms_norm, torch_rms_norm)]
    torch.testing.assert_close(grads[0], grads[1])


def test_rms_norm_bfloat16_has_float32_statistics_and_casts_like_the_reference():
    x, weight = draw((16, 64), torch.bfloat16), draw((64,), torch.bfloat16, offset=1.0)
    actual, expected = norm.rms_norm(x, weight, EPS), norm.rms_norm_reference(x, weight, EPS)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, atol=0, rtol=2**-7)  # one unit in the last place
    exact = torch_rms_norm(x.detach().double(), weight.detach().double(), EPS)
    assert (actual.double() - exact).abs().max() <= (expected.double() - exact).abs().max() + 2**-8
    dy = draw((16, 64), torch.bfloat16).detach()
    grads = [torch.autograd.grad(y, (x, weight), dy) for y in (actual, expected)]
    torch.testing.assert_close(grads[0], grads[1], atol=0.06, rtol=0.03)  # bfloat16 roundings of plain autograd


@pytest.mark.parametrize("fn", [norm.rms_norm, norm.rms_norm_reference])
def test_rms_norm_by_a_float32_weight_keeps_the_dtype_of_x(fn):
    x, weight = draw((3, 8), torch.bfloat16), draw((8,), torch.float32)
    actual, expected = fn(x, weight, EPS), torch_rms_norm(x.float(), weight, EPS)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, atol=0, rtol=2**-8)  # one rounding, of the result
    grads = torch.autograd.grad(actual.sum(), (x, weight))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]


# torch itself uses what it deprecates when inductor is imported
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(backend):
    x, weight, bias = (draw(s, torch.float32) for s in ((5, 8), (8,), (8,)))

    def both(x, weight, bias):
        gated = norm.rms_norm_gated(x, x * 2, weight, EPS)
        return norm.rms_norm(x, weight, EPS), gated, norm.layer_norm(x, weight, bias, EPS)

    run = torch.compile(both, fullgraph=True, dynamic=False, backend=backend)
    actual, expected = run(x, weight, bias), both(x, weight, bias)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
    grads = [torch.autograd.grad([y.square().sum() for y in ys], (x, weight, bias)) for ys in (actual, expected)]
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-5)


def test_a_weight_of_another_width_is_refused():
    x, weight, other = draw((5, 8), torch.float32), draw((8,), torch.float32), draw((4,), torch.float32)
    with pytest.raises(ValueError, match=r"\(4,\) but x has \(5, 8\)"):
        norm.rms_norm(x, other, EPS)
    with pytest.raises(ValueError, match=r"\(4,\) but x has \(5, 8\)"):
        norm.layer_norm(x, weight, other, EPS)
    with pytest.raises(ValueError, match=r"the gate has shape \(8,\) but x has \(5, 8\)"):
        norm.rms_norm_gated(x, weight, weight, EPS)


@pytest.mark.parametrize("wide", [0, 1])
def test_layer_norm_of_two_dtypes_computes_in_the_wider(wide):
    """Rules of `precision` may leave weight and bias in different dtypes."""
    dtypes = [torch.float64 if i == wide else torch.float32 for i in range(2)]
    x, weight, bias = draw((7, 16), torch.float32), *(draw((16,), dtype, offset=1.0) for dtype in dtypes)
    want = F.layer_norm(x.double(), (16,), weight.double(), bias.double(), EPS).float()
    assert torch.equal(norm.layer_norm(x, weight, bias, EPS), want)
