"""Routers: which experts a token goes to, and with which weights.

Legend: T tokens, E experts, X experts per token, G groups of experts.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmfn.dtypes import wide

TINY = 1e-20
"""Added to sums that divide, so that scores that are all 0 give weights of 0."""


@dataclass(frozen=True, kw_only=True)
class RouteConfig:
    """How a router chooses.

    `num_chosen`: experts per token. `scores`: what a logit becomes, its share of all ("softmax") or a number in (0, 1)
    of its own ("sigmoid"). Experts lie in `num_groups` groups of neighbours, of which a token takes the experts of
    `num_chosen_groups` alone. `is_normed`: whether weights are divided by their sum; `scale` multiplies them.
    Raises ValueError for values that do not fit.
    """

    num_chosen: int
    scores: Literal["softmax", "sigmoid"] = "softmax"
    num_groups: int = 1
    num_chosen_groups: int = 1
    is_normed: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.scores not in ("softmax", "sigmoid"):
            raise ValueError(f"scores is {self.scores!r} but must be 'softmax' or 'sigmoid'")
        if not 1 <= self.num_chosen_groups <= self.num_groups:
            raise ValueError(
                f"num_chosen_groups is {self.num_chosen_groups} but must be in [1, {self.num_groups}], num_groups"
            )


def route(logits_TE: Tensor, cfg: RouteConfig, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`(weights_TX, experts_TX, probs_TE)`: the best experts of each token, their weights, and the shares of all.

    Of logits [2, 0, 1, -1] softmax gives the scores [0.64, 0.09, 0.24, 0.03] and, with two experts per token, experts
    [0, 2] and weights [0.73, 0.27]. With `bias_E` [0, 1, 0, 0] the experts are [1, 0]; their weights, [0.12, 0.88],
    come from the scores alone.

    `logits_TE`: floating[T, E]; scores are float32 or wider. `bias_E`: floating[E], added to the scores for the choice;
    no gradient goes there. With groups, those whose two best choices have the largest sums are chosen first. The scores
    of chosen experts are divided by their sum, multiplied by the scale and cast to the dtype of the logits: weights_TX.
    `experts_TX`: int64, the best first; of equal choices the lower expert (group) comes first, so that every layout and
    device sends a token to the same. Softmax without bias and groups compares logits, which rounding keeps apart where
    it makes scores equal. `probs_TE`: the scores of all experts, of a sigmoid divided by their sum.
    Raises ValueError for other shapes and dtypes. Source: softmax routers, and `Glm4vMoeTextTopkRouter`, in
    transformers 5.23; shares of sigmoids: DeepSeek-V3 (arXiv:2412.19437), equation 19. Oracle: `route_reference`.
    """
    _check(logits_TE, cfg, bias_E)
    dtype = wide(logits_TE.dtype)
    scores_TE = logits_TE.softmax(-1, dtype=dtype) if cfg.scores == "softmax" else logits_TE.to(dtype).sigmoid()
    by_logits = cfg.scores == "softmax" and bias_E is None and cfg.num_groups == 1
    choices_TE = logits_TE.detach() if by_logits else scores_TE.detach()
    if bias_E is not None:
        choices_TE = choices_TE + bias_E.detach()
    experts_TX = _largest(_of_groups(choices_TE, cfg), cfg.num_chosen)
    weights_TX = scores_TE.gather(-1, experts_TX)
    if cfg.is_normed:
        weights_TX = weights_TX / (weights_TX.sum(-1, keepdim=True) + TINY)
    probs_TE = scores_TE if cfg.scores == "softmax" else scores_TE / (scores_TE.sum(-1, keepdim=True) + TINY)
    return (weights_TX * cfg.scale).to(logits_TE.dtype), experts_TX, probs_TE


