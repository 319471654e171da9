"""Schedules against transformers, torch.optim.lr_scheduler and their written formulas."""

import math
from collections.abc import Callable

import pytest
import torch
import transformers as tf

from mmfn.train.schedule import SHAPES, schedule

STEPS = 60


def scheduler_rates(make: Callable[[torch.optim.Optimizer], object], peak: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = make(optimizer)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()  # type: ignore[attr-defined]
    return rates


def ours(kind: str, **kw: float) -> list[float]:
    rate = schedule(kind, **kw)  # type: ignore[arg-type]
    return [rate(torch.tensor(i)).item() for i in range(STEPS)]


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_against_transformers(warmup: int) -> None:
    def check(kind: str, make: Callable[[torch.optim.Optimizer], object]) -> None:
        stop = 51 if kind == "cosine" else STEPS  # behind its end theirs rises again, ours stays
        got = ours(kind, peak=3e-4, num_steps=50, warmup_steps=warmup)
        assert got[:stop] == pytest.approx(scheduler_rates(make, 3e-4)[:stop], rel=1e-12, abs=1e-18)

    check("cosine", lambda o: tf.get_cosine_schedule_with_warmup(o, warmup, 50))
    check("linear", lambda o: tf.get_linear_schedule_with_warmup(o, warmup, 50))
    check("constant", lambda o: tf.get_constant_schedule_with_warmup(o, warmup))


def test_the_last_step_runs_above_the_final_scale() -> None:
    """What the texts say: the scale is reached behind the last step."""
    rate = schedule("cosine", peak=1.0, num_steps=10, final_scale=0.1)
    assert rate(torch.tensor(9)).item() == pytest.approx(0.122, abs=5e-4)
    assert rate(torch.tensor(10)).item() == pytest.approx(0.1)


def test_final_scale_against_torch() -> None:
    cosine = scheduler_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 59, eta_min=0.02), 0.2)
    assert ours("cosine", peak=0.2, num_steps=59, final_scale=0.1) == pytest.approx(cosine, rel=1e-9)
    linear = scheduler_rates(lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.25, total_iters=40), 0.2)
    assert ours("linear", peak=0.2, num_steps=40, final_scale=0.25) == pytest.approx(linear, rel=1e-9)


@pytest.mark.parametrize("kind", SHAPES)
def test_written_formula(kind: str) -> None:
    peak, n, warmup, final = 0.5, 41, 5, 0.1
    shape = {
        "constant": lambda p: 1.0,
        "linear": lambda p: 1 - p,
        "cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)),
    }
    expected = [
        peak * s / warmup
        if s < warmup
        else peak * (final + (1 - final) * shape[kind](min(1.0, (s - warmup) / (n - warmup))))
        for s in range(STEPS)
    ]
    assert ours(kind, peak=peak, num_steps=n, warmup_steps=warmup, final_scale=final) == pytest.approx(
        expected, rel=1e-14
    )


@pytest.mark.parametrize("kind", SHAPES)
def test_traceable_and_float64(kind: str) -> None:
    rate = schedule(kind, peak=1e-3, num_steps=10, warmup_steps=3)
    compiled = torch.compile(rate, fullgraph=True, backend="aot_eager")
    for i in (0, 2, 3, 9, 30):
        step = torch.tensor(i)
        assert rate(step).dtype == torch.float64
        assert rate(step).shape == ()
        assert torch.equal(compiled(step), rate(step))


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"kind": "cosin"}, "schedule 'cosin' is unknown; nearest is 'cosine'"),
        ({"peak": -1.0}, "peak learning rate must be finite and not negative, got -1.0"),
        ({"peak": math.nan}, "peak learning rate"),
        ({"warmup_steps": 10}, "warmup_steps must be at least 0 and below num_steps, got 10 of 10"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"final_scale": 1.5}, r"final_scale must lie in \[0, 1\], got 1.5"),
    ],
)
def test_errors(kw: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule(**{"kind": "cosine", "peak": 1e-3, "num_steps": 10, **kw})  # type: ignore[arg-type]
