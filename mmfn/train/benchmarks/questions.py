"""Rows of a benchmark as questions: what a model is shown and asked, and which answers are right."""

import ast
import base64
import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmfn.batch import Sample
from mmfn.errors import UserError
from mmfn.train.benchmarks.metrics import anls, chosen_option, exact_match, open_answer, relaxed_accuracy
from mmfn.train.benchmarks.tsv import INDEX, TsvFile
from mmfn.train.data import Processor, encode_sample
from mmfn.train.data.media import MediaReader
from mmfn.train.data.records import parse_record

Medium = bytes | Path
GROUPS = ("split", "category", "l2-category")  # columns by which scores are summed up
REFERENCE = 64  # an image field of no more characters names another row, or a file
_MARK = re.compile(r"<image (\d+)>")
_LETTER = re.compile("[A-Z]")

LETTER = "Answer with the letter of the right option alone."
SHORT = "Answer with a word, a number or a short phrase alone."


@dataclass(frozen=True, kw_only=True)
class Question:
    """One row. `parts`: the user's message, strings and numbers of `images`. `options` by letter, {} where the answer
    is open. `groups`: what the row says of `GROUPS`."""

    id: str
    question: str
    parts: tuple[str | int, ...]
    images: tuple[Medium, ...]
    answers: tuple[str, ...]
    options: Mapping[str, str] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)


Score = Callable[[str, Question], tuple[str, float]]
"""(prediction, question) -> (what of it is compared, its score in [0, 1])."""


def _by(metric: Callable[[str, Sequence[str]], float]) -> Score:
    return lambda prediction, question: (prediction, metric(prediction, question.answers))


def _choice(prediction: str, question: Question) -> tuple[str, float]:
    """The option that is meant, or of an open question the whole answer."""
    if not question.options:
        return prediction, open_answer(prediction, question.answers)
    letter = chosen_option(prediction, question.options)
    return letter, float(letter == question.answers[0])


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A kind of question: how it is scored, what the mean over questions is called, what is asked behind it."""

    score: Score
    metric: str
    instruction: str = SHORT


BENCHMARKS = {
    "ai2d": Benchmark(score=_choice, metric="accuracy", instruction=LETTER),
    "chartqa": Benchmark(score=_by(relaxed_accuracy), metric="relaxed accuracy"),
    "docvqa": Benchmark(score=_by(anls), metric="ANLS"),
    "mmmu": Benchmark(score=_choice, metric="accuracy", instruction=LETTER),
    "choice": Benchmark(score=_choice, metric="accuracy", instruction=LETTER),
    "exact": Benchmark(score=_by(exact_match), metric="exact match"),
}
"""What `mmfn eval --benchmark` takes; the last two are for other files of the same layout."""


def question_of(file: TsvFile, row: int, benchmark: Benchmark, instruction: str | None = None) -> Question:
    """Row `row` of a file. `instruction`: what is asked behind the question, default that of its kind.

    Where the text has marks `<image 1>` the images stand there, else in front of it. Raises ValueError, naming the row,
    for one that has no answer, an image that is none, or an answer that is no option.
    """
    values = file[row]
    try:
        options = {name: text for name, text in sorted(values.items()) if _LETTER.fullmatch(name)}
        options = options if benchmark.score is _choice else {}
        answers = _listed(values.get("answer", ""))
        if not answers:
            raise UserError("it has no answer; benchmarks are scored here, so use a split with answers")
        if options and answers[0] not in options:
            raise UserError(f"its answer {answers[0]!r} is none of its options {', '.join(options)}")
        asked = benchmark.instruction if instruction is None else instruction
        if instruction is None and benchmark.score is _choice and not options:
            asked = SHORT
        lines = [values["hint"]] if "hint" in values else []
        lines += [values.get("question", ""), *(f"{name}. {text}" for name, text in options.items())]
        images = _images(file, values)
        return Question(
            id=values[INDEX],
            question=values.get("question", ""),
            parts=_parts("\n".join([*lines, *([asked] if asked else [])]), len(images)),
            images=images,
            answers=answers,
            options=options,
            groups={name: values[name] for name in GROUPS if name in values},
        )
    except UserError as error:
        raise UserError(f"{str(file.path)!r}, row {values.get(INDEX, row)}: {error}") from error


def encode_question(question: Question, processor: Processor, reader: MediaReader) -> Sample:
    """The prompt of a question."""
    content: list[Any] = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": str(part)}
        for part in question.parts
    ]
    record = parse_record({"messages": [{"role": "user", "content": content}]}, question.id)
    media = reader.read(record, lambda name: question.images[int(name)])
    return encode_sample(record.messages, processor, media, is_prompt=True, id=question.id)


def text_behind_thoughts(prediction: str) -> str:
    """An answer without the think block in front of it."""
    return prediction.rpartition("</think>")[2].strip()


def _parts(text: str, num_images: int) -> tuple[str | int, ...]:
    """`"see <image 2>?"` of two images: `(0, "see ", 1, "?")`, what has no mark first."""
    pieces: list[str | int] = list(_MARK.split(text))
    for place in range(1, len(pieces), 2):
        pieces[place] = int(pieces[place]) - 1
    marked = {piece for piece in pieces if isinstance(piece, int)}
    if strange := sorted(marked - set(range(num_images))):
        raise UserError(f"its text names image {strange[0] + 1} but it has {num_images} images; correct it")
    return (*(i for i in range(num_images) if i not in marked), *(piece for piece in pieces if piece != ""))


def _listed(text: str) -> tuple[str, ...]:
    """The texts of a field that holds a list as Python writes it, else the field itself; () for none."""
    if text.startswith("[") and text.endswith("]"):
        try:
            items = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return (text,)
        return tuple(str(item) for item in items)
    return (text,) if text else ()


def _images(file: TsvFile, values: Mapping[str, str]) -> tuple[Medium, ...]:
    """The images of a row: in it, in the row that its field names, or files beside the TSV file."""
    stored = values.get("image", "")
    other = file.find(stored) if 0 < len(stored) <= REFERENCE else None
    if other is not None:
        stored = file[other].get("image", "")
    if stored:
        return tuple(_decoded(text) for text in _listed(stored))
    return tuple(_beside(file.path.parent, name) for name in _listed(values.get("image_path", "")))


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"its image is no base64 ({error}), nor the index of a row that has one; repair it") from error


def _beside(folder: Path, name: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise UserError(f"its image_path {name!r} leaves the folder of the file; put the images there")
    return path