def _of_groups(choices_TE: Tensor, cfg: RouteConfig) -> Tensor:
    """The choices, -inf in groups that are not chosen."""
    if cfg.num_chosen_groups == cfg.num_groups:
        return choices_TE
    T, E = choices_TE.shape
    size = E // cfg.num_groups
    choices_TGE = choices_TE.reshape(T, cfg.num_groups, size)
    sums_TG = choices_TGE.topk(min(2, size), dim=-1).values.sum(-1)
    is_in_TG = torch.zeros_like(sums_TG, dtype=torch.bool)
    is_in_TG = is_in_TG.scatter(-1, _largest(sums_TG, cfg.num_chosen_groups), True)
    return choices_TGE.masked_fill(~is_in_TG[..., None], -torch.inf).view(T, E)


def _largest(x_TE: Tensor, number: int) -> Tensor:
    """Places of the largest of each row, the largest first and of equal ones the first: int64[T, number].

    `topk` leaves the order of equal numbers open, a stable sort takes three to ten times as long: so it is a `topk` of
    numbers that are never equal, the bits of a float32 (in an order of integers) above those of its place.
    """
    if x_TE.dtype == torch.float64:  # no room in 64 bits
        return x_TE.sort(dim=-1, descending=True, stable=True).indices[:, :number]
    bits_TE = x_TE.float().view(torch.int32)
    bits_TE = torch.where(x_TE == 0, 0, bits_TE ^ ((bits_TE >> 31) & 0x7FFFFFFF))  # -0 is 0
    place_E = torch.arange(x_TE.shape[1], device=x_TE.device)
    return ((bits_TE.long() << 32) - place_E).topk(number, dim=-1).indices


def route_reference(logits_TE: Tensor, cfg: RouteConfig, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`route` by sorts; the weights of a softmax by one over the chosen logits alone, which are the same."""
    _check(logits_TE, cfg, bias_E)
    wide_TE = logits_TE.to(wide(logits_TE.dtype))
    is_softmax = cfg.scores == "softmax"
    scores_TE = (wide_TE - wide_TE.detach().amax(-1, keepdim=True)).exp() if is_softmax else wide_TE.sigmoid()
    probs_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + TINY)
    scores_TE = probs_TE if is_softmax else scores_TE
    if bias_E is not None:
        choices_TE = scores_TE + bias_E
    else:
        choices_TE = wide_TE if is_softmax and cfg.num_groups == 1 else scores_TE
    groups = choices_TE.chunk(cfg.num_groups, -1)
    sums_TG = torch.stack([group.sort(dim=-1, descending=True).values[:, :2].sum(-1) for group in groups], -1)
    order_TG = sums_TG.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    allowed = [x.where(order_TG[:, g, None] < cfg.num_chosen_groups, -torch.inf) for g, x in enumerate(groups)]
    experts_TX = torch.cat(allowed, -1).sort(dim=-1, descending=True, stable=True).indices[:, : cfg.num_chosen]
    if is_softmax and cfg.is_normed:
        weights_TX = wide_TE.gather(-1, experts_TX).softmax(-1)
    else:
        weights_TX = scores_TE.gather(-1, experts_TX)
        weights_TX = weights_TX / (weights_TX.sum(-1, keepdim=True) + TINY) if cfg.is_normed else weights_TX
    return (weights_TX * cfg.scale).to(logits_TE.dtype), experts_TX, probs_TE


def _check(logits_TE: Tensor, cfg: RouteConfig, bias_E: Tensor | None) -> None:
    if logits_TE.ndim != 2 or not logits_TE.is_floating_point():
        raise ValueError(f"logits_TE is {logits_TE.dtype}{list(logits_TE.shape)} but must be floating[T, E]")
    E = logits_TE.shape[1]
    if E % cfg.num_groups:
        raise ValueError(f"num_groups is {cfg.num_groups} but must divide {E}, the number of experts")
    most = E // cfg.num_groups * cfg.num_chosen_groups
    if not 1 <= cfg.num_chosen <= most:
        raise ValueError(
            f"num_chosen is {cfg.num_chosen} but must be in [1, {most}], the number of experts to choose from"
        )
    if bias_E is not None and (bias_E.shape != (E,) or not bias_E.is_floating_point()):
        raise ValueError(f"bias_E is {bias_E.dtype}{list(bias_E.shape)} but must be floating[{E}]")
