"""Sampling: logits as the processors of transformers make them, the distribution drawn, and what it depends on."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mmfn.rng import key, uniform
from mmfn.train.sampling import Sampling, choose, narrow, penalize, row_keys

SEEDS = range(6)


def logits_of(seed: int, rows: int = 5, vocabulary: int = 37) -> Tensor:
    """Some of them equal."""
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, vocabulary, generator=g)
    return logits.round() if seed % 2 else logits


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("top_k", [0, 1, 2, 10, 36, 37, 100])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999, 1.0])
def test_what_is_left_out_is_that_of_transformers(seed: int, top_k: int, top_p: float) -> None:
    logits_BV = logits_of(seed) / 0.7
    want_BV = TemperatureLogitsWarper(0.7)(None, logits_of(seed))
    if top_k:
        want_BV = TopKLogitsWarper(top_k)(None, want_BV)
    if top_p < 1:
        want_BV = TopPLogitsWarper(top_p)(None, want_BV)
    assert torch.equal(narrow(logits_BV, top_k, top_p), want_BV)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_the_penalty_is_that_of_transformers(seed: int, penalty: float) -> None:
    logits_BV = logits_of(seed)
    ids_BT = torch.randint(37, (5, 9), generator=torch.Generator().manual_seed(seed))
    want_BV = RepetitionPenaltyLogitsProcessor(penalty)(ids_BT, logits_BV.clone())
    is_seen_BV = torch.zeros(5, 37, dtype=torch.bool).scatter(1, ids_BT, True)
    assert torch.equal(penalize(logits_BV, is_seen_BV, penalty), want_BV)


def draw(logits_V: Tensor, sampling: Sampling, num: int) -> Tensor:
    """How often each token is drawn in as many rows and places."""
    rows = 100
    keys_B = row_keys(sampling, range(rows)).repeat(num // rows)
    places_B = torch.arange(num // rows).repeat_interleave(rows)
    tokens_B = choose(logits_V.expand(num, -1), sampling, keys_B, places_B)
    return torch.bincount(tokens_B, minlength=logits_V.numel())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1.0}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 5}, {"temperature": 1.0, "top_p": 0.8}],
    ids=str,
)
def test_the_distribution_is_the_softmax(seed: int, settings: dict[str, Any]) -> None:
    """By Pearson's chi-squared: its value is within 4.5 deviations of its mean, for fixed seeds."""
    sampling, num = Sampling(**settings, seed=seed), 20_000
    logits_V = logits_of(seed, 1, 12)[0]
    probs_V = narrow(logits_V[None] / sampling.temperature, sampling.top_k, sampling.top_p).softmax(-1)[0]
    counts_V = draw(logits_V, sampling, num)
    assert not counts_V[probs_V == 0].any()
    common_V = probs_V * num >= 5  # the rest together, as the test asks for
    expected = torch.cat([probs_V[common_V], probs_V[~common_V].sum()[None]]) * num
    found = torch.cat([counts_V[common_V], counts_V[~common_V].sum()[None]])
    found, expected = found[expected >= 1], expected[expected >= 1]
    freedom = len(found) - 1
    chi_squared = ((found - expected) ** 2 / expected).sum().item()
    assert chi_squared < freedom + 4.5 * math.sqrt(2 * max(1, freedom))


def test_a_wrong_distribution_is_found() -> None:
    """The test above can fail: the counts of one temperature do not fit another."""
    logits_V = logits_of(0, 1, 12)[0]
    counts_V = draw(logits_V, Sampling(temperature=1.0), 20_000)
    expected_V = (logits_V / 1.1).softmax(-1) * 20_000
    assert ((counts_V - expected_V) ** 2 / expected_V).sum() > 100


def test_what_is_drawn_depends_on_seed_row_and_place_alone() -> None:
    logits_BV, sampling = logits_of(3, 40), Sampling(temperature=1.0, seed=7)
    keys_B, places_B = row_keys(sampling, range(40)), torch.arange(40) % 3
    tokens_B = choose(logits_BV, sampling, keys_B, places_B)
    assert torch.equal(choose(logits_BV, sampling, keys_B, places_B), tokens_B)
    order_B = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:13]
    assert torch.equal(choose(logits_BV[order_B], sampling, keys_B[order_B], places_B[order_B]), tokens_B[order_B])
    for other in (
        choose(logits_BV, sampling, row_keys(Sampling(temperature=1.0, seed=8), range(40)), places_B),
        choose(logits_BV, sampling, keys_B, places_B + 1),
        choose(logits_BV, sampling, keys_B.flip(0), places_B),
    ):
        assert (other != tokens_B).sum() > 10


def test_uniform_numbers_are_even_and_uncorrelated() -> None:
    """Mean, spread, 16 bins, and neighbours in keys and in counters."""
    keys_N = torch.tensor([key(0, "x", i) for i in range(200)]).repeat_interleave(200)
    counters_N = torch.arange(200).repeat(200)
    x_N = uniform(keys_N, counters_N)
    assert x_N.dtype == torch.float64
    assert ((x_N >= 0) & (x_N < 1)).all()
    assert abs(x_N.mean() - 0.5) < 5 / math.sqrt(12 * 40_000)
    assert abs(x_N.var() - 1 / 12) < 0.002
    counts = torch.histc(x_N, 16, 0, 1)
    assert ((counts - 2500) ** 2 / 2500).sum() < 15 + 4.5 * math.sqrt(30)
    grid = x_N.view(200, 200) - 0.5
    for a, b in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1])):
        assert abs((a * b).mean() * 12) < 5 / math.sqrt(a.numel())


def test_greedy_takes_the_largest_and_the_penalty_counts() -> None:
    logits_BV = torch.tensor([[2.0, 1.9, -1.0], [-2.0, -1.0, -1.5]])
    is_seen_BV = torch.tensor([[True, False, False], [False, True, False]])
    keys_B, places_B = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    assert choose(logits_BV, Sampling(), keys_B, places_B).tolist() == [0, 1]
    assert choose(logits_BV, Sampling(repetition_penalty=2.0), keys_B, places_B, is_seen_BV).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": -0.1}, "temperature is -0.1 but must be at least 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1 but must be at least 0"),
        ({"top_p": 0.0}, "top_p is 0.0 but must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0 but must be above 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Sampling(**settings)
