"""Routers: which experts a token goes to, and with which weights. Legend: T tokens, E experts, X experts per token."""

from torch import Tensor

from mmfn.dtypes import wide


def route(logits_TE: Tensor, num_chosen: int) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax router: `(weights_TX, experts_TX, probs_TE)`, the likeliest experts of each token, with weights that add
    up to 1, and the probabilities of all.

    `logits_TE`: floating[T, E]. `num_chosen`: X in [1, E]. `probs_TE`: float32 or wider; the chosen ones are divided by
    their sum and cast to the dtype of the logits. `experts_TX`: int64, likeliest first; equal logits in any order.
    Raises ValueError for other shapes and dtypes. Source: `Qwen3VLMoeTextTopKRouter` in transformers 5.23.
    """
    _check(logits_TE, num_chosen)
    probs_TE = logits_TE.softmax(-1, dtype=wide(logits_TE.dtype))
    chosen_TX, experts_TX = probs_TE.topk(num_chosen, dim=-1)
    weights_TX = chosen_TX / chosen_TX.sum(-1, keepdim=True)
    return weights_TX.to(logits_TE.dtype), experts_TX, probs_TE


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
