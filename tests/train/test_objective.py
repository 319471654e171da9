"""Token weights against the written objectives, and the loss against `torch.nn.functional.cross_entropy`."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfn import ops, tree
from mmfn.batch import IGNORE, Batch, Sample, pack
from mmfn.grad import value_and_grad
from mmfn.models import Output
from mmfn.train.objective import OBJECTIVES, loss, loss_fn, weigh

V, D = 11, 4


def sample(labels: Sequence[int]) -> Sample:
    """A sample whose supervised next tokens are those of `labels` from the second on (0 stands for unsupervised)."""
    labels_T = torch.tensor(labels)
    tokens_T = labels_T.clamp(min=1)
    return Sample(
        tokens_T=tokens_T,
        labels_T=torch.where(labels_T == 0, IGNORE, labels_T),
        kinds_T=torch.zeros_like(tokens_T),
    )


def batch(*rows: Sequence[int], num_tokens: int = 16, num_segments: int | None = None) -> Batch:
    positions = [torch.arange(len(r)).expand(3, -1) for r in rows]
    samples = [sample(r) for r in rows]
    return pack(samples, positions, merge_size=2, patch_values=3, num_tokens=num_tokens, num_segments=num_segments)


MICROBATCHES = [
    batch([5, 6, 7], [0, 0, 3, 4, 5]),  # 2 + 3 supervised
    batch([0, 0, 2], num_segments=4),  # 1
    batch([0, 0, 0], [9], num_tokens=20),  # none
]


def token_losses(b: Batch) -> Tensor:
    """A made-up cross entropy per token, so that formulas can be checked against sums of it."""
    return torch.sin(b.tokens_T.double() + torch.arange(b.tokens_T.numel()))


def weighted(microbatches: Sequence[Batch], objective: str) -> float:
    return sum((b.weights_T.double() * token_losses(b)).sum().item() for b in weigh(microbatches, objective))


def sums(b: Batch) -> tuple[float, int]:
    supervised = b.labels_T != IGNORE
    return token_losses(b)[supervised].sum().item(), int(supervised.sum())


def test_per_token_loss() -> None:
    parts = [sums(b) for b in MICROBATCHES]
    expected = sum(s for s, _ in parts) / sum(n for _, n in parts)
    assert weighted(MICROBATCHES, "per_token_loss") == pytest.approx(expected, rel=1e-6)


def test_default() -> None:
    parts = [sums(b) for b in MICROBATCHES]
    expected = sum(s / n for s, n in parts if n) / sum(1 for _, n in parts if n)
    assert weighted(MICROBATCHES, "default") == pytest.approx(expected, rel=1e-6)
    assert weighted(MICROBATCHES[:1], "default") == pytest.approx(weighted(MICROBATCHES[:1], "per_token_loss"))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_weights_keep_dtype_and_are_zero_where_unsupervised(objective: str) -> None:
    for dtype in (torch.float32, torch.float64):
        given = [replace(b, weights_T=b.weights_T.to(dtype)) for b in MICROBATCHES]
        for before, after in zip(given, weigh(given, objective), strict=True):
            assert after.weights_T.dtype == dtype
            assert torch.equal(after.weights_T != 0, before.labels_T != IGNORE)
            assert torch.equal(before.weights_T, (before.labels_T != IGNORE).to(dtype))  # inputs unchanged
            assert after.tokens_T is before.tokens_T


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_nothing_supervised_weighs_zero(objective: str) -> None:
    (only,) = weigh([MICROBATCHES[2]], objective)
    assert torch.equal(only.weights_T, torch.zeros(20))


def test_an_objective_is_one_small_function() -> None:
    """Mean over samples of each one's mean, from counts alone; samples are told apart, padding belongs to none."""

    def per_sample(counts_MN: Tensor) -> Tensor:
        return torch.where(counts_MN > 0, 1 / (counts_MN.clamp(min=1) * (counts_MN > 0).sum()), 0.0).double()

    first, second, third = (b.weights_T for b in weigh(MICROBATCHES, per_sample))
    third_of = 1 / 3
    assert first[first != 0].tolist() == pytest.approx([third_of / 2] * 2 + [third_of / 3] * 3)
    assert second[second != 0].tolist() == pytest.approx([third_of])
    assert third.abs().sum() == 0


def test_errors() -> None:
    with pytest.raises(ValueError, match="objective 'per_tokenloss' is unknown; nearest is 'per_token_loss'"):
        weigh(MICROBATCHES, "per_tokenloss")
    with pytest.raises(ValueError, match="no micro-batch"):
        weigh([], "default")


FAMILY: Any = SimpleNamespace(
    apply=lambda params, batch, cfg, ops: Output(hidden_TD=params["embed"][batch.tokens_T].tanh()),
    head=lambda params, cfg, ops: params["head"],
)


def params() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {k: torch.randn(V, D, generator=g, dtype=torch.float64) for k in ("embed", "head")}


def mean_cross_entropy(p: dict[str, Tensor], b: Batch) -> Tensor:
    return F.cross_entropy(p["embed"][b.tokens_T].tanh() @ p["head"].T, b.labels_T, ignore_index=IGNORE)


@pytest.mark.parametrize("table", [ops.reference(), ops.portable()], ids=["reference", "portable"])
def test_loss_and_gradients_are_mean_cross_entropy(table: ops.Ops) -> None:
    model = SimpleNamespace(family=FAMILY, cfg=None)
    b = replace(MICROBATCHES[0], weights_T=MICROBATCHES[0].weights_T.double())
    (value, metrics), grads = value_and_grad(loss, has_aux=True)(params(), b, model, ops=table)
    expected, expected_grads = value_and_grad(mean_cross_entropy)(params(), b)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(metrics["loss"], value)
    assert metrics["tokens"].item() == 5
    for got, want in zip(tree.leaves(grads), tree.leaves(expected_grads), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_nothing_supervised_is_loss_zero_with_zero_gradients() -> None:
    (b,) = weigh([MICROBATCHES[2]], "per_token_loss")
    (value, metrics), grads = value_and_grad(loss_fn, has_aux=True)(params(), b, FAMILY, None, ops.portable())
    assert value.item() == 0.0
    assert metrics["tokens"].item() == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in tree.leaves(grads))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_empty_microbatches_change_nothing(objective: str) -> None:
    """Ranks add them, so that all have equally many."""
    empty = [b for b in MICROBATCHES if not (b.labels_T != IGNORE).any()]
    assert empty
    given = [b for b in MICROBATCHES if (b.labels_T != IGNORE).any()]
    more = weigh([*given, *empty, *empty], objective)
    for a, b in zip(weigh(given, objective), more, strict=False):
        assert torch.equal(a.weights_T, b.weights_T)
