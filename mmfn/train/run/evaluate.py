"""Held-out evaluation: greedy answers compared with the truth by exact match, and the loss as a (sum, weight) pair."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from mmfn import tree
from mmfn.batch import IGNORE, Batch, Sample, to
from mmfn.errors import UserError
from mmfn.model import Model
from mmfn.ops import Ops, portable
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.host_values import gather_values
from mmfn.train.data import Dataset, Processor, decode_audio, decode_image, encode_sample
from mmfn.train.data.records import Record, parse_record, plain_text
from mmfn.train.data.tokenizer import Tokenizer
from mmfn.train.generate import generate
from mmfn.train.objective import loss_fn

ALONE = Axis(name="world")


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
    """All answers in the order of the data, the cross entropy summed over `num_tokens` supervised tokens, the time."""

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
    model: Model,
    dataset: Dataset,
    *,
    batch_samples: int,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    ops: Ops | None = None,
    axis: Axis = ALONE,
    on_batch: Callable[[int], None] = lambda num_done: None,
) -> Evaluation:
    """Answer every entry of `dataset` and compare with its last assistant turn, `batch_samples` entries at once.

    The truth is what training supervises of that turn, behind the prompt: `truth_tokens`. `axis`: ranks, on the CPU and
    with the same whole parameters, that divide the entries; all of them get all answers. `on_batch(num_done)` is called
    behind every batch of this rank. Raises ValueError as `Dataset.prompt` does, naming the sample. `ops` defaults to
    `ops.portable()`.
    """
    table, tokenizer = ops or portable(), dataset.processor.chat.tokenizer
    start = time.perf_counter()
    answers: list[Answer] = []
    loss_sum, num_tokens = 0.0, 0
    share = range(axis.index, len(dataset), axis.size)
    for first in range(0, len(share), batch_samples):
        indices = share[first : first + batch_samples]
        prompts = [dataset.prompt(i)[0] for i in indices]
        samples = [dataset.sample(i) for i in indices]
        batch = _pack(prompts, model)
        rows = generate(model, batch, max_new_tokens, eos_token_ids=eos_token_ids, ops=table, check_finite=False)
        for index, prompt, sample, row in zip(indices, prompts, samples, rows, strict=True):
            both = [text_of(tokens, tokenizer, eos_token_ids) for tokens in (row, truth_tokens(sample, prompt))]
            answers.append(_answer(dataset, dataset.records[index], prompt, *both))
        value, weight = loss_pair(model, samples, table)
        loss_sum, num_tokens = loss_sum + value, num_tokens + weight
        on_batch(len(answers))
    answers, loss_sum, num_tokens = _gathered(answers, loss_sum, num_tokens, len(dataset), axis)
    return Evaluation(
        answers=tuple(answers), loss_sum=loss_sum, num_tokens=num_tokens, time_s=time.perf_counter() - start
    )


def truth_tokens(sample: Sample, prompt: Sample) -> list[int]:
    """The supervised tokens of a sample's last answer that stand behind its prompt.

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


def text_of(tokens: Sequence[int], tokenizer: Tokenizer, eos_token_ids: Sequence[int]) -> str:
    """The text of an answer: its tokens up to the first that ends it, special tokens included."""
    end = next((i for i, token in enumerate(tokens) if token in eos_token_ids), len(tokens))
    text: str = tokenizer.decode(list(tokens[:end]), skip_special_tokens=False)
    return text


@torch.no_grad()
def loss_pair(model: Model, samples: Sequence[Sample], ops: Ops) -> tuple[float, int]:
    """(cross entropy summed over the supervised tokens of `samples`, their number): pairs of parts add up.

    Of next tokens alone: what predicts tokens further ahead is not computed, and further losses do not count.
    """
    batch = replace(_pack(samples, model), ahead=())
    value, metrics = loss_fn(model.params, batch, model.family, model.cfg, ops)
    return metrics.get("ce", value).item(), int(metrics["tokens"])


def answer(
    model: Model,
    processor: Processor,
    prompt: str,
    images: Sequence[str] = (),
    audios: Sequence[str] = (),
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    ops: Ops | None = None,
) -> str:
    """The greedy answer to one user message, as `evaluate` decodes it, without white space at both ends.

    `images`, `audios`: paths, in the order of the `<image>` and `<audio>` marks in `prompt`; those of a kind without
    marks stand in front of it. Raises ValueError when their numbers differ, a file does not decode or the logits are
    not finite. `ops` defaults to `ops.portable()`.
    """
    ahead = [mark * len(paths) for mark, paths in (("<image>", images), ("<audio>", audios)) if mark not in prompt]
    message = {"role": "user", "content": "".join(ahead) + prompt}
    record = parse_record({"messages": [message], "images": list(images), "audios": list(audios)}, "prompt")
    media = {
        "image": [processor.media.image(decode_image(path)) for path in record.images],
        "audio": [processor.media.audio(decode_audio(path, processor.media.sound_rate())) for path in record.audios],
    }
    sample = encode_sample(record.messages, processor, media, is_prompt=True, id=record.id)
    (row,) = generate(model, _pack([sample], model), max_new_tokens, eos_token_ids=eos_token_ids, ops=ops)
    return text_of(row, processor.chat.tokenizer, eos_token_ids).strip()


def to_json(evaluation: Evaluation) -> str:
    """The evaluation as JSON text: totals first, then every answer. A loss that is not finite is null."""
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


def _gathered(
    answers: list[Answer], loss_sum: float, num_tokens: int, num_entries: int, axis: Axis
) -> tuple[list[Answer], float, int]:
    """What all ranks found, answers in the order of the data."""
    if axis.size == 1:
        return answers, loss_sum, num_tokens
    rows, sums, counts = zip(
        *gather_values([[asdict(a) for a in answers], loss_sum, num_tokens], axis, "answers"), strict=True
    )
    ordered = [rows[i % axis.size][i // axis.size] for i in range(num_entries)]
    return [Answer(**row | {"images": tuple(row["images"])}) for row in ordered], sum(sums), sum(counts)


def _pack(samples: Sequence[Sample], model: Model) -> Batch:
    """Samples end to end, without padding, on the device of the parameters."""
    return to(model.family.pack(samples, model.cfg), tree.leaves(model.params)[0].device)


def _answer(dataset: Dataset, record: Record, prompt: Sample, prediction: str, truth: str) -> Answer:
    last = max(i for i, message in enumerate(record.messages) if message["role"] == "assistant")
    questions = [plain_text(message) for message in record.messages[:last] if message["role"] == "user"]
    return Answer(
        id=record.id,
        question=questions[-1] if questions else "",
        prediction=prediction,
        truth=truth,
        images=tuple(str(Path(dataset.media_root) / name) for name in record.images[: len(prompt.images)]),
    )
