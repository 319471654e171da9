"""The router against that of transformers and against its own formula."""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextTopKRouter

from mmfn.ops.route import route, route_reference

SIZES = [(7, 5, 2), (1, 4, 4), (16, 9, 1), (3, 1, 1), (0, 4, 2)]  # T, E, X


def draw(T, E, dtype=torch.float64):
    return torch.randn(T, E, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def gradient(weights_TX, logits_TE):
    """Of a sum in which every weight counts differently."""
    scales = torch.linspace(1, 2, weights_TX.numel(), dtype=weights_TX.dtype).view_as(weights_TX)
    return torch.autograd.grad((weights_TX * scales).sum(), logits_TE)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "E", "X"), SIZES)
def test_equals_transformers(T, E, X, dtype):
    cfg = SimpleNamespace(num_experts_per_tok=X, num_experts=E, hidden_size=E)
    router = Qwen3VLMoeTextTopKRouter(cfg)
    router.weight.data = torch.eye(E, dtype=dtype)  # the logits are the inputs
    logits_TE = draw(T, E, dtype).requires_grad_()
    _, want_TX, chosen_TX = router(logits_TE)
    weights_TX, experts_TX, _ = route(logits_TE, X)
    assert torch.equal(experts_TX, chosen_TX)
    assert torch.equal(weights_TX, want_TX)
    assert weights_TX.dtype == dtype
    torch.testing.assert_close(gradient(weights_TX, logits_TE), gradient(want_TX, logits_TE), rtol=0, atol=0)


@pytest.mark.parametrize(("T", "E", "X"), SIZES)
def test_equals_a_softmax_over_the_chosen(T, E, X):
    logits_TE = draw(T, E).requires_grad_()
    weights_TX, experts_TX, probs_TE = route(logits_TE, X)
    want_TX, want_experts_TX, want_TE = route_reference(logits_TE, X)
    assert torch.equal(experts_TX, want_experts_TX)
    torch.testing.assert_close(weights_TX, want_TX, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(weights_TX, logits_TE), gradient(want_TX, logits_TE), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(probs_TE, want_TE, rtol=1e-12, atol=1e-12)
    found, want = (gradient(fn(logits_TE, X)[2], logits_TE) for fn in (route, route_reference))
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weights_TX.sum(-1), torch.ones(T, dtype=torch.float64), rtol=1e-12, atol=0)


def test_large_logits_do_not_overflow():
    logits_TE = torch.tensor([[1e4, 1e4 - 1, -1e4, 0.0]])
    for fn in (route, route_reference):
        weights_TX, experts_TX, probs_TE = fn(logits_TE, 3)
        assert experts_TX.tolist() == [[0, 1, 3]]
        assert probs_TE.sum() == pytest.approx(1)
        assert weights_TX[0].tolist() == pytest.approx([0.731059, 0.268941, 0.0], abs=1e-5)


TIES = {
    "constant": [[0.5] * 6],
    "zeros of both signs": [[-0.0, 0.0, -0.0, 1.0, 0.0, -0.0]],
    "repeated rows": [[3.0, -1.0, 3.0, 2.0, 3.0, 2.0]] * 3,
    "negative": [[-2.0, -1.0, -1.0, -2.0, -1.0, -3.0]],
    "infinite": [[-torch.inf, 1.0, torch.inf, -torch.inf, torch.inf, -torch.inf]],
    "nearly": [[1.0, 1.0 + 2**-7, 1.0, 1.0 + 2**-7, 1.0, 0.0]],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", TIES)
@pytest.mark.parametrize("X", range(1, 7))
def test_of_equal_logits_the_lower_expert_comes_first(X, name, dtype):
    rows = TIES[name]
    want = [sorted(range(6), key=lambda e: (-row[e], e))[:X] for row in rows]
    torch._dynamo.reset()
    compiled = torch.compile(route, fullgraph=True, backend="aot_eager")
    for fn in (route, route_reference, compiled):
        _, experts_TX, _ = fn(torch.tensor(rows, dtype=dtype), X)
        assert experts_TX.tolist() == want


def test_the_order_is_that_of_a_stable_sort():
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        logits_TE = (100 * torch.randn(200, 64, generator=g)).round().to(dtype) / 8
        want = logits_TE.sort(dim=-1, descending=True, stable=True).indices[:, :8]
        assert torch.equal(route(logits_TE, 8)[1], want)


@pytest.mark.parametrize("fn", [route, route_reference])
def test_what_does_not_fit_is_refused(fn):
    for num_chosen in (0, 5):
        with pytest.raises(ValueError, match=rf"num_chosen is {num_chosen} but must be in \[1, 4\]"):
            fn(torch.zeros(3, 4), num_chosen)
    with pytest.raises(ValueError, match=r"logits_TE is torch.int64\[3, 4\] but must be floating\[T, E\]"):
        fn(torch.zeros(3, 4, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match=r"logits_TE is torch.float32\[4\] but must be floating"):
        fn(torch.zeros(4), 2)
