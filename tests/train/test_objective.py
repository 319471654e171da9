"""Token weights against the written objectives, and the loss against `torch.nn.functional.cross_entropy`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfn import ops, tree
from mmfn.batch import IGNORE, Batch, Sample
from mmfn.grad import value_and_grad
from mmfn.models import Output, no_losses
from mmfn.packing import Sizes, pack
from mmfn.parallel.context.token_order import segment_multiple, split_tokens
from mmfn.parallel.mesh.layout import Layout, Mesh
from mmfn.parallel.mesh.step_sums import all_counts
from mmfn.parallel.mesh.virtual import virtual
from mmfn.train.build.step import build_objective
from mmfn.train.config.learning import ObjectiveSection
from mmfn.train.objective import OBJECTIVES, STEP_METRICS, Objective, loss, loss_fn, resolve, weigh

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


def pack_rows(rows: Sequence[Sequence[int]], sizes: Sizes) -> Batch:
    positions = [torch.arange(len(r)).expand(3, -1).float() for r in rows]
    return pack([sample(r) for r in rows], positions, [{} for _ in rows], {}, sizes)


def batch(*rows: Sequence[int], num_tokens: int = 16, num_segments: int | None = None) -> Batch:
    return pack_rows(rows, Sizes(tokens=num_tokens, segments=num_segments))


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

    def mean_of_samples(counts_DAN: Tensor) -> Tensor:
        return torch.where(counts_DAN > 0, 1 / (counts_DAN.clamp(min=1) * (counts_DAN > 0).sum()), 0.0).double()

    first, second, third = (b.weights_T for b in weigh(MICROBATCHES, mean_of_samples))
    third_of = 1 / 3
    assert first[first != 0].tolist() == pytest.approx([third_of / 2] * 2 + [third_of / 3] * 3)
    assert second[second != 0].tolist() == pytest.approx([third_of])
    assert third.abs().sum() == 0


def test_errors() -> None:
    with pytest.raises(ValueError, match="objective 'per_tokenloss' is unknown; nearest is 'per_token_loss'"):
        weigh(MICROBATCHES, "per_tokenloss")
    with pytest.raises(ValueError, match="no micro-batch"):
        weigh([], "default")


@pytest.mark.parametrize(
    ("weighting", "given"),
    [
        (lambda counts_DAN: counts_DAN.double().sum(), r"torch.float64\[\]"),
        (lambda counts_DAN: counts_DAN.double()[0], r"torch.float64\[3, 4\]"),
        (lambda counts_DAN: counts_DAN.double()[..., :1], r"torch.float64\[1, 3, 1\]"),
        (lambda counts_DAN: counts_DAN, r"torch.int64\[1, 3, 4\]"),
        (lambda counts_DAN: 1.0, "float"),
    ],
)
def test_a_weighting_of_another_shape_is_refused(weighting: Callable[[Tensor], Any], given: str) -> None:
    with pytest.raises(ValueError, match=rf"the weighting gave {given} for counts_DAN \[1, 3, 4\]; return a floating"):
        weigh(MICROBATCHES, weighting)


FAMILY: Any = SimpleNamespace(
    name="made up",
    loss_weights=no_losses,
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


# ---- every objective, over random splits of a global batch

Parts = list[list[list[tuple[Tensor, int]]]]  # [rank with its own data][micro-batch][sample]: sum of losses, tokens


def mean(values: Sequence[Any]) -> Any:
    return sum(values) / len(values)


def ratio(samples: Sequence[tuple[Tensor, int]], power: float) -> Tensor:
    """sum w S / sum w n with w = n ** power."""
    return sum(n**power * s for s, n in samples) / sum(n ** (power + 1) for _, n in samples)


def learned(samples: Sequence[tuple[Tensor, int]]) -> list[tuple[Tensor, int]]:
    return [(s, n) for s, n in samples if n]


def micro_batches(parts: Parts) -> list[list[tuple[Tensor, int]]]:
    return [own for rank in parts for a in rank if (own := learned(a))]


def micro_steps(parts: Parts) -> list[list[tuple[Tensor, int]]]:
    return [own for step in zip(*parts, strict=True) if (own := learned([x for a in step for x in a]))]


FORMULAS: dict[str, Callable[[Parts], Tensor]] = {
    "default": lambda parts: mean([ratio(batch, 0) for batch in micro_batches(parts)]),
    "per_sample_loss": lambda parts: mean([s / n for batch in micro_batches(parts) for s, n in batch]),
    "per_token_loss": lambda parts: ratio([x for batch in micro_batches(parts) for x in batch], 0),
    "token_loss": lambda parts: mean([ratio(step, 0) for step in micro_steps(parts)]),
    "square_loss": lambda parts: mean([ratio(step, -0.5) for step in micro_steps(parts)]),
}
SPLITS = [
    (Layout(), ""),
    (Layout(dp=2), ""),
    (Layout(replicate=2, dp=2), ""),
    (Layout(cp=2), "gather"),
    (Layout(cp=4, ulysses=4), "ulysses"),
    (Layout(dp=3, cp=2), "ring"),
    (Layout(dp=2, cp=4, ulysses=2), "usp"),
]
TOKENS = 48  # of a micro-batch, padded: what all kinds of 4 ranks divide


def deal(seed: int, num_ranks: int) -> list[list[list[list[int]]]]:
    """Samples, as labels, of every rank and micro-batch: some with nothing to learn, some ranks without samples."""
    g = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=g))

    num_steps = draw(1, 3)
    places: list[list[list[list[int]]]] = [[[] for _ in range(num_steps)] for _ in range(num_ranks)]
    for i in range(3 * num_ranks):
        keep = (0.0, 0.3, 1.0)[i % 3]  # a third of the samples has nothing to learn
        row = [draw(1, V - 1) if i % 3 and float(torch.rand((), generator=g)) < keep else 0 for _ in range(draw(1, 9))]
        own = places[draw(0, num_ranks - 1)][draw(0, num_steps - 1)]
        if sum(len(r) + 8 for r in own) + len(row) + 8 <= TOKENS:  # room for segments in multiples of up to 8
            own.insert(draw(0, len(own)), row)
    if not any(any(r[1:]) for rank in places for a in rank for r in a):
        places[0][0] = [[0, 3, 4]]
    return places


def written(p: dict[str, Tensor], places: list[list[list[list[int]]]], objective: str, settings: Any) -> Tensor:
    """The formula, from sums over samples of torch's own cross entropies."""

    def figures(row: list[int]) -> tuple[Tensor, int]:
        tokens, labels = torch.tensor(row).clamp(min=1)[:-1], torch.tensor(row)[1:]
        logits = (p["embed"][tokens].tanh() @ p["head"].T)[labels != 0]
        labels = labels[labels != 0]
        smoothing = settings.get("label_smoothing", 0.0)
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        return (losses + settings.get("z_loss", 0.0) * logits.logsumexp(-1).square()).sum(), labels.numel()

    return FORMULAS[objective]([[[figures(row) for row in a] for a in rank] for rank in places])


