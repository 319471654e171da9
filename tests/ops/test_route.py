"""Routers against those of transformers and against their formulas."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers.models.glm4v_moe.modeling_glm4v_moe import Glm4vMoeTextTopkRouter
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextTopKRouter

from mmfn.ops.route import RouteConfig, route, route_reference

SIZES = [(7, 5, 2), (1, 4, 4), (16, 9, 1), (3, 1, 1), (0, 4, 2)]  # T, E, X


def top(num_chosen, **options):
    return RouteConfig(num_chosen=num_chosen, **options)


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
    weights_TX, experts_TX, _ = route(logits_TE, top(X))
    assert torch.equal(experts_TX, chosen_TX)
    assert torch.equal(weights_TX, want_TX)
    assert weights_TX.dtype == dtype
    torch.testing.assert_close(gradient(weights_TX, logits_TE), gradient(want_TX, logits_TE), rtol=0, atol=0)


@pytest.mark.parametrize(("T", "E", "X"), SIZES)
def test_equals_a_softmax_over_the_chosen(T, E, X):
    logits_TE = draw(T, E).requires_grad_()
    weights_TX, experts_TX, probs_TE = route(logits_TE, top(X))
    want_TX, want_experts_TX, want_TE = route_reference(logits_TE, top(X))
    assert torch.equal(experts_TX, want_experts_TX)
    torch.testing.assert_close(weights_TX, want_TX, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(weights_TX, logits_TE), gradient(want_TX, logits_TE), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(probs_TE, want_TE, rtol=1e-12, atol=1e-12)
    found, want = (gradient(fn(logits_TE, top(X))[2], logits_TE) for fn in (route, route_reference))
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weights_TX.sum(-1), torch.ones(T, dtype=torch.float64), rtol=1e-12, atol=0)


def test_large_logits_do_not_overflow():
    logits_TE = torch.tensor([[1e4, 1e4 - 1, -1e4, 0.0]])
    for fn in (route, route_reference):
        weights_TX, experts_TX, probs_TE = fn(logits_TE, top(3))
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
        _, experts_TX, _ = fn(torch.tensor(rows, dtype=dtype), top(X))
        assert experts_TX.tolist() == want


def test_the_order_is_that_of_a_stable_sort():
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        logits_TE = (100 * torch.randn(200, 64, generator=g)).round().to(dtype) / 8
        want = logits_TE.sort(dim=-1, descending=True, stable=True).indices[:, :8]
        assert torch.equal(route(logits_TE, top(8))[1], want)


@pytest.mark.parametrize("fn", [route, route_reference])
def test_what_does_not_fit_is_refused(fn):
    for num_chosen in (0, 5):
        with pytest.raises(ValueError, match=rf"num_chosen is {num_chosen} but must be in \[1, 4\]"):
            fn(torch.zeros(3, 4), top(num_chosen))
    with pytest.raises(ValueError, match=r"logits_TE is torch.int64\[3, 4\] but must be floating\[T, E\]"):
        fn(torch.zeros(3, 4, dtype=torch.int64), top(2))
    with pytest.raises(ValueError, match=r"logits_TE is torch.float32\[4\] but must be floating"):
        fn(torch.zeros(4), top(2))
    with pytest.raises(ValueError, match=r"num_groups is 3 but must divide 4, the number of experts"):
        fn(torch.zeros(3, 4), top(1, num_groups=3))
    with pytest.raises(
        ValueError, match=r"num_chosen is 3 but must be in \[1, 2\], the number of experts to choose from"
    ):
        fn(torch.zeros(3, 4), top(3, num_groups=2))
    with pytest.raises(ValueError, match=r"bias_E is torch.float32\[3\] but must be floating\[4\]"):
        fn(torch.zeros(3, 4), top(1), torch.zeros(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": "tanh"}, "scores is 'tanh' but must be 'softmax' or 'sigmoid'"),
        ({"num_chosen_groups": 2}, r"num_chosen_groups is 2 but must be in \[1, 1\], num_groups"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        top(1, **options)


# ---- sigmoids, a bias, groups

CONFIGS = {
    "sigmoid": top(3, scores="sigmoid"),
    "of groups": top(4, scores="sigmoid", num_groups=4, num_chosen_groups=2, scale=2.5),
    "groups of one": top(3, scores="sigmoid", num_groups=12, num_chosen_groups=5),
    "not normed": top(2, scores="sigmoid", is_normed=False, scale=0.5),
    "softmax": top(3),
    "softmax, not normed, of groups": top(3, num_groups=3, num_chosen_groups=2, is_normed=False, scale=3.0),
}


def formula(row, bias, cfg):
    """Experts and weights of one token, in numbers of Python."""
    E, size = len(row), len(row) // cfg.num_groups
    total = sum(math.exp(x) for x in row)
    scores = [math.exp(x) / total if cfg.scores == "softmax" else 1 / (1 + math.exp(-x)) for x in row]
    choices = [score + b for score, b in zip(scores, bias, strict=True)]
    groups = [range(i, i + size) for i in range(0, E, size)]
    groups.sort(key=lambda group: -sum(sorted((choices[e] for e in group), reverse=True)[:2]))
    experts = [e for group in groups[: cfg.num_chosen_groups] for e in group]
    experts = sorted(experts, key=lambda e: (-choices[e], e))[: cfg.num_chosen]
    chosen = sum(scores[e] for e in experts) if cfg.is_normed else 1.0
    shares = [score / sum(scores) for score in scores]
    return [cfg.scale * scores[e] / chosen for e in experts], experts, shares


@pytest.mark.parametrize("fn", [route, route_reference])
@pytest.mark.parametrize("is_biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_formula(name, is_biased, fn):
    """Gradients by differences of the formula, whose choice a small step does not change."""
    cfg, logits_TE = CONFIGS[name], draw(9, 12).requires_grad_()
    bias_E = 0.3 * draw(1, 12)[0].flip(0) if is_biased else None
    weights_TX, experts_TX, probs_TE = fn(logits_TE, cfg, bias_E)
    bias = bias_E.tolist() if is_biased else [0.0] * 12
    want = [formula(row, bias, cfg) for row in logits_TE.tolist()]
    assert experts_TX.tolist() == [experts for _, experts, _ in want]
    torch.testing.assert_close(
        weights_TX, torch.tensor([w for w, _, _ in want], dtype=torch.float64), rtol=1e-13, atol=0
    )
    torch.testing.assert_close(probs_TE, torch.tensor([p for _, _, p in want], dtype=torch.float64), rtol=1e-13, atol=0)
    if is_biased:
        assert experts_TX.tolist() != fn(logits_TE, cfg)[1].tolist(), "the bias moves the choice"

    def wanted(x_TE):
        return torch.tensor([formula(row, bias, cfg)[0] for row in x_TE.tolist()], dtype=torch.float64)

    steps = torch.eye(12, dtype=torch.float64) * 1e-5
    found_TE = gradient(weights_TX, logits_TE)
    scales_TX = torch.linspace(1, 2, weights_TX.numel(), dtype=torch.float64).view_as(weights_TX)
    plain_TE = logits_TE.detach()
    slopes = [((wanted(plain_TE + s) - wanted(plain_TE - s)) * scales_TX).sum(1) / 2e-5 for s in steps]
    torch.testing.assert_close(found_TE, torch.stack(slopes, 1), rtol=1e-6, atol=1e-9)
    assert bias_E is None or not bias_E.requires_grad


@pytest.mark.parametrize("name", CONFIGS)
def test_both_forms_agree_in_gradients_of_shares_and_give_the_bias_none(name):
    cfg, logits_TE, bias_E = CONFIGS[name], draw(9, 12).requires_grad_(), draw(1, 12)[0].requires_grad_()
    found = []
    for fn in (route, route_reference):
        weights_TX, _, probs_TE = fn(logits_TE, cfg, bias_E)
        value = (weights_TX * weights_TX).sum() + (probs_TE**3).sum()
        dlogits_TE, dbias_E = torch.autograd.grad(value, (logits_TE, bias_E), allow_unused=True)
        found.append(dlogits_TE)
        assert dbias_E is None
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [(1, 1), (2, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("is_normed", [True, False], ids=["normed", "not normed"])
def test_equals_the_router_of_glm(groups, is_normed):
    """In order of experts: theirs is any."""
    T, E, X, (num_groups, num_chosen_groups) = 33, 16, 4, groups
    sizes = {"num_experts_per_tok": X, "num_local_experts": E, "hidden_size": E, "norm_topk_prob": is_normed}
    router = Glm4vMoeTextTopkRouter(
        SimpleNamespace(**sizes, routed_scaling_factor=1.7, n_group=num_groups, topk_group=num_chosen_groups)
    )
    router.weight.data = torch.eye(E)
    router.e_score_correction_bias.copy_(0.3 * draw(1, E, torch.float32)[0].flip(0))
    options = {"scores": "sigmoid", "is_normed": is_normed, "scale": 1.7}
    cfg = top(X, num_groups=num_groups, num_chosen_groups=num_chosen_groups, **options)
    logits_TE = draw(T, E, torch.float32).requires_grad_()
    _, their_TX, chosen_TX = router(logits_TE)
    weights_TX, experts_TX, _ = route(logits_TE, cfg, router.e_score_correction_bias)
    dense = [torch.zeros(T, E).scatter(1, i, w) for i, w in ((chosen_TX, their_TX), (experts_TX, weights_TX))]
    assert torch.equal(*dense)
    want, found = (torch.autograd.grad((x * x).sum(), logits_TE)[0] for x in dense)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equal_choices_go_to_the_lower_expert_and_the_lower_group(dtype):
    torch._dynamo.reset()
    compiled = torch.compile(route, fullgraph=True, backend="aot_eager")
    plain, grouped = top(2, scores="sigmoid"), top(3, scores="sigmoid", num_groups=3, num_chosen_groups=2)
    logits_TE, bias_E = torch.zeros(2, 6, dtype=dtype), torch.tensor([0.0, 0, 1, 0, 1, 0])
    for fn in (route, route_reference, compiled):
        assert fn(logits_TE, plain)[1].tolist() == [[0, 1]] * 2
        assert fn(logits_TE, plain, bias_E)[1].tolist() == [[2, 4]] * 2
        assert fn(logits_TE, grouped)[1].tolist() == [[0, 1, 2]] * 2
        assert fn(logits_TE, grouped, bias_E)[1].tolist() == [[2, 4, 3]] * 2


def test_scores_that_are_all_zero_give_no_weight():
    for fn in (route, route_reference):
        weights_TX, _, probs_TE = fn(torch.full((1, 4), -200.0), top(2, scores="sigmoid"))
        assert not weights_TX.any()
        assert not probs_TE.any()
