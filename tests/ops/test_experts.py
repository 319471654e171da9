"""Experts against one feed-forward layer per expert of torch's own: values, gradients, padding rows, graphs."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mmfn.ops import experts as module
from mmfn.ops.experts import experts, experts_reference, grouped_linear

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}  # of the largest value
COUNTS = {  # rows of each expert, rows of padding behind them
    "all used": ([5, 3, 1, 7], 0),
    "padding behind": ([4, 2, 6], 5),
    "some without rows": ([0, 3, 0, 0, 6, 0], 2),
    "one expert": ([9], 3),
    "padding alone": ([0, 0], 4),
    "no row": ([0, 0, 0], 0),
}
WIDTHS = [(9, 5), (8, 16), (1, 1)]  # D, F


class Operators(TorchDispatchMode):
    """Counts operators of this package."""

    def __init__(self):
        super().__init__()
        self.ran = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran.update([func.name()] if func.namespace == "mmfn" else [])
        return func(*args, **(kwargs or {}))


def draw(counts, tail, D, F_, dtype=torch.float64, seed=0):
    """x, counts, weights as leaves and the gradient of y; padding rows hold no number at all."""
    g = torch.Generator().manual_seed(seed)
    R, E = sum(counts) + tail, len(counts)
    x, gate_up, down, dy = (
        torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
        for shape in ((R, D), (E, 2 * F_, D), (E, D, F_), (R, D))
    )
    x[sum(counts) :] = torch.nan
    weights = {"gate_up": gate_up.requires_grad_(), "down": down.requires_grad_()}
    return x.requires_grad_(), torch.tensor(counts), weights, dy


def by_hand(x, counts, weights):
    """Every row on its own, with the weights of the expert it belongs to, in float64."""
    owner = torch.repeat_interleave(counts).tolist()
    rows = []
    for row, e in zip(x.double(), owner, strict=False):
        gate, up = F.linear(row, weights["gate_up"][e].double()).split(weights["down"].shape[2])
        rows.append(F.linear(F.silu(gate) * up, weights["down"][e].double()))
    return torch.stack([*rows, *(torch.zeros(x.shape[1], dtype=torch.float64) for _ in range(len(x) - len(owner)))])


def assert_near(got, want, tol):
    scale = max(1e-9, want.abs().max().item()) if want.numel() else 1.0
    torch.testing.assert_close(got.double() / scale, want.double() / scale, atol=tol, rtol=0)


def gradients(y, leaves, dy):
    return torch.autograd.grad(y, leaves, dy, materialize_grads=True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("case", COUNTS)
def test_equals_one_layer_per_expert(case, widths, dtype, monkeypatch):
    x, counts, weights, dy = draw(*COUNTS[case], *widths, dtype)
    leaves = [x, weights["gate_up"], weights["down"]]
    tol = TOLERANCE[dtype]
    expected = by_hand(x, counts, weights) if x.shape[0] else torch.zeros(0, widths[0], dtype=torch.float64)
    expected_grads = gradients(expected, leaves, dy.double()) if sum(counts) else [torch.zeros_like(v) for v in leaves]
    kinds = [experts, experts_reference]
    if dtype == torch.bfloat16 and all(width % 8 == 0 for width in widths):
        kinds.append("kernel")
    for kind in kinds:
        if kind == "kernel":
            monkeypatch.setattr(module, "_has_kernel", lambda *_: True)
        y = experts(x, counts, weights) if kind == "kernel" else kind(x, counts, weights)
        assert y.dtype == dtype
        assert_near(y, expected, tol)
        assert not y[sum(counts) :].any()
        for got, want in zip(gradients(y, leaves, dy), expected_grads, strict=True):
            assert_near(got, want, tol)


@pytest.mark.parametrize("kernel", [False, True], ids=["loop", "kernel"])
def test_experts_without_rows_and_padding_have_exactly_no_gradient(kernel, monkeypatch):
    monkeypatch.setattr(module, "_has_kernel", lambda *_: kernel)
    x, counts, weights, dy = draw([0, 3, 0, 5], 4, 8, 16, torch.bfloat16)
    dx, dgate_up, ddown = gradients(experts(x, counts, weights), [x, *weights.values()], dy)
    assert not dx[8:].any()
    assert dx[:8].any()
    for grad in (dgate_up, ddown):
        assert [bool(part.any()) for part in grad] == [False, True, False, True]


def test_the_kernel_is_used_where_it_serves():
    class Cuda:
        device = torch.device("cuda")

        def __init__(self, width, dtype):
            self.shape, self.dtype = (3, width), dtype

    assert module._has_kernel(Cuda(8, torch.bfloat16), Cuda(24, torch.bfloat16))
    assert not module._has_kernel(Cuda(8, torch.bfloat16), Cuda(12, torch.bfloat16))
    assert not module._has_kernel(Cuda(8, torch.float32), Cuda(8, torch.float32))
    assert not module._has_kernel(torch.zeros(3, 8).bfloat16(), torch.zeros(3, 8).bfloat16())


def test_gradcheck():
    x, counts, weights, _ = draw([2, 0, 3], 0, 3, 2)
    leaves = (x, weights["gate_up"], weights["down"])
    assert torch.autograd.gradcheck(lambda x, a, b: experts(x, counts, {"gate_up": a, "down": b}), leaves)


def test_gradients_that_are_not_needed_are_not_computed():
    x, counts, weights, dy = draw([2, 3], 0, 4, 3)
    frozen = {name: w.detach() for name, w in weights.items()}
    with Operators() as rows_alone:
        gradients(experts(x, counts, frozen), [x], dy)
    assert rows_alone.ran == {"mmfn::grouped_linear": 4}  # two products, and the gradient of each by its rows
    with Operators() as weights_alone:
        gradients(experts(x.detach(), counts, weights), list(weights.values()), dy)
    assert weights_alone.ran == {"mmfn::grouped_linear": 3, "mmfn::grouped_linear_grad": 2}


def test_inputs_are_unchanged_and_two_calls_are_bitwise_equal():
    x, counts, weights, dy = draw([5, 0, 6], 2, 8, 4, torch.float32)
    leaves = [x, *weights.values()]
    before = [v.detach().clone() for v in (*leaves, counts, dy)]
    ys = [experts(x, counts, weights) for _ in range(2)]
    grads = [gradients(y, leaves, dy) for y in ys]
    assert torch.equal(*ys)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    after = [v.detach() for v in (*leaves, counts, dy)]
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True))


def test_strided_rows_weights_and_gradients():
    """Transposed weights (as a view of a stored layout) and expanded gradients, which torch's own kernel refuses."""
    x, counts, weights, _ = draw([2, 4], 0, 6, 5)
    turned = {n: w.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for n, w in weights.items()}
    strided = x.detach().t().contiguous().t().requires_grad_()
    want, got = experts(x, counts, weights), experts(strided, counts, turned)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)
    dy = torch.ones((), dtype=torch.float64).expand(want.shape)
    for a, b in zip(
        gradients(got, [strided, *turned.values()], dy), gradients(want, [x, *weights.values()], dy), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_one_graph_for_any_counts_and_under_remat():
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    torch._dynamo.reset()
    run = torch.compile(lambda x, c, w: experts(x, c, w), backend=backend, fullgraph=True, dynamic=False)
    for counts, tail in (([5, 3, 1], 0), ([0, 2, 4], 3), ([9, 0, 0], 0)):
        x, counts, weights, dy = draw(counts, tail, 8, 4)
        leaves = [x, *weights.values()]
        want, got = experts(x, counts, weights), run(x, counts, weights)
        again = checkpoint(run, x, counts, weights, use_reentrant=False)
        assert torch.equal(got, want)
        wanted = gradients(want, leaves, dy)
        for y in (got, again):
            for a, b in zip(gradients(y, leaves, dy), wanted, strict=True):
                assert torch.equal(a, b)
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_operators_are_registered_well():
    x, counts, weights, _ = draw([2, 0, 3], 1, 4, 3)
    x = x.detach().nan_to_num().requires_grad_()
    torch.library.opcheck(torch.ops.mmfn.grouped_linear.default, (x, weights["gate_up"], counts))
    dy = torch.randn(6, 6, dtype=torch.float64)
    torch.library.opcheck(torch.ops.mmfn.grouped_linear_grad.default, (dy, x.detach(), counts))


def test_fake_and_meta_tensors_have_shapes_only():
    with FakeTensorMode():
        x, counts = torch.randn(7, 8, requires_grad=True), torch.zeros(3, dtype=torch.int64)
        weights = {"gate_up": torch.randn(3, 10, 8, requires_grad=True), "down": torch.randn(3, 8, 5)}
        y = experts(x, counts, weights)
        dx, dw = torch.autograd.grad(y.sum(), [x, weights["gate_up"]])
        assert (y.shape, dx.shape, dw.shape) == ((7, 8), (7, 8), (3, 10, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_RD": torch.zeros(4, 3)}, r"x_RD \(4, 3\) and weight_EFD \(2, 5, 6\) must be \[R, D\] and \[E, F, D\]"),
        ({"x_RD": torch.zeros(4, 6, dtype=torch.float64)}, "x_RD is torch.float64 and weight_EFD torch.float32; cast"),
        ({"counts_E": torch.tensor([4])}, r"counts_E is torch.int64\[1\] but must be int64\[2\]: one count per expert"),
        ({"counts_E": torch.tensor([2, 2]).int()}, r"counts_E is torch.int32\[2\] but must be int64\[2\]"),
        ({"counts_E": torch.tensor([2, 3])}, "counts_E add up to 5 but there are 4 rows"),
        ({"counts_E": torch.tensor([-1, 3])}, "counts_E add up to 2 but there are 4 rows"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {"x_RD": torch.zeros(4, 6), "weight_EFD": torch.zeros(2, 5, 6), "counts_E": torch.tensor([1, 3])}
    with pytest.raises(ValueError, match=message):
        grouped_linear(**(given | change))
