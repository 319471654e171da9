"""Optimizers against torch.optim in float64, kernels against each other, and what a non-finite step leaves alone."""

import math

import pytest
import torch
from torch import Tensor

from mmfn.train import optim
from mmfn.train.optim import KERNELS, Facts, Leaves, Transform, Update, by_path

SHAPES = {"a/weight": (5, 3), "b/bias": (7,), "b/weight": (4, 1, 2), "c/scale": ()}


def leaves(seed: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Leaves:
    g = torch.Generator().manual_seed(seed)
    return {p: (torch.randn(s, generator=g, dtype=torch.float64) * scale).to(dtype) for p, s in SHAPES.items()}


CLIP = optim.clip_by_global_norm(1.0)
FACTS = {p: Facts(shape=s) for p, s in SHAPES.items()}


def run(tx: Transform, params: Leaves, grads: Leaves, state: object, lr: float = 1e-2, kernel: str = "fused") -> object:
    norm = optim.global_norm(grads)
    u = Update(
        params=params,
        grads=grads,
        norm=norm,
        finite=torch.isfinite(norm),
        lr=torch.tensor(lr, dtype=torch.float64),
        step=torch.tensor(0),
        kernel=kernel,
    )
    facts = {p: Facts(shape=tuple(x.shape)) for p, x in params.items()}
    return tx.update(facts)(u, state)[1]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("clip", [None, 0.7, 1e6])
def test_adamw_is_torch_adamw_over_100_steps(kernel: str, clip: float | None) -> None:
    adamw = by_path(optim.adamw(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1), no_decay=[r".*bias", r"c/.*"])
    tx = adamw if clip is None else optim.chain(optim.clip_by_global_norm(clip), adamw)
    params = leaves(0)
    theirs = {p: x.clone().requires_grad_() for p, x in params.items()}
    decayed, plain = ["a/weight", "b/weight"], ["b/bias", "c/scale"]
    oracle = torch.optim.AdamW(
        [
            {"params": [theirs[p] for p in decayed], "weight_decay": 0.1},
            {"params": [theirs[p] for p in plain], "weight_decay": 0.0},
        ],
        betas=(0.8, 0.95),
        eps=1e-6,
        foreach=False,
    )
    state = tx.init(params)
    for i in range(100):
        lr = 1e-2 * (1 + math.sin(i))
        grads = leaves(i + 1)
        for p, x in theirs.items():
            x.grad = grads[p].clone()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(theirs.values(), clip)
        for group in oracle.param_groups:
            group["lr"] = lr
        oracle.step()
        state = run(tx, params, grads, state, lr, kernel)
    for p, x in theirs.items():
        torch.testing.assert_close(params[p], x.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_float32_clip_is_clip_grad_norm(kernel: str) -> None:
    tx = optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(betas=(0.0, 0.0)))
    params, grads = leaves(0, torch.float32), leaves(1, torch.float32)
    theirs = [torch.nn.Parameter(x.clone()) for x in params.values()]
    for x, g in zip(theirs, grads.values(), strict=True):
        x.grad = g.clone()
    norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    torch.testing.assert_close(optim.global_norm(grads), norm)
    state = tx.init(params)
    run(tx, params, grads, state, kernel=kernel)
    for m, x in zip(state[1]["m"].values(), theirs, strict=True):  # with both betas 0, the first moment is the gradient
        torch.testing.assert_close(m, x.grad)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_nonfinite_gradient_changes_nothing_but_is_not_counted(kernel: str, dtype: torch.dtype, bad: float) -> None:
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(weight_decay=0.1))
    params = leaves(0, dtype)
    state = run(tx, params, leaves(1, dtype), tx.init(params), kernel=kernel)
    before = {p: x.clone() for p, x in params.items()}
    moments = {(k, p): x.clone() for k in "mv" for p, x in state[1][k].items()}
    grads = leaves(2, dtype)
    grads["b/bias"][3] = bad
    state = run(tx, params, grads, state, kernel=kernel)
    assert state[1]["count"].item() == 1
    assert all(torch.equal(params[p], x) for p, x in before.items())
    assert all(torch.equal(state[1][k][p], x) for (k, p), x in moments.items())
    state = run(tx, params, leaves(3, dtype), state, kernel=kernel)
    assert state[1]["count"].item() == 2
    assert not torch.equal(params["b/bias"], before["b/bias"])


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_parameters_have_float32_moments(kernel: str) -> None:
    tx = optim.adamw(weight_decay=0.1)
    params = leaves(0, torch.bfloat16)
    grads = leaves(1, torch.bfloat16)
    wide = {p: x.float() for p, x in params.items()}
    oracle = torch.optim.AdamW([x.requires_grad_() for x in wide.values()], lr=0.05, weight_decay=0.1)
    for p, x in wide.items():
        x.grad = grads[p].float()
    oracle.step()
    state = run(tx, params, grads, tx.init(params), 0.05, kernel)
    for p, x in wide.items():
        assert params[p].dtype == torch.bfloat16
        assert state["m"][p].dtype == state["v"][p].dtype == torch.float32
        torch.testing.assert_close(params[p], x.detach().bfloat16(), rtol=8e-3, atol=0)  # one rounding
        torch.testing.assert_close(state["m"][p], 0.1 * grads[p].float())


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_that_share_memory_or_differ_in_layout(kernel: str) -> None:
    base = torch.arange(1.0, 10.0).reshape(3, 3)
    shared = base.t()  # transposed, and given to two leaves
    grads = {"a": shared, "b": shared, "c": torch.ones(()).expand(3, 3), "d": base}
    plain = {p: g.clone(memory_format=torch.contiguous_format) for p, g in grads.items()}
    tx = optim.chain(optim.clip_by_global_norm(0.1), optim.adamw())
    start = torch.linspace(-1, 1, 9).reshape(3, 3)
    params, expected = ({p: start.clone() for p in grads} for _ in range(2))
    odd = {"a": start.t().contiguous().t(), "b": start[:, [0, 1, 2]], "c": start.clone(), "d": start.clone()}
    state, state_odd, state_expected = tx.init(params), tx.init(odd), tx.init(expected)
    for _ in range(2):
        state_expected = run(tx, expected, {p: g.clone() for p, g in plain.items()}, state_expected, kernel="reference")
        copies = {p: g.clone() for p, g in plain.items()}
        copies["a"] = copies["b"] = plain["d"].clone().t()
        copies["c"] = torch.ones(()).expand(3, 3) if kernel != "traced" else copies["c"]
        if kernel == "traced":  # an operator that overwrites must be given memory of its own: `own` provides it
            copies = dict(zip(copies, optim.own(list(copies.values())), strict=True))
        state = run(tx, params, copies, state, kernel=kernel)
        state_odd = run(tx, odd, {p: g.clone() for p, g in plain.items()}, state_odd, kernel=kernel)
    for p in grads:
        torch.testing.assert_close(params[p], expected[p])
        torch.testing.assert_close(odd[p], expected[p])