def shares(
    mesh: Mesh, kind: str, places: list[list[list[list[int]]]], objective: Objective
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """This rank's share of loss, metrics and gradients."""
    own = places[mesh["batch"].index]
    multiple = segment_multiple(kind, mesh.layout) if kind else 1
    batches = []
    for rows in own:
        b = pack_rows(rows, Sizes(tokens=TOKENS, segments=9, segment_multiple=multiple))
        b = replace(b, weights_T=b.weights_T.double())
        batches.append(split_tokens(b, kind, mesh) if kind else b)
    weighed = weigh(batches, objective, partial(all_counts, mesh=mesh))
    p, total, sums = params(), torch.zeros((), dtype=torch.float64), {}
    leaves = {name: leaf.requires_grad_() for name, leaf in p.items()}
    for b in weighed:
        value, metrics = loss_fn(leaves, b, FAMILY, None, ops.portable(), objective)
        total = total + value
        sums = {name: sums.get(name, 0) + x for name, x in metrics.items()}
    grads = torch.autograd.grad(total, list(leaves.values()))
    return total.detach(), sums, dict(zip(leaves, grads, strict=True))


def check_split(layout: Layout, kind: str, seed: int, objective: str, **settings: float) -> None:
    places = deal(seed, layout.replicate * layout.dp)
    chosen = replace(resolve(objective), **settings)
    found = virtual(layout, lambda mesh: shares(mesh, kind, places, chosen))
    leaves = {name: leaf.requires_grad_() for name, leaf in params().items()}
    expected = written(leaves, places, objective, settings)
    grads = torch.autograd.grad(expected, list(leaves.values()))
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    close(sum(value for value, _, _ in found), expected.detach())
    close(sum(metrics["loss"] for _, metrics, _ in found), expected.detach())
    if settings:
        close(sum(metrics["ce"] for _, metrics, _ in found), written(params(), places, objective, {}))
    else:
        assert all("ce" not in metrics for _, metrics, _ in found)
    for name, want in zip(leaves, grads, strict=True):
        close(sum(own[name] for _, _, own in found), want)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("layout", "kind"), SPLITS, ids=[f"{layout} {kind}".strip() for layout, kind in SPLITS])
