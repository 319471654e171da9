"""The objective: what a step minimises. Its heart is one weight per token, computed once per global step from counts.

The loss is `sum_t weights_T[t] * loss_T[t]`, so values and gradients of micro-batches (and of ranks) are summed, never
averaged. A weighting is a pure function of how many tokens each sample has to learn; another one is one more function.
What has nothing to learn does not count: no sample, micro-batch or micro-step without supervised tokens is part of a
mean. Legend: D ranks with their own data, A micro-batches of each, N segments (samples) of a micro-batch, T tokens, V
vocabulary. Sums below: S_dan of the losses and n_dan of the supervised tokens of sample n of micro-batch (d, a).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmfn.batch import IGNORE, Ahead, Batch
from mmfn.errors import UserError
from mmfn.lora import with_drops
from mmfn.models import AHEAD, Family, Output, ahead_loss
from mmfn.ops import Ops, portable
from mmfn.ops.cross_entropy import check_settings
from mmfn.tree import Tree

Labelled = TypeVar("Labelled", Batch, Ahead)
Weighting = Callable[[Tensor], Tensor]
"""counts_DAN: int64[D, A, N], the supervised tokens of each sample -> float64[D, A, N], the weight of each of them."""


def default(counts_DAN: Tensor) -> Tensor:
    """`mean_da (sum_n S_dan / sum_n n_dan)` over micro-batches that have a supervised token: mean of their means.

    Depends on how samples are split into micro-batches.
    """
    counts_DA1 = counts_DAN.sum(2, keepdim=True)
    return _reciprocal(counts_DA1 * (counts_DA1 > 0).sum()).expand(counts_DAN.shape)


def per_sample_loss(counts_DAN: Tensor) -> Tensor:
    """`mean_dan (S_dan / n_dan)` over samples that have a supervised token. Any split gives the same gradient."""
    return _reciprocal(counts_DAN * (counts_DAN > 0).sum())


def per_token_loss(counts_DAN: Tensor) -> Tensor:
    """`sum_dan S_dan / sum_dan n_dan`, the mean over all supervised tokens. Any split gives the same gradient."""
    return _reciprocal(counts_DAN.sum()).expand(counts_DAN.shape)


def token_loss(counts_DAN: Tensor) -> Tensor:
    """`mean_a (sum_dn S_dan / sum_dn n_dan)` over micro-steps (all ranks' a-th micro-batches) with a supervised token.

    Depends on which samples are in one micro-step, but not on how they are spread over its ranks.
    """
    counts_1A1 = counts_DAN.sum((0, 2), keepdim=True)
    return _reciprocal(counts_1A1 * (counts_1A1 > 0).sum()).expand(counts_DAN.shape)


def square_loss(counts_DAN: Tensor) -> Tensor:
    """`mean_a (sum_dn w_dan S_dan / sum_dn w_dan n_dan)` with `w = 1 / sqrt(n)`, over micro-steps as in `token_loss`.

    A sample counts as the root of its length: between `per_sample_loss` (not at all) and `token_loss` (in full). n
    is the number of tokens that are predicted; MindSpeed-MM takes the labels before the shift, where one at the start
    of a sample, which nothing predicts, counts as well.
    """
    roots_DAN = counts_DAN.double().sqrt()
    roots_1A1 = roots_DAN.sum((0, 2), keepdim=True)
    return _reciprocal(roots_DAN * roots_1A1 * (roots_1A1 > 0).sum())


OBJECTIVES: dict[str, Weighting] = {
    "default": default,
    "per_sample_loss": per_sample_loss,
    "per_token_loss": per_token_loss,
    "token_loss": token_loss,
    "square_loss": square_loss,
}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised.

    `weighting`: the weight of each supervised token. `z_loss`: coefficient of logsumexp^2 beside a token's cross
    entropy, and `label_smoothing`: the share of its target spread over the vocabulary (`ops.linear_cross_entropy`).
    `chunk`: rows of logits held at a time; None: as many as suit the head. `loss_weights`: weights of further losses by
    name, in place of those of the family (`Family.loss_weights`). Raises ValueError for values out of range.
    """

    weighting: Weighting = per_token_loss
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    chunk: int | None = None
    loss_weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_settings(self.z_loss, self.label_smoothing, self.chunk)
        for name, weight in self.loss_weights.items():
            if not 0 <= weight < math.inf:
                raise UserError(f"loss_weights[{name!r}] is {weight} but must be a finite number that is not negative")

    @property
    def is_plain(self) -> bool:
        """True where a token's loss is its cross entropy."""
        return self.z_loss == self.label_smoothing == 0


Named = str | Weighting | Objective
"""An objective, or one of only a weighting: a name in `OBJECTIVES`, or the function."""


def resolve(objective: Named) -> Objective:
    """The objective of a name or a weighting, or itself. Raises ValueError naming the nearest known."""
    if isinstance(objective, Objective):
        return objective
    if not isinstance(objective, str):
        return Objective(weighting=objective)
    if objective not in OBJECTIVES:
        near = get_close_matches(objective, OBJECTIVES, n=1, cutoff=0.0)
        raise UserError(f"objective {objective!r} is unknown; nearest is {near[0]!r}, known: {', '.join(OBJECTIVES)}")
    return Objective(weighting=OBJECTIVES[objective])


Exchange = Callable[[Tensor], tuple[Tensor, int]]
"""counts_AN of this rank's shares -> (counts_DAN of all ranks with their own data, which of them this rank is)."""


def alone(counts_AN: Tensor) -> tuple[Tensor, int]:
    """The exchange of a rank that holds the whole global batch."""
    return counts_AN[None], 0


def weigh(microbatches: Sequence[Batch], objective: Named, exchange: Exchange = alone) -> list[Batch]:
    """All micro-batches of one step with `weights_T`, `num_labels` and `aux_weight` set; only labels and segments are
    read.

    Weights are worked out on the host, where batches of a data set are. They are float32, or float64 where the batch's
    own `weights_T` are; zero where a token is not supervised. A token further ahead has the weight of any other of its
    sample. Raises ValueError as `weigh_by` does.
    """
    if not microbatches:
        raise UserError("weigh received no micro-batch; a global step needs at least one")
    counts_DAN, own = exchange(count_labels(microbatches))
    return weigh_by(microbatches, objective, counts_DAN, own)


def count_labels(microbatches: Sequence[Batch]) -> Tensor:
    """counts_AN: int64, the supervised tokens of every sample; zeros behind the last of a micro-batch."""
    width = max(b.num_segments for b in microbatches)
    return torch.stack([_counts(b, width) for b in microbatches])


def weigh_by(microbatches: Sequence[Batch], objective: Named, counts_DAN: Tensor, own: int) -> list[Batch]:
    """`weigh` where counts are known: of all D ranks with their own data, of which this one is number `own`.

    Raises ValueError for an unknown objective and a weighting that does not give one number per sample; one that is not
    finite makes the loss so. Source: the loss types of MindSpeed-MM (`loss_cfg`).
    """
    weights_DAN = resolve(objective).weighting(counts_DAN.cpu())
    is_tensor = isinstance(weights_DAN, Tensor)
    if not is_tensor or weights_DAN.shape != counts_DAN.shape or not weights_DAN.is_floating_point():
        given = f"{weights_DAN.dtype}{list(weights_DAN.shape)}" if is_tensor else type(weights_DAN).__name__
        raise UserError(
            f"the weighting gave {given} for counts_DAN {list(counts_DAN.shape)}; return a floating tensor of that "
            "shape, the weight of each token of a sample"
        )
    share = 1 / len(microbatches)
    return [_spread(b, weights_N, share) for b, weights_N in zip(microbatches, weights_DAN[own].unbind(0), strict=True)]


PLAIN = Objective()
COUNTS = "counts/"  # what the names of counts begin with among the metrics of a step
STEP_METRICS = ("loss", "tokens", "ce", "grad_norm", "lr", "skipped", "in_a_row")  # and ce_ahead_1, ...: not a family's


def loss_weights(objective: Objective, family: Family, cfg: Any) -> dict[str, float]:
    """The weight of each further loss of a model by name: that of the objective, or else of the family.

    Raises ValueError for a weight of a loss that the family does not have.
    """
    declared = family.loss_weights(cfg)
    if absent := sorted(objective.loss_weights.keys() - declared.keys()):
        raise UserError(
            f"the objective has a weight for loss {absent[0]!r} but this model of family {family.name!r} has "
            f"{', '.join(declared) or 'no further losses'}; use one of these or remove it"
        )
    return {**declared, **objective.loss_weights}


def loss_terms(objective: Objective, family: Family, cfg: Any) -> tuple[str, ...]:
    """Names of the metrics that make up the loss, `ce` first; none where it is the cross entropy alone."""
    further = [name for name, weight in loss_weights(objective, family, cfg).items() if weight]
    return ("ce", *further) if further or not objective.is_plain else ()


def loss_fn(
    params: Tree, batch: Batch, family: Family, cfg: Any, ops: Ops, objective: Objective = PLAIN
) -> tuple[Tensor, dict[str, Tensor]]:
    """`(loss, metrics)` of one weighed micro-batch: its share of the global loss, a plain weighted sum.

    `loss`: 0-D, float32 or wider: the losses of tokens, those of tokens further ahead and what else the family's
    `Output` has, each times its weight; one of weight 0 is not computed. `objective`: what a token's loss is and what
    further losses weigh; its weighting of tokens is in the batch already.
    `metrics`: tensors to be summed over micro-batches and ranks: `loss`, `tokens`, the number of supervised tokens,
    `ce`, the cross entropy alone, where the loss has other terms, `ce_ahead_1` and so on of tokens further ahead, each
    loss of the output by its name (its mean over micro-batches), its `stats`, and `counts/PATH` for each of its counts.
    Raises ValueError for a loss or a stat with the name of another metric.
    """
    if batch.salts is not None:
        params = with_drops(params, family.row_ids(batch, cfg), batch.salts)
    out = family.apply(params, batch, cfg, ops)
    _check_names(out, family)
    weight_VD = family.head(params, cfg, ops)

    def token_losses(hidden_TD: Tensor, tokens: Batch | Ahead) -> tuple[Tensor, Tensor]:
        return ops.linear_cross_entropy(
            hidden_TD.to(weight_VD.dtype),  # a head may be computed in a wider dtype than the blocks
            weight_VD,
            tokens.labels_T,
            tokens.weights_T,
            num_labels=tokens.num_labels,
            z_loss=objective.z_loss,
            label_smoothing=objective.label_smoothing,
            chunk=objective.chunk,
        )

    value, ce = token_losses(out.hidden_TD, batch)
    metrics = {"tokens": (batch.labels_T != IGNORE).sum()}
    ahead = {ahead_loss(i): pair for i, pair in enumerate(zip(batch.ahead, out.ahead, strict=True))}
    weights = _weights_of((*ahead, *out.losses), objective, family, cfg)
    counting = {name: weight for name, weight in weights.items() if weight}
    for name, weight in counting.items():
        if name in ahead:
            tokens, further = ahead[name]
            more, metrics[name] = token_losses(further(), tokens)
        else:
            more = batch.aux_weight * out.losses[name]()
            metrics[name] = more.detach()
        value = value + weight * more
    if counting or not objective.is_plain:
        metrics["ce"] = ce
    counts = {COUNTS + path: values for path, values in out.counts.items()}
    return value, {"loss": value.detach(), **metrics, **out.stats, **counts}


def loss(
    params: Tree, batch: Batch, model: Any, *, objective: Named = "per_token_loss", ops: Ops | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """`(loss, metrics)` of one batch taken as the whole global step; differentiable with respect to `params`.

    `params`: shaped like `model.params`. `model`: a `Model` (its `family` and `cfg` are used). `ops` defaults to
    `ops.portable()`. `objective`: a name in `OBJECTIVES`, a function of counts, or an `Objective`. Raises ValueError
    for an unknown one.

    >>> (value, metrics), grads = mmfn.value_and_grad(mmfn.loss, has_aux=True)(model.params, batch, model)
    """
    objective = resolve(objective)
    (weighed,) = weigh([batch], objective)
    return loss_fn(params, weighed, model.family, model.cfg, ops or portable(), objective)


def _check_names(out: Output, family: Family) -> None:
    """Raise ValueError where a loss or a stat of a family would hide another metric, of which the guard reads one."""
    for name in (*out.losses, *out.stats):
        is_twice = name in out.losses and name in out.stats
        if is_twice or name in STEP_METRICS or name.startswith((AHEAD, COUNTS)):
            raise UserError(
                f"family {family.name!r} has a loss or a stat named {name!r}, which would hide another metric of that "
                "name; give it a name of its own"
            )


def _weights_of(names: Sequence[str], objective: Objective, family: Family, cfg: Any) -> dict[str, float]:
    """The weights of the losses of an output, which may lack some: the first blocks of a model have no router."""
    weights = loss_weights(objective, family, cfg)
    if strange := sorted(set(names) - weights.keys()):
        raise UserError(
            f"family {family.name!r} gives a loss {strange[0]!r} without a weight; add it to its loss_weights"
        )
    return {name: weights[name] for name in names}


def _reciprocal(counts: Tensor) -> Tensor:
    """1 / counts in float64, and 0 where there is nothing to weigh. No count lies between 0 and 1."""
    return torch.where(counts > 0, 1.0 / counts.clamp(min=1).to(torch.float64), 0.0)


def _counts(batch: Batch, width: int) -> Tensor:
    """Supervised tokens of every segment: int64[width], zeros behind the last segment."""
    zeros = torch.zeros(width + 1, dtype=torch.int64, device=batch.labels_T.device)
    return zeros.index_add(0, batch.segment_T, (batch.labels_T != IGNORE).long())[:width]


def _spread(batch: Batch, weights_N: Tensor, share: float) -> Batch:
    """Give each supervised token the weight of its segment (padding belongs to none)."""
    dtype, device = batch.weights_T.dtype, batch.labels_T.device
    padded_N = torch.nn.functional.pad(weights_N[: batch.num_segments], (0, 1)).to(dtype).to(device)
    weights_T = padded_N[batch.segment_T]

    def weighed(tokens: Labelled) -> Labelled:
        own_T = torch.where(tokens.labels_T != IGNORE, weights_T, 0.0)
        return replace(tokens, weights_T=own_T, num_labels=own_T.count_nonzero().cpu())

    return replace(
        weighed(batch),
        ahead=tuple(map(weighed, batch.ahead)),
        aux_weight=batch.weights_T.new_full((), share),
        is_weighed=True,
    )
