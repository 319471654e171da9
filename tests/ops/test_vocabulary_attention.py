"""Cross entropy as attention over the vocabulary: blocks, rounding, when it is the default, what it holds."""

import math
from functools import partial

import pytest
import torch

from mmfn import ops
from mmfn.ops import cross_entropy, vocabulary_attention
from tests.ops.head_cases import ATTENDING, SIZES, Shapes, draw, full_logits, gradients, loss_of


@pytest.mark.parametrize(("queries", "keys", "group"), [(1, 1, 1), (5, 49, 36), (49, 5, 3)])
def test_attention_in_blocks_equals_torch(queries, keys, group, monkeypatch):
    monkeypatch.setattr(vocabulary_attention, "QUERIES", queries)
    monkeypatch.setattr(vocabulary_attention, "KEYS", keys)
    monkeypatch.setattr(vocabulary_attention, "GROUP", group)
    leaves, labels, weights = draw(37, 50, 12)
    ys = [f(*leaves, labels, weights) for f in (ATTENDING["attention"], full_logits)]
    torch.testing.assert_close(*ys, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(*(gradients(y, leaves) for y in ys), atol=1e-12, rtol=1e-11)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("fn", ATTENDING.values(), ids=ATTENDING)
def test_attention_with_z_loss_and_weights_of_either_sign_equals_torch(fn, size):
    leaves, labels, weights = draw(*size)
    weights = weights - 0.5
    ys = [f(*leaves, labels, weights, z_loss=0.3) for f in (fn, full_logits)]
    torch.testing.assert_close(*ys, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(*(gradients(y, leaves) for y in ys), atol=1e-12, rtol=1e-11)


@pytest.mark.parametrize("method", ["attention", "logits"])
@pytest.mark.parametrize(("lean", "mean_loss"), [(0, 6.5), (6, 1.3), (12, 0.1)])
def test_gradients_in_bfloat16_are_rounded_once_also_where_labels_are_predicted_well(method, lean, mean_loss):
    """Rows of x lean to their label. Out of a rounded sum that holds it, and out of rounded logits, little would be
    left of a gradient that the label has nearly to itself."""
    (x, head), labels, weights = draw(700, 400, 64, supervised="all")
    head = (head.detach() / 8).bfloat16()
    x = (x.detach() + lean * head.double()[labels]).bfloat16()
    exact_leaves = [leaf.double().requires_grad_() for leaf in (x, head)]
    loss = full_logits(*exact_leaves, labels, weights)
    assert (loss / weights.sum()).item() == pytest.approx(mean_loss, rel=0.5)
    exact = gradients(loss, exact_leaves)

    def errors(grads):
        pairs = zip(grads, exact, strict=True)
        return [((g.double() - e).norm() / (e.bfloat16().double() - e).norm()).item() for g, e in pairs]

    leaves = [leaf.requires_grad_() for leaf in (x, head)]
    found = loss_of(*leaves, labels, weights, method=method)
    torch.testing.assert_close(found.double(), loss, rtol=1e-5, atol=0)
    assert max(errors(gradients(found, leaves))) <= 1.2
    assert min(errors(gradients(full_logits(*leaves, labels, weights), leaves))) > 1.5


def common_mean(x, head, labels, weights):
    """Means over tokens are then as large as the tokens, and what is rounded of them counts."""
    return (x + 4).bfloat16(), head, labels, weights


def opposite_pairs(x, head, labels, weights):
    """Gradients of near-equal tokens of opposite weights almost cancel, as in losses on preferences."""
    x[1::2] = x[::2] + 0.02 * x[1::2]
    labels[1::2], weights = labels[::2], torch.ones_like(weights)
    weights[1::2] = -1
    return x, head, labels, weights


@pytest.mark.parametrize("change", [common_mean, opposite_pairs])
def test_attention_if_exact_in_bfloat16_rounds_about_once(change):
    (x, head), labels, weights = draw(2000, 900, 64, torch.bfloat16, "all")
    x, head, labels, weights = change(x.detach(), (head.detach() / 8).bfloat16(), labels, weights)
    leaves, exact_leaves = ([y.to(dtype).requires_grad_() for y in (x, head)] for dtype in (x.dtype, torch.float64))
    exact = gradients(full_logits(*exact_leaves, labels, weights.double()), exact_leaves)
    loss = loss_of(*leaves, labels, weights, method="attention_if_exact")
    for grad, wide in zip(gradients(loss, leaves), exact, strict=True):
        assert (grad.double() - wide).norm() <= 1.2 * (wide.bfloat16().double() - wide).norm()


def test_the_loss_in_bfloat16_is_as_exact_as_the_kernels_exp():
    """Two tokens share all of the probability: an error of exp adds up, where among many it averages out."""
    head = torch.zeros(3, 32, dtype=torch.bfloat16)
    head[2] = -10
    x, labels, weights = torch.ones(64, 32, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.int64), torch.ones(64)
    for method, rtol in (("logits", 1e-6), ("attention", 5e-5)):
        loss = loss_of(x, head, labels, weights, method=method)
        torch.testing.assert_close(loss.item(), 64 * math.log(2), rtol=rtol, atol=0)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({}, "attention"),
        ({"weights": -1.0}, "logits"),
        ({"bias_V": torch.zeros(5, dtype=torch.bfloat16)}, "logits"),
        ({"label_smoothing": 0.1}, "logits"),
        ({"dtype": torch.float32}, "logits"),
    ],
    ids=str,
)
def test_attention_if_exact_depends_on_arguments_alone(inputs, expected, monkeypatch):
    """Whatever the machine."""
    (x, head), labels, weights = draw(6, 5, 3, inputs.get("dtype", torch.bfloat16), "all")
    settings = {name: value for name, value in inputs.items() if name in ("bias_V", "label_smoothing")}
    for capability in ("AVX512", "DEFAULT"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        with Shapes() as seen:
            loss_of(x, head, labels, inputs.get("weights", 1.0) * weights, method="attention_if_exact", **settings)
        assert (seen.products == 0) == (expected == "attention")


def test_chunks_are_those_of_the_method_that_runs(monkeypatch):
    """Of logits that stand in for attention no more are held than of logits that were asked for."""
    monkeypatch.setattr(cross_entropy, "MAX_CHUNK", 16)
    (x, head), labels, weights = draw(64, 100, 3, torch.bfloat16, "all")
    for method in ("logits", "attention_if_exact"):
        with Shapes() as seen:
            loss_of(x, head, labels, -weights, method=method)
        assert seen.largest == 16 * 100


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (("AVX512", True, 8), "attention_if_exact"),
        (("AVX512", True, 9), "logits"),
        (("AVX512", False, 8), "logits"),
        (("AVX2", True, 1), "logits"),
    ],
)
def test_a_table_chooses_the_method_of_the_machine_when_it_is_made(machine, expected, monkeypatch):
    capability, has_mkl, threads = machine
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    tables = {name: ops.portable(cross_entropy=name) for name in ("auto", "logits", "attention")}
    monkeypatch.undo()  # a table stays what it is
    (x, head), labels, weights = draw(6, 5, 3, torch.bfloat16, "all")
    ran = {}
    for name, table in tables.items():
        with Shapes() as seen:
            table.linear_cross_entropy(x, head, labels, weights)
        ran[name] = "logits" if seen.products else "attention_if_exact"
    assert ran == {"auto": expected, "logits": "logits", "attention": "attention_if_exact"}
    note = f"({capability}, {'MKL' if has_mkl else 'no MKL'}, {threads} thread{'s' if threads > 1 else ''})"
    assert note in tables["auto"].notes[0]
    assert ("by logits" in tables["auto"].notes[0]) == (expected == "logits")
    assert "as asked for" in tables["attention"].notes[0]


