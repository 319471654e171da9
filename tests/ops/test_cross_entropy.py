"""linear_cross_entropy against torch's cross entropy over full logits: values, gradients, what it does not compute."""

from functools import partial

import pytest
import torch

from mmfn.batch import IGNORE
from mmfn.ops import logit_chunks, vocabulary_attention
from mmfn.ops.cross_entropy import (
    CHUNK_BYTES,
    chunk_rows,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    power_of_two,
)
from tests.ops.head_cases import ALL, FUNCTIONS, SIZES, Shapes, draw, full_logits, gradients, loss_of, traced

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
SETTINGS = {
    "plain": {},
    "z-loss": {"z_loss": 0.3},
    "smoothing": {"label_smoothing": 0.1},
    "both": {"z_loss": 0.02, "label_smoothing": 0.25},
    "uniform": {"label_smoothing": 1.0},
}
QUIET_INDUCTOR = "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"  # torch's own, on import


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("supervised", ["all", "some", "none"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("fn", ALL.values(), ids=ALL)
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


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("size", [(37, 50, 12), (1, 7, 3), (9, 1, 4), (0, 5, 3)], ids=str)
@pytest.mark.parametrize("fn", FUNCTIONS.values(), ids=FUNCTIONS)
def test_bias_z_loss_and_label_smoothing_equal_torch(fn, size, setting):
    leaves, labels, weights = draw(*size)
    bias = torch.randn(size[1], dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    for extra in ((), (bias,)):
        settings = {**SETTINGS[setting], "bias_V": bias if extra else None}
        ys = [f(*leaves, labels, weights, **settings) for f in (fn, full_logits)]
        torch.testing.assert_close(*ys, atol=1e-12, rtol=1e-12)
        grads = [gradients(y, (*leaves, *extra), factor=-1.7) for y in ys]
        torch.testing.assert_close(*grads, atol=1e-12, rtol=1e-11)


STRIDED = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "one row": lambda x: x[:1].expand_as(x),
    "one column": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("change", STRIDED.values(), ids=STRIDED)
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("method", ["logits", "attention"])
def test_inputs_may_lie_in_memory_as_they_like(method, place, change):
    leaves, labels, weights = draw(40, 70, 32)
    leaves = [change(leaf.detach()) if i == place else leaf.detach() for i, leaf in enumerate(leaves)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    ys = [f(*leaves, labels, weights) for f in (partial(loss_of, method=method), full_logits)]
    torch.testing.assert_close(*ys, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(*(gradients(y, leaves) for y in ys), atol=1e-12, rtol=1e-11)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("fn", [linear_cross_entropy, linear_cross_entropy_reference])
def test_beside_the_loss_comes_the_plain_cross_entropy(fn, setting):
    leaves, labels, weights = draw(37, 50, 12)
    loss, ce = fn(*leaves, labels, weights, **SETTINGS[setting])
    assert loss.requires_grad
    assert not ce.requires_grad
    torch.testing.assert_close(ce, full_logits(*leaves, labels, weights).detach(), atol=1e-12, rtol=1e-12)
    assert torch.equal(ce, loss.detach()) == (setting == "plain")


@pytest.mark.parametrize("method", ["logits", "attention"])
@pytest.mark.parametrize("lse", [-0.5, -0.5 + 1e-9, -2.0])
def test_z_loss_is_exact_where_its_gradient_vanishes(lse, method):
    """The factor 1 + 2 z lse of the softmax is 0, nearly 0 and negative for z = 1."""
    x, labels, weights = torch.ones(2, 1, dtype=torch.float64), torch.tensor([0, 2]), torch.ones(2, dtype=torch.float64)
    head = torch.tensor([[0.0], [1.0], [0.5]], dtype=torch.float64)
    head = (head - head.logsumexp(0) + lse).requires_grad_()
    ys = [f(x, head, labels, weights, z_loss=1.0) for f in (partial(loss_of, method=method), full_logits)]
    torch.testing.assert_close(*ys, atol=1e-14, rtol=0)
    torch.testing.assert_close(*(gradients(y, head) for y in ys), atol=1e-14, rtol=0)


@pytest.mark.parametrize("setting", SETTINGS)
def test_gradcheck(setting):
    leaves, labels, weights = draw(7, 5, 3)
    bias = torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_()

    def operator(fn, x, head, bias):
        return fn(x, head, labels, weights, bias_V=bias, chunk=2, **SETTINGS[setting])

    assert torch.autograd.gradcheck(partial(operator, traced), (*leaves, bias))
    if not SETTINGS[setting].get("label_smoothing"):
        attending = partial(traced, labels=labels, weights=weights, method="attention", **SETTINGS[setting])
        assert torch.autograd.gradcheck(attending, leaves)
    ys = [operator(fn, *leaves, bias) for fn in (traced, loss_of)]
    assert torch.equal(*ys)
    torch.testing.assert_close(*(gradients(y, (*leaves, bias), factor=0.3) for y in ys), atol=1e-15, rtol=1e-15)


@pytest.mark.parametrize("method", ["logits", "attention"])
def test_nothing_supervised_gives_zero_and_zero_gradients(method):
    leaves, labels, weights = draw(6, 5, 3)
    for y in (
        loss_of(*leaves, torch.full_like(labels, IGNORE), weights, method=method),
        loss_of(*leaves, labels.clamp(min=0), torch.zeros_like(weights), method=method),
    ):
        assert y.item() == 0
        assert all(not grad.any() for grad in gradients(y, leaves))


def test_a_weight_of_zero_hides_even_a_row_that_is_not_finite():
    leaves, labels, weights = draw(6, 5, 3)
    x = leaves[0].detach().clone()
    x[1], weights[1] = torch.inf, 0
    x.requires_grad_()
    y = loss_of(x, leaves[1], labels, weights)
    assert all(grad.isfinite().all() for grad in (y, *gradients(y, (x, leaves[1]))))


@pytest.mark.parametrize("method", ["logits", "attention"])
def test_logits_far_apart_neither_overflow_nor_lose_the_loss(method):
    leaves, labels, weights = draw(12, 9, 4, torch.float32, scale=300.0)  # label probabilities below 1e-38
    actual, expected = loss_of(*leaves, labels, weights, method=method), full_logits(*leaves, labels, weights)
    assert expected > 1e3
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    rtol = 1e-4 if method == "logits" else 5e-4  # a bias as large as the logits is rounded to 1e-4 and exponentiated
    torch.testing.assert_close(gradients(actual, leaves), gradients(expected, leaves), rtol=rtol, atol=1e-4)


def test_tied_embedding_gets_both_gradients():
    embed = torch.randn(11, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens = torch.tensor([1, 5, 5, 9, 2])
    labels, weights = tokens.roll(-1), torch.ones(5, dtype=torch.float64)
    ys = [fn(embed[tokens], embed, labels, weights) for fn in (loss_of, full_logits)]
    torch.testing.assert_close(*(torch.autograd.grad(y, embed)[0] for y in ys))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("method", ["logits", "attention"])
def test_narrow_dtypes_are_close_to_float64_and_the_head_gradient_is_summed_wide(dtype, chunk, method):
    leaves, labels, weights = draw(40, 23, 8, dtype)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    actual = loss_of(*leaves, labels, weights, chunk=chunk, method=method)
    expected = full_logits(*wide, labels, weights.double())
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)
    for a, b in zip(gradients(actual, leaves), gradients(expected, wide), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= 0.003 * b.norm()


@pytest.mark.parametrize("num_vocabulary", [3, 64])
@pytest.mark.parametrize("fn", [loss_of, traced])
def test_input_gradient_with_smoothing_is_rounded_once(fn, num_vocabulary):
    """Rounded before the share of smoothing is added and again behind it, the error is two to three times as large."""
    leaves, labels, weights = draw(200, num_vocabulary, 32, torch.bfloat16, scale=0.3)
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    exact_loss = full_logits(*exact_leaves, labels, weights.double(), label_smoothing=1.0)
    (exact, _), (found, _) = (
        gradients(exact_loss, exact_leaves),
        gradients(fn(*leaves, labels, weights, label_smoothing=1.0, chunk=64), leaves),
    )
    assert (found.double() - exact).norm() <= 1.1 * (exact.bfloat16().double() - exact).norm()


@pytest.mark.parametrize("method", ["logits", "attention"])
def test_head_gradient_of_many_chunks_keeps_small_shares(method, monkeypatch):
    """Summed in bfloat16, 512 equal shares would stop growing at 256."""
    monkeypatch.setattr(vocabulary_attention, "GROUP", 1)
    T = 512
    x, head = torch.ones(T, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    y = loss_of(x, head, torch.zeros(T, dtype=torch.int64), torch.full((T,), 2.0), chunk=1, method=method)
    # the kernel's exp is 5e-5 short, which T ones add up
    assert torch.autograd.grad(y, head)[0].flatten().tolist() == [-T, T]


CHUNKS = (1, 2, 8, 32, 128)
NARROW = [("cpu", "attention"), ("cpu", "logits"), pytest.param("cuda", "logits", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def narrow_head():
    """bfloat16 inputs, and the relative error of a head gradient against float64."""
    T, V, D = 1024, 512, 64
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, D, generator=generator).bfloat16()
    head = (torch.randn(V, D, generator=generator) * D**-0.5).bfloat16().requires_grad_()
    labels, weights = torch.randint(V, (T,), generator=generator), torch.rand(T, generator=generator) / T
    wide = head.detach().double().requires_grad_()
    (exact,) = gradients(full_logits(x.double(), wide, labels, weights.double()), (wide,))

    def error(grad):
        return ((grad.cpu().double() - exact).norm() / exact.norm()).item()

    return (x, head, labels, weights), exact, error


def test_a_wide_factor_is_a_sum_of_two_narrow_ones():
    """A GPU multiplies narrow factors alone. The first has 8 bits of a float32, both together twice as many."""
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    high, low = logit_chunks._narrowed(x, torch.bfloat16)
    assert {part.dtype for part in (high, low)} == {torch.bfloat16}
    torch.testing.assert_close(high.float() + low.float(), x, rtol=2**-17, atol=0)
    assert (high.float() - x).abs().max() > 2**-11 * x.abs().max()
    narrow = x.bfloat16()
    assert [part is narrow for part in logit_chunks._narrowed(narrow, torch.bfloat16)] == [True]


@pytest.mark.parametrize(("device", "method"), NARROW)
def test_head_gradient_error_in_bfloat16_is_that_of_one_rounding_for_any_number_of_chunks(narrow_head, device, method):
    """With a sum in bfloat16 it grows."""
    (x, head, labels, weights), exact, error = narrow_head
    x, head, labels, weights = (leaf.detach().to(device) for leaf in (x, head, labels, weights))
    head.requires_grad_()
    T = x.shape[0]
    run = partial(loss_of, method=method)
    found = [error(*gradients(run(x, head, labels, weights, chunk=T // n), (head,))) for n in CHUNKS]
    assert max(found) <= 1.2 * error(exact.bfloat16())
    assert max(found) <= 1.01 * min(found)
    narrow_sum = torch.zeros_like(head)
    for part in torch.arange(T).chunk(CHUNKS[-1]):
        narrow_sum += gradients(run(x[part], head, labels[part], weights[part]), (head,))[0]
    assert error(narrow_sum) > 3 * max(found)


@pytest.mark.parametrize(
    ("x_needs", "head_needs", "products"), [(True, True, 3), (True, False, 2), (False, True, 2), (False, False, 1)]
)
def test_only_the_gradients_asked_for_are_computed(x_needs, head_needs, products):
    (x, head), labels, weights = draw(6, 20, 3, supervised="all")
    x.requires_grad_(x_needs)
    head.requires_grad_(head_needs)
    with Shapes() as seen:
        y = loss_of(x, head, labels, weights, chunk=2)
    assert seen.products == 3 * products
    assert y.requires_grad == (x_needs or head_needs)
    needed = [leaf for leaf in (x, head) if leaf.requires_grad]
    if needed:
        expected = gradients(full_logits(x, head, labels, weights), needed)
        torch.testing.assert_close(gradients(y, needed), expected)


def test_without_grad_only_the_value():
    leaves, labels, weights = draw(6, 20, 3, supervised="all")
    with Shapes() as seen, torch.no_grad():
        y = loss_of(*leaves, labels, weights)
    assert seen.products == 1
    torch.testing.assert_close(y, full_logits(*leaves, labels, weights).detach())


def test_no_tensor_is_larger_than_a_chunk_or_the_head():
    leaves, labels, weights = draw(64, 40, 3)
    with Shapes() as seen:
        gradients(loss_of(*leaves, labels, weights, chunk=4), leaves, factor=2.0)
    assert seen.largest <= max(4 * 40, 64 * 3, 40 * 3)


def test_a_second_backward_is_refused_rather_than_scaled_twice():
    leaves, labels, weights = draw(6, 5, 3)
    y = 2 * loss_of(*leaves, labels, weights)
    torch.autograd.grad(y, leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, leaves)


def test_any_chunk_gives_the_same():
    leaves, labels, weights = draw(37, 50, 12)
    ys = [loss_of(*leaves, labels, weights, chunk=chunk) for chunk in (1, 2, 7, 37, 1000)]
    grads = [gradients(y, leaves) for y in ys]
    for y, grad in zip(ys, grads, strict=True):
        torch.testing.assert_close(y, ys[0], atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(grad, grads[0], atol=1e-12, rtol=1e-12)


@pytest.mark.filterwarnings(QUIET_INDUCTOR)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager_and_other_labels_do_not_recompile(backend):
    torch._dynamo.reset()
    run = torch.compile(lambda *args: 3 * loss_of(*args, chunk=8), fullgraph=True, dynamic=False, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for supervised in ("some", "all", "none"):
            leaves, labels, weights = draw(37, 50, 12, torch.float32, supervised)
            actual, expected = run(*leaves, labels, weights), 3 * loss_of(*leaves, labels, weights)
            torch.testing.assert_close(actual, expected)
            torch.testing.assert_close(gradients(actual, leaves), gradients(expected, leaves))


@pytest.mark.parametrize("frozen", ["x", "head", "both"])
def test_compiled_with_frozen_inputs(frozen):
    (x, head), labels, weights = draw(9, 7, 4)
    x.requires_grad_(frozen == "head")
    head.requires_grad_(frozen == "x")
    run = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    actual, expected = run(x, head, labels, weights), full_logits(x, head, labels, weights)
    torch.testing.assert_close(actual, expected)
    if frozen == "both":
        assert not actual.requires_grad
    else:
        leaf = head if frozen == "x" else x
        torch.testing.assert_close(gradients(actual, leaf), gradients(expected, leaf))


def test_the_operator_passes_torchs_own_checks():
    (x, head), labels, weights = draw(9, 7, 4)
    for method, smoothing, bias, *needs in (
        ("logits", 0.2, None, True, True, False),
        ("logits", 0.2, None, True, False, False),
        ("logits", 0.2, head.detach()[:, 0], True, False, True),
        ("attention", 0.0, None, True, True, False),
        ("attention", 0.0, None, False, True, False),
    ):
        args = (x.detach(), head.detach(), bias, labels, weights, None, 4, 0.1, smoothing, method, needs)
        operator = torch.ops.mmfn.linear_cross_entropy.default
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))
        _, _, *grads = operator(*args)
        assert [g.numel() > 0 for g in grads] == needs


@pytest.mark.parametrize("labels", [[3, IGNORE, 0, 2, IGNORE], [IGNORE] * 3, [1, 2], []], ids=str)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_number_of_labels_that_is_known_changes_nothing(labels, is_compiled):
    labels_T, weights_T = (
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor([1.0, 2, 0, 3, 4][: len(labels)]).double(),
    )
    x, head = torch.randn(len(labels), 6).double().requires_grad_(), torch.randn(7, 6).double().requires_grad_()
    num = ((labels_T != IGNORE) & (weights_T != 0)).sum()
    fn = torch.compile(linear_cross_entropy, backend="aot_eager") if is_compiled else linear_cross_entropy
    found, expected = (fn(x, head, labels_T, weights_T, num_labels=n)[0] for n in (num, None))
    assert torch.equal(found, expected)
    for a, b in zip(*(torch.autograd.grad(loss, (x, head)) for loss in (found, expected)), strict=True):
        assert torch.equal(a, b)


def test_another_number_of_labels_is_refused():
    (x, head), labels, weights = draw(9, 7, 4)
    for num in (labels.numel() + 1, 0):
        with pytest.raises(ValueError, match=f"num_labels is {num} but another number of tokens has a label and a w"):
            linear_cross_entropy(x, head, labels, weights, num_labels=torch.tensor(num))


@pytest.mark.parametrize(("total", "rows"), [(1, 1), (2, 2), (3, 2), (4095, 2048), (4096, 4096)])
def test_power_of_two(total, rows):
    assert power_of_two(total) == rows


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
        loss_of(*change(*leaves, labels, weights))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk": 0}, "at least 1 row"),
        ({"chunk": -1}, "at least 1 row"),
        ({"z_loss": -1e-4}, "z_loss is -0.0001 but must be a finite number"),
        ({"z_loss": float("nan")}, "z_loss is nan"),
        ({"label_smoothing": 1.5}, r"label_smoothing is 1.5 but must lie in \[0, 1\]"),
        ({"bias_V": torch.zeros(4, dtype=torch.float64)}, r"bias_V is torch.float64\[4\] but the head"),
        ({"bias_V": torch.zeros(5)}, "in its dtype"),
        ({"method": "fused"}, "method is 'fused' but must be one of 'logits', 'attention'"),
        ({"method": "attention", "label_smoothing": 0.1}, "is for CPU tensors without bias or label smoothing"),
        ({"method": "attention", "bias_V": torch.zeros(5, dtype=torch.float64)}, "a bias is given"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    leaves, labels, weights = draw(6, 5, 3)
    with pytest.raises(ValueError, match=message):
        loss_of(*leaves, labels, weights, **settings)
