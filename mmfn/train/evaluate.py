"""Held-out evaluation: greedy answers compared with the truth by exact match, and the loss as a (sum, weight) pair."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One held-out sample: `question` as given to the model (text), its greedy `prediction`, and the `truth`."""

    id: str
    question: str
    prediction: str
    truth: str
    images: tuple[Path, ...] = ()

    @property
    def is_correct(self) -> bool:
        """Exact match after stripping white space at both ends."""
        return self.prediction.strip() == self.truth.strip()


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All answers in the order of the data, the cross entropy summed over `num_tokens` supervised tokens, the time."""

    answers: tuple[Answer, ...]
    loss_sum: float
    num_tokens: int
    time_s: float

    @property
    def accuracy(self) -> float:
        """Share of exactly right answers."""
        return sum(a.is_correct for a in self.answers) / max(1, len(self.answers))

    @property
    def loss(self) -> float:
        """Mean cross entropy per supervised token."""
        return self.loss_sum / max(1, self.num_tokens)