@pytest.mark.parametrize("objective", FORMULAS)
def test_value_and_gradient_are_those_of_the_written_formula(
    objective: str, layout: Layout, kind: str, seed: int
) -> None:
    check_split(layout, kind, seed, objective)


@pytest.mark.parametrize("objective", FORMULAS)
def test_z_loss_and_smoothing_are_weighted_as_the_cross_entropy_is(objective: str) -> None:
    check_split(Layout(dp=2, cp=2), "ring", 1, objective, z_loss=0.02, label_smoothing=0.2)


def test_the_splits_hold_what_is_special() -> None:
    """Ranks, micro-batches and micro-steps without a supervised token, and samples of one token."""
    cases = [deal(seed, layout.replicate * layout.dp) for layout, _ in SPLITS for seed in range(3)]
    assert any(not any(any(r[1:]) for a in rank for r in a) for places in cases for rank in places)
    assert any(not a for places in cases for rank in places for a in rank)
    assert any(
        not any(any(r[1:]) for rank in places for r in rank[step]) for places in cases for step in range(len(places[0]))
    )
    assert any(len(r) == 1 for places in cases for rank in places for a in rank for r in a)
    assert {len(places[0]) for places in cases} == {1, 2, 3}


def test_the_objectives_are_the_five_and_differ() -> None:
    assert OBJECTIVES.keys() == FORMULAS.keys()
    places = [[[[0, 1, 2, 3, 4], [0, 5]], [[0, 6, 7]]], [[[0, 8]], [[0, 0, 9], [0, 1, 2]]]]
    values = {written(params(), places, name, {}).item() for name in FORMULAS}
    assert len({round(x, 6) for x in values}) == 5


# ---- settings


def test_an_objective_is_resolved_from_a_name_a_function_or_itself() -> None:
    chosen = Objective(weighting=OBJECTIVES["token_loss"], z_loss=1e-4)
    assert resolve(chosen) is chosen
    assert resolve("token_loss") == resolve(OBJECTIVES["token_loss"]) == replace(chosen, z_loss=0.0)
    assert resolve("token_loss").is_plain
    assert not chosen.is_plain
    with pytest.raises(ValueError, match="label_smoothing is 2 but must lie in"):
        Objective(label_smoothing=2)