def test_bfloat16_on_a_cpu_holds_no_logits():
    T, V, D = 600, 9000, 16
    leaves, labels, weights = draw(T, V, D, torch.bfloat16, "all")
    largest = {}
    for method in ("logits", "attention"):
        with Shapes() as seen:
            gradients(loss_of(*leaves, labels, weights, method=method), leaves)
        largest[method] = seen.largest
        assert (seen.products == 0) == (method != "logits")
    assert largest["attention"] <= T * T < T * V / 2 < largest["logits"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_not_finite_shows_in_the_loss(place, bad):
    """Also in a row of the head that is no label: a kernel's maximum may pass over it."""
    leaves, labels, weights = draw(9, 700, 16, torch.bfloat16, "all")
    leaves[place].detach()[5 - 600 * place, 3] = bad
    labels.clamp_(max=50)
    assert not loss_of(*leaves, labels, weights).isfinite()


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_attention_computes_only_the_gradients_asked_for(needs):
    leaves, labels, weights = draw(6, 20, 3, supervised="all")
    for leaf, is_needed in zip(leaves, needs, strict=True):
        leaf.requires_grad_(is_needed)
    y = loss_of(*leaves, labels, weights, method="attention")
    needed = [leaf for leaf in leaves if leaf.requires_grad]
    assert y.requires_grad == bool(needed)
    if needed:
        torch.testing.assert_close(gradients(y, needed), gradients(full_logits(*leaves, labels, weights), needed))


def test_compiled_in_bfloat16_equals_eager():
    torch._dynamo.reset()
    attending = partial(loss_of, method="attention_if_exact")
    run = torch.compile(attending, fullgraph=True, dynamic=False, backend="aot_eager")
    leaves, labels, weights = draw(37, 50, 12, torch.bfloat16)
    for sign in (1, -1):
        ys = [fn(*leaves, labels, sign * weights) for fn in (run, attending)]
        assert torch.equal(*ys)
        torch.testing.assert_close(*(gradients(y, leaves) for y in ys), atol=0, rtol=0)
