"""How the next token of a row is chosen from its logits: the largest, or one that is drawn by (seed, row, place).

Legend: B rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfn.dtypes import wide
from mmfn.errors import UserError
from mmfn.rng import key, uniform


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What is drawn from. Raises ValueError for values out of range.

    `temperature`: logits are divided by it; 0, the default, takes the most likely token. `top_k`: of the most likely
    tokens so many (0: all); `top_p`: of these the fewest whose probabilities add up to so much; ties at the end of
    `top_k` all stay. `repetition_penalty`: of a token that stands in the row already, prompt included, a logit above 0
    is divided by it and one below multiplied; it counts at temperature 0 too.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        rules = {
            "temperature": (self.temperature >= 0, "at least 0; 0 takes the most likely token"),
            "top_k": (self.top_k >= 0, "at least 0; 0 takes all tokens"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0; 1 changes nothing"),
            "seed": (self.seed >= 0, "at least 0"),
        }
        for name, (is_right, rule) in rules.items():
            if not is_right:
                raise UserError(f"{name} is {getattr(self, name)} but must be {rule}")

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    @property
    def has_memory(self) -> bool:
        """Whether the tokens that stand in a row already count."""
        return self.repetition_penalty != 1


GREEDY = Sampling()


def row_keys(sampling: Sampling, rows: Sequence[int]) -> Tensor:
    """int64[B] on the host: the keys of rows by their numbers, from which `choose` draws."""
    return torch.tensor([key(sampling.seed, "sampling", row) for row in rows])


def choose(
    logits_BV: Tensor, sampling: Sampling, keys_B: Tensor, places_B: Tensor, is_seen_BV: Tensor | None = None
) -> Tensor:
    """tokens_B: int64[B], the next token of every row.

    `keys_B`: of `row_keys`; `places_B`: int64[B] on the host, which token of its row it is. So what is drawn for a row
    does not depend on the rows beside it. `is_seen_BV`: bool, the tokens that stand in each row, for a repetition
    penalty.
    """
    if is_seen_BV is not None:
        logits_BV = penalize(logits_BV, is_seen_BV, sampling.repetition_penalty)
    if sampling.is_greedy:
        return logits_BV.argmax(-1)
    logits_BV = narrow(logits_BV.to(wide(logits_BV.dtype)) / sampling.temperature, sampling.top_k, sampling.top_p)
    probs_BV, order_BV = logits_BV.softmax(-1).sort(dim=-1, descending=True, stable=True)
    ends_BV = probs_BV.cumsum(-1)
    point_B1 = uniform(keys_B, places_B).to(ends_BV.dtype).to(ends_BV.device)[:, None] * ends_BV[:, -1:]
    last_B1 = (probs_BV > 0).sum(-1, keepdim=True) - 1  # rounding must not reach what cannot be drawn
    place_B1 = torch.minimum((ends_BV <= point_B1).sum(-1, keepdim=True), last_B1)
    return order_BV.gather(1, place_B1)[:, 0]


def penalize(logits_BV: Tensor, is_seen_BV: Tensor, penalty: float) -> Tensor:
    """Logits with those of tokens that are there already made less likely (`penalty` above 1), or more.

    Source: Keskar et al., "CTRL" (2019), section 4.1, for logits of both signs as transformers 5.23 does.
    """
    return torch.where(is_seen_BV, torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def narrow(logits_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits with those that `top_k`, and then `top_p`, leave out at minus infinity.

    Source: Holtzman et al., "The curious case of neural text degeneration" (2020), for `top_p`.
    """
    if 0 < top_k < logits_BV.shape[-1]:
        logits_BV = logits_BV.masked_fill(logits_BV < logits_BV.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1)
        is_out_BV = sorted_BV.softmax(-1).cumsum(-1) <= 1 - top_p  # from the least likely on: what is not needed
        is_out_BV[:, -1] = False
        logits_BV = logits_BV.masked_fill(torch.zeros_like(is_out_BV).scatter(1, order_BV, is_out_BV), -torch.inf)
    return logits_BV
