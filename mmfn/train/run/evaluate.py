"""Held-out evaluation: greedy answers compared with the truth by exact match, and the loss as a sum and a weight."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch

from mmfn.batch import IGNORE, Sample
from mmfn.errors import UserError
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.host_values import gather_to_first, gather_values
from mmfn.train.data import Dataset, prefetch
from mmfn.train.data.records import plain_text
from mmfn.train.forward import Forward
from mmfn.train.generate import generate
from mmfn.train.run.answer import text_of
from mmfn.train.run.held_out import AHEAD, shares

BEGINNING = '{\n "accuracy": '  # of an evaluation as JSON


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One held-out sample: the last `question`, the model's greedy `prediction`, the `truth`, the images in between.

    Both answers are tokens decoded the same way, special tokens included, without the mark that ends them: the tokens
    that a model was trained on are right, whatever the template, the tokenizer or a tool call makes of the text.
    """

    id: str
    question: str
    prediction: str
    truth: str
    images: tuple[str, ...] = ()

    @property
    def is_correct(self) -> bool:
        """Exact match after stripping white space at both ends."""
        return self.prediction.strip() == self.truth.strip()


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All answers in the order of the data, the cross entropy summed over `num_tokens` supervised tokens, the time.

    `answers`, and what is counted of them, are the first rank's alone: another one has none.
    """

    answers: tuple[Answer, ...]
    loss_sum: float
    num_tokens: int
    time_s: float

    @property
    def num_correct(self) -> int:
        """Exactly right answers."""
        return sum(a.is_correct for a in self.answers)

    @property
    def accuracy(self) -> float:
        """Share of exactly right answers."""
        return self.num_correct / len(self.answers)

    @property
    def loss(self) -> float:
        """Mean cross entropy per supervised token; 0 when no token is supervised."""
        return self.loss_sum / max(1, self.num_tokens)

    def check_finite(self) -> None:
        """Raise ValueError when the loss is not finite: then the answers mean nothing either."""
        if not math.isfinite(self.loss_sum):
            raise UserError(f"the held-out loss is {self.loss_sum}; the model's weights are damaged or diverged")


def evaluate(
    forward: Forward,
    dataset: Dataset,
    *,
    batch_samples: int,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    on_batch: Callable[[int], None] = lambda num_done: None,
) -> Evaluation:
    """Answer every entry of `dataset` and compare with its last assistant turn, `batch_samples` entries at once.

    The truth is that turn's tokens behind the prompt: `truth_tokens` of `Dataset.answer`. The ranks of `forward` divide
    the entries; the first one gets all answers, batch by batch, and all of them the loss. `on_batch(num_done)` is
    called behind every batch of this rank. Raises ValueError as `Dataset.prompt` does, naming the sample.
    """
    tokenizer, axis, start = dataset.processor.chat.tokenizer, forward.axis, time.perf_counter()
    answers: list[Answer] = []
    loss_sum, num_tokens, num_done = 0.0, 0, 0

    def read(indices: Sequence[int]) -> list[_Entry]:
        return [_Entry(i, dataset.prompt(i)[0], dataset.sample(i), dataset.answer(i)) for i in indices]

    for entries in prefetch(read, shares(len(dataset), batch_samples, axis), AHEAD):
        own: list[Answer] = []
        prompts = [entry.prompt for entry in entries]
        rows = generate(
            forward,
            forward.pack(prompts),
            max_new_tokens,
            eos_token_ids=eos_token_ids,
            is_idle=not prompts,
            check_finite=False,
        )
        for entry, row in zip(entries, rows, strict=False):  # an idle row is nobody's answer
            truth = truth_tokens(entry.answer, entry.prompt)
            both = [text_of(tokens, tokenizer, eos_token_ids) for tokens in (row, truth)]
            own.append(_answer(dataset, entry.row, entry.prompt, *both))
        for value, weight in forward.loss_sums([entry.sample for entry in entries], [""] * len(entries)).values():
            loss_sum, num_tokens = loss_sum + value, num_tokens + weight
        answers += _gather_answers(own, axis)
        num_done += len(own)
        on_batch(num_done)
    sums, counts = zip(*gather_values([loss_sum, num_tokens], axis, "answers"), strict=True)
    return Evaluation(
        answers=tuple(answers), loss_sum=sum(sums), num_tokens=sum(counts), time_s=time.perf_counter() - start
    )


class _Entry(NamedTuple):
    """A row of the data: as a prompt, as it is learned, and with its last answer alone labelled."""

    row: int
    prompt: Sample
    sample: Sample
    answer: Sample


def truth_tokens(sample: Sample, prompt: Sample) -> list[int]:
    """The labelled tokens of a sample, those of its last answer, that stand behind its prompt.

    A prompt may already hold what the answer begins with, such as an opened think block: then the rest is the truth.
    Where it ends in what the sample does not have there, all of the last answer is.

    >>> sample: <user> hi <assistant> <think> a </think> b     prompt: <user> hi <assistant> <think>
    the truth: a </think> b
    """
    start, length = prompt.tokens_T.numel(), sample.tokens_T.numel()
    is_label_T = sample.labels_T != IGNORE
    if start > length or not torch.equal(sample.tokens_T[:start], prompt.tokens_T):
        places_N = is_label_T.nonzero()[:, 0]
        breaks_N = (places_N.diff() > 1).nonzero()[:, 0]  # the last answer is the last run of labels
        start = int(places_N[int(breaks_N[-1]) + 1 if breaks_N.numel() else 0]) if places_N.numel() else length
    tokens: list[int] = sample.labels_T[start:][is_label_T[start:]].tolist()
    return tokens


def to_json(evaluation: Evaluation) -> str:
    """The evaluation as JSON, from `BEGINNING` on: totals, then every answer. A loss that is not finite is null."""
    answers = [{**asdict(a), "is_correct": a.is_correct} for a in evaluation.answers]
    totals = {
        "accuracy": evaluation.accuracy,
        "num_correct": evaluation.num_correct,
        "num_answers": len(answers),
        "loss": evaluation.loss if math.isfinite(evaluation.loss) else None,
        "num_supervised_tokens": evaluation.num_tokens,
        "time_s": evaluation.time_s,
    }
    return json.dumps({**totals, "answers": answers}, indent=1, ensure_ascii=False) + "\n"


def _gather_answers(own: list[Answer], axis: Axis) -> list[Answer]:
    """Those of a batch of all ranks on the first, in the order of the data; none on the others."""
    if axis.size == 1:
        return own
    rows = gather_to_first([asdict(a) for a in own], axis, "answers")
    ordered = [row for turn in zip_longest(*rows) for row in turn if row is not None]  # entry i is rank i % size's
    return [Answer(**row | {"images": tuple(row["images"])}) for row in ordered]


def _answer(dataset: Dataset, index: int, prompt: Sample, prediction: str, truth: str) -> Answer:
    record = dataset.records[index]
    files = [dataset.find_medium(index, name) for name in record.images[: len(prompt.images)]]
    last = max(i for i, message in enumerate(record.messages) if message["role"] == "assistant")
    questions = [plain_text(message) for message in record.messages[:last] if message["role"] == "user"]
    return Answer(
        id=record.id,
        question=questions[-1] if questions else "",
        prediction=prediction,
        truth=truth,
        images=tuple(str(file) for file in files if isinstance(file, Path)),
    )
