"""linear_cross_entropy against torch's cross entropy over full logits: values, gradients, what it does not compute."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mmfn.batch import IGNORE
from mmfn.ops.cross_entropy import CHUNK_BYTES, chunk_rows, linear_cross_entropy, linear_cross_entropy_reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
SIZES = [(37, 50, 12), (1, 7, 3), (9, 1, 4), (16, 33, 1), (0, 5, 3)]  # T, V, D
FUNCTIONS = {
    "whole": linear_cross_entropy,
    "chunked": lambda *args: linear_cross_entropy(*args, chunk=4),
    "rows": lambda *args: linear_cross_entropy(*args, chunk=1),
    "reference": linear_cross_entropy_reference,
}
QUIET_INDUCTOR = "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"  # torch's own, on import


def draw(T, V, D, dtype=torch.float64, supervised="some", scale=1.0):
    """x and head as leaves, labels, weights."""
    generator = torch.Generator().manual_seed(T + V + D)
    x = (scale * torch.randn(T, D, dtype=torch.float64, generator=generator)).to(dtype).requires_grad_()
    head = torch.randn(V, D, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(V, (T,), generator=generator)
    labels[{"all": [], "some": slice(0, None, 3), "none": slice(None)}[supervised]] = IGNORE
    weights = torch.rand(T, generator=generator, dtype=dtype if dtype == torch.float64 else torch.float32)
    return (x, head), labels, weights


def full_logits(x, head, labels, weights):
    losses = F.cross_entropy(F.linear(x, head), labels, ignore_index=IGNORE, reduction="none")
    return (losses * weights).sum()


def gradients(loss, leaves, factor=1.0):
    return torch.autograd.grad(factor * loss, leaves)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("supervised", ["all", "some", "none"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("fn", FUNCTIONS.values(), ids=FUNCTIONS)
def test_equals_torch_with_full_logits(fn, size, supervised, dtype):
    leaves, labels, weights = draw(*size, dtype, supervised)
    before = [x.detach().clone() for x in (*leaves, labels, weights)]
    actual, expected = fn(*leaves, labels, weights), full_logits(*leaves, labels, weights)
    tol = TOLERANCE[dtype]
    assert actual.shape == ()
    torch.testing.assert_close(actual, expected, atol=tol, rtol=tol)
    grads = [gradients(y, leaves, factor=-1.7) for y in (actual, expected)]
    torch.testing.assert_close(*grads, atol=tol, rtol=10 * tol)
    assert all(torch.equal(a, b) for a, b in zip((*leaves, labels, weights), before, strict=True))


def test_gradcheck():
    leaves, labels, weights = draw(7, 5, 3)

    def operator(x, head):  # the eager entry refuses the second backward that gradcheck makes
        return torch.ops.mmfn.linear_cross_entropy(x, head, labels, weights, 2, True, True)[0]

    assert torch.autograd.gradcheck(operator, leaves)
    ys = operator(*leaves), linear_cross_entropy(*leaves, labels, weights, chunk=2)
    assert torch.equal(*ys)
    torch.testing.assert_close(*(gradients(y, leaves, factor=0.3) for y in ys), atol=1e-15, rtol=1e-15)


def test_nothing_supervised_gives_zero_and_zero_gradients():
    leaves, labels, weights = draw(6, 5, 3)
    for y in (
        linear_cross_entropy(*leaves, torch.full_like(labels, IGNORE), weights),
        linear_cross_entropy(*leaves, labels.clamp(min=0), torch.zeros_like(weights)),
    ):
        assert y.item() == 0
        assert all(not grad.any() for grad in gradients(y, leaves))


def test_a_weight_of_zero_hides_even_a_row_that_is_not_finite():
    leaves, labels, weights = draw(6, 5, 3)
    x = leaves[0].detach().clone()
    x[1], weights[1] = torch.inf, 0
    x.requires_grad_()
    y = linear_cross_entropy(x, leaves[1], labels, weights)
    assert all(grad.isfinite().all() for grad in (y, *gradients(y, (x, leaves[1]))))


def test_logits_far_apart_neither_overflow_nor_lose_the_loss():
    leaves, labels, weights = draw(12, 9, 4, torch.float32, scale=300.0)  # label probabilities below 1e-38
    actual, expected = linear_cross_entropy(*leaves, labels, weights), full_logits(*leaves, labels, weights)
    assert expected > 1e3
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients(actual, leaves), gradients(expected, leaves), rtol=1e-4, atol=1e-4)


def test_tied_embedding_gets_both_gradients():
    embed = torch.randn(11, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens = torch.tensor([1, 5, 5, 9, 2])
    labels, weights = tokens.roll(-1), torch.ones(5, dtype=torch.float64)
    ys = [fn(embed[tokens], embed, labels, weights) for fn in (linear_cross_entropy, full_logits)]
    torch.testing.assert_close(*(torch.autograd.grad(y, embed)[0] for y in ys))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk", [None, 5])
def test_narrow_dtypes_are_close_to_float64_and_the_head_gradient_is_summed_wide(dtype, chunk):
    leaves, labels, weights = draw(40, 23, 8, dtype)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    actual = linear_cross_entropy(*leaves, labels, weights, chunk=chunk)
    expected = full_logits(*wide, labels, weights.double())
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=5e-3, atol=0)
    for a, b in zip(gradients(actual, leaves), gradients(expected, wide), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= 0.02 * b.norm()


def test_head_gradient_of_many_chunks_keeps_small_shares():
    """Summed in bfloat16, 512 equal shares would stop growing at 256."""
    T = 512
    x, head = torch.ones(T, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    y = linear_cross_entropy(x, head, torch.zeros(T, dtype=torch.int64), torch.full((T,), 2.0), chunk=1)
    assert torch.autograd.grad(y, head)[0].flatten().tolist() == [-T, T]


class Shapes(TorchDispatchMode):
    """The largest number of values of any tensor an operator returns, and the matrix products run."""

    is_eager = True

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return out


@pytest.mark.parametrize(
    ("x_needs", "head_needs", "products"), [(True, True, 3), (True, False, 2), (False, True, 2), (False, False, 1)]
)
def test_only_the_gradients_asked_for_are_computed(x_needs, head_needs, products):
    (x, head), labels, weights = draw(6, 20, 3, supervised="all")
    x.requires_grad_(x_needs)
    head.requires_grad_(head_needs)
    with Shapes() as seen:
        y = linear_cross_entropy(x, head, labels, weights, chunk=2)
    assert seen.products == 3 * products
    assert y.requires_grad == (x_needs or head_needs)
    needed = [leaf for leaf in (x, head) if leaf.requires_grad]
    if needed:
        expected = gradients(full_logits(x, head, labels, weights), needed)
        torch.testing.assert_close(gradients(y, needed), expected)


def test_without_grad_only_the_value():
    leaves, labels, weights = draw(6, 20, 3, supervised="all")
    with Shapes() as seen, torch.no_grad():
        y = linear_cross_entropy(*leaves, labels, weights)
    assert seen.products == 1
    torch.testing.assert_close(y, full_logits(*leaves, labels, weights).detach())


def test_no_tensor_is_larger_than_a_chunk_or_the_head():
    leaves, labels, weights = draw(64, 40, 3)
    with Shapes() as seen:
        gradients(linear_cross_entropy(*leaves, labels, weights, chunk=4), leaves, factor=2.0)
    assert seen.largest <= max(4 * 40, 64 * 3, 40 * 3)


def test_a_second_backward_is_refused_rather_than_scaled_twice():
    leaves, labels, weights = draw(6, 5, 3)
    y = 2 * linear_cross_entropy(*leaves, labels, weights)
    torch.autograd.grad(y, leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, leaves)


def test_any_chunk_gives_the_same():
    leaves, labels, weights = draw(37, 50, 12)
    ys = [linear_cross_entropy(*leaves, labels, weights, chunk=chunk) for chunk in (1, 2, 7, 37, 1000)]
    grads = [gradients(y, leaves) for y in ys]
    for y, grad in zip(ys, grads, strict=True):
        torch.testing.assert_close(y, ys[0], atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(grad, grads[0], atol=1e-12, rtol=1e-12)


@pytest.mark.filterwarnings(QUIET_INDUCTOR)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager_and_other_labels_do_not_recompile(backend):
    torch._dynamo.reset()
    run = torch.compile(
        lambda *args: 3 * linear_cross_entropy(*args, chunk=8), fullgraph=True, dynamic=False, backend=backend
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for supervised in ("some", "all", "none"):
            leaves, labels, weights = draw(37, 50, 12, torch.float32, supervised)
            actual, expected = run(*leaves, labels, weights), 3 * linear_cross_entropy(*leaves, labels, weights)
            torch.testing.assert_close(actual, expected)
            torch.testing.assert_close(gradients(actual, leaves), gradients(expected, leaves))


@pytest.mark.parametrize("frozen", ["x", "head", "both"])
def test_compiled_with_frozen_inputs(frozen):
    (x, head), labels, weights = draw(9, 7, 4)
    x.requires_grad_(frozen == "head")
    head.requires_grad_(frozen == "x")
    run = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    actual, expected = run(x, head, labels, weights), full_logits(x, head, labels, weights)
    torch.testing.assert_close(actual, expected)
    if frozen == "both":
        assert not actual.requires_grad
    else:
        leaf = head if frozen == "x" else x
        torch.testing.assert_close(gradients(actual, leaf), gradients(expected, leaf))


def test_the_operator_passes_torchs_own_checks():
    (x, head), labels, weights = draw(9, 7, 4)
    args = (x.detach(), head.detach(), labels, weights, 4)
    for needs in ((True, True), (True, False), (False, False)):
        torch.library.opcheck(
            torch.ops.mmfn.linear_cross_entropy.default, (*args, *needs), test_utils=("test_schema", "test_faketensor")
        )
        _, dx, dw = torch.ops.mmfn.linear_cross_entropy(*args, *needs)
        assert [g.numel() > 0 for g in (dx, dw)] == list(needs)


def test_chunk_rows():
    assert chunk_rows(151_936) == 256
    assert chunk_rows(16_384) == chunk_rows(2) == 512
    assert chunk_rows(CHUNK_BYTES) == 1
    for vocabulary in (97, 81_920, 81_921, 200_064, 10**7):
        rows = chunk_rows(vocabulary)
        assert rows == 512 or rows * vocabulary * 4 <= CHUNK_BYTES < 2 * rows * vocabulary * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, y, p: (x[0], w, y, p), r"must be \[T, D\] and \[V, D\]"),
        (lambda x, w, y, p: (x, w[:, :2], y, p), "with one D"),
        (lambda x, w, y, p: (x.float(), w, y, p), "one floating dtype"),
        (lambda x, w, y, p: (x, w, y[1:], p), r"labels_T has shape \(5,\) but x_TD has 6 rows"),
        (lambda x, w, y, p: (x, w, y, p[None]), r"weights_T has shape \(1, 6\)"),
        (lambda x, w, y, p: (x, w, y.int(), p), "must be int64"),
        (lambda x, w, y, p: (x, w, y, p.long()), "floating-point and a constant"),
        (lambda x, w, y, p: (x, w, y, p.requires_grad_()), "floating-point and a constant"),
        (lambda x, w, y, p: (x, w, y + 9, p), "the head has 5 rows"),
        (lambda x, w, y, p: (x, w, y.clamp(max=-1), p), "the head has 5 rows"),
    ],
)
def test_bad_input_is_refused(change, message):
    leaves, labels, weights = draw(6, 5, 3, supervised="all")
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*change(*leaves, labels, weights))


def test_a_chunk_of_no_rows_is_refused():
    leaves, labels, weights = draw(6, 5, 3)
    for chunk in (0, -1):
        with pytest.raises(ValueError, match="at least 1 row"):
            linear_cross_entropy(*leaves, labels, weights, chunk=chunk)