def test_the_loss_takes_an_objective() -> None:
    model, b = SimpleNamespace(family=FAMILY, cfg=None), replace(MICROBATCHES[0], weights_T=torch.ones(16).double())
    value, metrics = loss(params(), b, model, objective=Objective(label_smoothing=0.1))
    logits = params()["embed"][b.tokens_T].tanh() @ params()["head"].T
    settings = {"ignore_index": IGNORE, "label_smoothing": 0.1}
    torch.testing.assert_close(value, F.cross_entropy(logits, b.labels_T, **settings), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(metrics["ce"], mean_cross_entropy(params(), b), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Objective()),
        ({"name": "square_loss", "z_loss": 1e-4}, Objective(weighting=OBJECTIVES["square_loss"], z_loss=1e-4)),
        ({"chunk_size": 1000, "label_smoothing": 0.1}, Objective(chunk=1000, label_smoothing=0.1)),
        ({"router_aux_coef": 0.0}, Objective(loss_weights={"aux_loss": 0.0})),
        ({"total_chunk_size": 4096}, Objective(chunk=4096)),
        ({"total_chunk_size": 1000}, Objective(chunk=512)),
    ],
)
def test_the_objective_of_a_config(settings: dict[str, Any], expected: Objective) -> None:
    assert build_objective(ObjectiveSection(**settings)) == expected


@pytest.mark.parametrize("name", [*STEP_METRICS, "ce_ahead_1", "ce_ahead_12", "counts/a", "twice"])
@pytest.mark.parametrize("kind", ["losses", "stats"])
def test_a_loss_or_a_stat_that_would_hide_another_metric_is_refused(kind: str, name: str) -> None:
    """A stat named `loss` would keep what is not finite from the guard."""
    value = torch.zeros(())
    both = {"losses": {"twice": lambda: value}, "stats": {"twice": value}}
    output = both if name == "twice" else {kind: {name: both[kind]["twice"]}}

    def apply(p: Any, b: Batch, cfg: Any, table: ops.Ops) -> Output:
        return replace(FAMILY.apply(p, b, cfg, table), **output)

    family: Any = SimpleNamespace(name="odd", apply=apply, head=FAMILY.head, loss_weights=lambda cfg: {name: 1.0})
    (b,) = weigh([MICROBATCHES[0]], "default")
    with pytest.raises(ValueError, match=f"family 'odd' has a loss or a stat named '{name}', which would hide another"):
        loss_fn(params(), b, family, None, ops.portable())


def test_the_chunk_of_an_objective_reaches_the_op() -> None:
    seen: list[Any] = []

    def record(*args: Any, chunk: Any, **given: Any) -> Any:
        seen.append(chunk)
        return ops.portable().linear_cross_entropy(*args, chunk=chunk, **given)

    (b,) = weigh([MICROBATCHES[0]], "default")
    table = replace(ops.portable(), linear_cross_entropy=record)
    p = {name: leaf.float() for name, leaf in params().items()}
    values = [loss_fn(p, b, FAMILY, None, table, Objective(chunk=chunk))[0] for chunk in (None, 2)]
    assert seen == [None, 2]
    torch.testing.assert_close(*values)


def test_a_head_may_be_computed_in_a_wider_dtype_than_the_blocks() -> None:
    (b,) = weigh([MICROBATCHES[0]], "default")
    p = {"embed": params()["embed"].bfloat16().requires_grad_(), "head": params()["head"].float().requires_grad_()}
    value, _ = loss_fn(p, b, FAMILY, None, ops.portable())
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in p.items()}
    hidden_TD = p["embed"][b.tokens_T].tanh().double()
    expected = F.cross_entropy(hidden_TD @ wide["head"].T, b.labels_T, ignore_index=IGNORE)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    got = torch.autograd.grad(value, [p["embed"], p["head"]])
    assert [g.dtype for g in got] == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(got[1].double(), torch.autograd.grad(expected, wide["head"])[0], rtol=1e-4, atol=1e-7)