def test_own_copies_only_what_it_must() -> None:
    x = torch.randn(4, 4)
    view, alone = x.t(), torch.randn(3)
    out = optim.own([x, view, alone, alone])
    assert out[0] is x
    assert out[2] is alone
    assert len({o.data_ptr() for o in out}) == 4
    assert all(o.is_contiguous() for o in out)
    assert all(torch.equal(o, i) for o, i in zip(out, [x, view, alone, alone], strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
def test_sgd_clips_narrow_gradients_in_float32(kernel: str) -> None:
    tx = optim.chain(optim.clip_by_global_norm(0.7), optim.sgd(momentum=0.9))
    params, grads = leaves(0, torch.bfloat16), leaves(1, torch.bfloat16)
    exact = {p: x.double() for p, x in grads.items()}
    norm = math.sqrt(sum(x.square().sum().item() for x in exact.values()))
    state = tx.init(params)
    run(tx, params, grads, state, kernel=kernel)
    for path, momentum in state[1]["momentum"].items():
        torch.testing.assert_close(momentum.double(), exact[path] * 0.7 / norm, rtol=1e-6, atol=0)


def test_lr_scales_and_masked() -> None:
    slow = by_path(optim.adamw(), lr_scales=[(r"a/.*", 0.1), (r".*bias", 0.0)])
    params, base = leaves(0), leaves(0)
    run(slow, params, leaves(1), slow.init(params))
    run(optim.adamw(), base, leaves(1), optim.adamw().init(base))
    start = leaves(0)
    assert torch.equal(params["b/bias"], start["b/bias"])
    torch.testing.assert_close(params["a/weight"] - start["a/weight"], 0.1 * (base["a/weight"] - start["a/weight"]))
    torch.testing.assert_close(params["b/weight"], base["b/weight"])

    only = optim.chain(optim.masked(optim.adamw(), [r"a/.*", r".*bias"]), optim.masked(optim.adamw(), [r"c/.*"]))
    params = leaves(0)
    state = only.init(params)
    assert list(state[0]["m"]) == ["a/weight", "b/bias"]
    run(only, params, leaves(1), state)
    assert torch.equal(params["b/weight"], start["b/weight"])
    for p in ("a/weight", "b/bias", "c/scale"):
        torch.testing.assert_close(params[p], base[p], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: by_path(optim.adamw(), no_decay=[".*nrom.*"]).update(FACTS), "'.*nrom.*' matches none of 4 paths"),
        (lambda: by_path(optim.adamw(), lr_scales=[("x", 0.1)]).update(FACTS), "'x' matches none"),
        (lambda: by_path(optim.adamw(), layer_decay=0.0), r"layer_decay must lie in \(0, 1\], got 0.0"),
        (lambda: optim.adamw(moments_dtype=torch.float16), "moments_dtype must be bfloat16 or None"),
        (lambda: optim.sgd(momentum=1.0), r"momentum must lie in \[0, 1\), got 1.0"),
        (lambda: optim.sgd(nesterov=True), "nesterov needs momentum"),
        (lambda: optim.sgd(weight_decay=-0.1), "weight_decay must not be negative"),
        (lambda: optim.muon(momentum=-0.1), r"momentum must lie in \[0, 1\), got -0.1"),
        (lambda: optim.muon(weight_decay=-0.1), "weight_decay must not be negative"),
        (lambda: optim.muon(num_iterations=0), "num_iterations must be at least 1"),
        (lambda: optim.muon(adjust_lr="rms"), "adjust_lr 'rms' is unknown; use one of original, match_rms_adamw"),
        (lambda: optim.muon().update(FACTS), "muon got b/bias of shape .* but takes matrices only; use with_others"),
        (lambda: optim.ema(1.0), r"decay of the average must lie in \[0, 1\), got 1.0"),
        (lambda: optim.ema_params({"params": {}, "opt": [{"count": 0}]}), "no averages of parameters"),
        (lambda: optim.masked(optim.adamw(), ["x"]).init(leaves(0)), "'x' matches none"),
        (lambda: optim.adamw(betas=(0.9, 1.0)), r"betas must lie in \[0, 1\), got \(0.9, 1.0\)"),
        (lambda: optim.adamw(eps=0.0), "eps must be positive"),
        (lambda: optim.adamw(weight_decay=-0.1), "weight_decay must not be negative"),
        (lambda: optim.clip_by_global_norm(0.0), "max_norm must be positive"),
        (lambda: optim.chain(), "at least one"),
        (lambda: optim.chain(optim.sgd(), CLIP), "what is to scale gradients behind what is to update parameters"),
        (lambda: optim.chain(optim.chain(CLIP, optim.adamw()), CLIP), "what is to scale gradients behind"),
        (lambda: optim.chain(by_path(optim.master(optim.adamw())), CLIP), "what is to scale gradients behind"),
        (lambda: optim.chain(optim.on_host(optim.adamw()), CLIP), "what is to scale gradients behind"),
        (lambda: optim.chain(optim.masked(optim.muon(), [".*"]), CLIP), "what is to scale gradients behind"),
        (lambda: optim.chain(optim.ema(0.9), optim.adamw()), "to update parameters behind what is to read updated"),
        (lambda: optim.chain(optim.ema(0.9), CLIP), "what is to scale gradients behind what is to read updated"),
    ],
)
def test_errors(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_a_chain_takes_what_stands_in_order() -> None:
    """A clip of each part, averages last, and a transform of one's own anywhere."""
    a, rest = [r"a/.*"], [r"[bc]/.*"]
    parts = [optim.masked(optim.chain(CLIP, optim.sgd()), a), optim.masked(optim.chain(CLIP, optim.adamw()), rest)]
    plain = Transform(init=lambda params: {}, update=lambda facts: lambda u, state: (u, state))
    tx = optim.chain(plain, CLIP, *parts, plain, optim.ema(0.9), plain)
    params = leaves(0)
    before = {p: x.clone() for p, x in params.items()}
    run(tx, params, leaves(1), tx.init(params))
    assert all(not torch.equal(before[p], x) for p, x in params.items())


def test_global_norm_is_accurate_for_large_and_narrow_leaves() -> None:
    g = torch.Generator().manual_seed(0)
    large = torch.randn(3_000_001, generator=g)
    grads = {"a": large, "b": torch.randn(1000, 130, generator=g).bfloat16(), "c": torch.ones(3), "d": torch.ones(0)}
    exact = math.sqrt(sum(x.double().square().sum().item() for x in grads.values()))
    assert optim.global_norm(grads).dtype == torch.float32
    assert optim.global_norm(grads).item() == pytest.approx(exact, rel=1e-6)

    assert optim.global_norm({"a": torch.tensor([3.0, 4.0], dtype=torch.float64)}).item() == 5.0
    assert optim.global_norm({}).item() == optim.global_norm({"d": torch.ones(0)}).item() == 0.0


def test_first_steps_keep_float32_accuracy() -> None:
    """`1 - 0.999**1` in float32 is off by 5e-5; the update must not be."""
    params: Leaves = {"w": torch.zeros(1)}
    tx = optim.adamw(eps=1e-30)
    run(tx, params, {"w": torch.full((1,), 0.3)}, tx.init(params), 1.0, "reference")
    torch.testing.assert_close(params["w"], torch.full((1,), -1.0), rtol=3e-7, atol=0)


def test_update_compiles_to_one_graph_and_equals_eager() -> None:
    tx = optim.chain(optim.clip_by_global_norm(0.5), by_path(optim.adamw(weight_decay=0.1), no_decay=[r".*bias"]))
    graphs = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Tensor]) -> object:
        graphs.append(gm)
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(gm, example_inputs)

    update = tx.update(FACTS)

    def step(params: Leaves, grads: Leaves, state: object, lr: Tensor, kernel: str = "traced") -> object:
        norm = optim.global_norm(grads)
        finite, step = torch.isfinite(norm), torch.tensor(0)
        u = Update(params=params, grads=grads, norm=norm, finite=finite, lr=lr, step=step, kernel=kernel)
        return update(u, state)[1]

    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend=backend)
    params, expected = leaves(0, torch.float32), leaves(0, torch.float32)
    state, state_expected = tx.init(params), tx.init(expected)
    for i in range(3):
        lr = torch.tensor(0.1 / (i + 1))
        state = compiled(params, leaves(i + 1, torch.float32), state, lr)
        state_expected = step(expected, leaves(i + 1, torch.float32), state_expected, lr, "fused")
    assert len(graphs) == 1
    assert all(torch.equal(params[p], expected[p]) for p in SHAPES)
    assert torch.equal(state[1]["count"], torch.tensor(3.0))
