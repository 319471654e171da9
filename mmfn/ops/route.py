"""Routers: which experts a token goes to, and with which weights. Legend: T tokens, E experts, X experts per token."""

import torch
from torch import Tensor

from mmfn.dtypes import wide


def route(logits_TE: Tensor, num_chosen: int) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax router: `(weights_TX, experts_TX, probs_TE)`, the likeliest experts of each token, with weights that add
    up to 1, and the probabilities of all.

    `logits_TE`: floating[T, E]. `num_chosen`: X in [1, E]. `probs_TE`: float32 or wider; the chosen ones are divided by
    their sum and cast to the dtype of the logits. `experts_TX`: int64, likeliest first; of equal logits the lower
    expert comes first, so that every layout and device sends a token to the same.
    Raises ValueError for other shapes and dtypes. Source: softmax routers in transformers 5.23.
    """
    _check(logits_TE, num_chosen)
    probs_TE = logits_TE.softmax(-1, dtype=wide(logits_TE.dtype))
    experts_TX = _largest(logits_TE.detach(), num_chosen)
    chosen_TX = probs_TE.gather(-1, experts_TX)
    weights_TX = chosen_TX / chosen_TX.sum(-1, keepdim=True)
    return weights_TX.to(logits_TE.dtype), experts_TX, probs_TE


def _largest(logits_TE: Tensor, number: int) -> Tensor:
    """Places of the largest of each row, the largest first and of equal ones the first: int64[T, number].

    `topk` leaves the order of equal numbers open, a stable sort takes three to ten times as long: so it is a `topk` of
    numbers that are never equal, the bits of a float32 (in an order of integers) above those of its place.
    """
    if logits_TE.dtype == torch.float64:  # no room in 64 bits
        return logits_TE.sort(dim=-1, descending=True, stable=True).indices[:, :number]
    bits_TE = logits_TE.float().view(torch.int32)
    bits_TE = torch.where(logits_TE == 0, 0, bits_TE ^ ((bits_TE >> 31) & 0x7FFFFFFF))  # -0 is 0
    place_E = torch.arange(logits_TE.shape[1], device=logits_TE.device)
    return ((bits_TE.long() << 32) - place_E).topk(number, dim=-1).indices


def route_reference(logits_TE: Tensor, num_chosen: int) -> tuple[Tensor, Tensor, Tensor]:
    """`route` with weights by a softmax over the chosen logits alone, which are the same."""
    _check(logits_TE, num_chosen)
    wide_TE = logits_TE.to(wide(logits_TE.dtype))
    experts_TX = wide_TE.sort(dim=-1, descending=True, stable=True).indices[:, :num_chosen]
    shares_TE = (wide_TE - wide_TE.detach().amax(-1, keepdim=True)).exp()
    probs_TE = shares_TE / shares_TE.sum(-1, keepdim=True)
    return wide_TE.gather(-1, experts_TX).softmax(-1).to(logits_TE.dtype), experts_TX, probs_TE


def _check(logits_TE: Tensor, num_chosen: int) -> None:
    if logits_TE.ndim != 2 or not logits_TE.is_floating_point():
        raise ValueError(f"logits_TE is {logits_TE.dtype}{list(logits_TE.shape)} but must be floating[T, E]")
    if not 1 <= num_chosen <= logits_TE.shape[1]:
        raise ValueError(f"num_chosen is {num_chosen} but must be in [1, {logits_TE.shape[1]}], the number of experts")
