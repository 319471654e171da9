"""A benchmark over ranks: answers into a file as they come, from which an interrupted run goes on; then tables."""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mmfn.batch import Sample
from mmfn.errors import UserError
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.host_values import gather_values
from mmfn.train.benchmarks.questions import (
    BENCHMARKS,
    GROUPS,
    Question,
    encode_question,
    question_of,
    text_behind_thoughts,
)
from mmfn.train.benchmarks.tsv import TsvFile
from mmfn.train.benchmarks.xlsx import Table, write_workbook
from mmfn.train.data import Processor, prefetch
from mmfn.train.data.media import MediaReader
from mmfn.train.forward import Forward
from mmfn.train.run.answer import AnswerSettings, answer_prompts
from mmfn.train.run.held_out import AHEAD, shares

ANSWERS = "answers.jsonl"
ITEMS = ("id", *GROUPS, "question", "options", "answers", "prediction", "compared", "score")
SUMMARY = ("group", "value", "questions", "score")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked: the first rows of `file` as questions of a kind in `BENCHMARKS`, and in which words."""

    file: TsvFile
    kind: str
    instruction: str | None = None
    max_samples: int | None = None

    def __post_init__(self) -> None:
        if self.max_samples is not None and self.max_samples < 1:
            raise UserError(f"--max-samples is {self.max_samples} but must be at least 1")

    def __len__(self) -> int:
        return len(self.file) if self.max_samples is None else min(self.max_samples, len(self.file))

    def question(self, row: int) -> Question:
        """See `question_of`."""
        return question_of(self.file, row, BENCHMARKS[self.kind], self.instruction)


def answer_questions(
    forward: Forward,
    processor: Processor,
    asked: Asked,
    settings: AnswerSettings,
    folder: Path,
    *,
    identity: str,
    batch_samples: int,
    reader: MediaReader,
    on_batch: Callable[[int], None] = lambda num_done: None,
) -> None:
    """Answer all questions into `folder/answers.jsonl`, a line each, those that are there already but for.

    The ranks of `forward` divide what is left, `batch_samples` at once, and the first writes what all have found,
    behind every batch. `identity`: of all that decides answers but the file; it is kept in the first line. `on_batch`
    is told how many are answered. Raises ValueError, on all ranks, for answers of something else, and as `question_of`.
    """
    axis = forward.axis
    head = {"identity": f"{identity} {asked.kind} {asked.file.fingerprint} {asked.instruction!r}"}
    done = _agreed_rows(folder / ANSWERS, head, axis)
    left = [row for row in range(len(asked)) if row not in done]

    def read(places: Sequence[int]) -> tuple[list[int], list[Sample]]:
        rows = [left[place] for place in places]
        return rows, [encode_question(asked.question(row), processor, reader) for row in rows]

    for rows, prompts in prefetch(read, shares(len(left), batch_samples, axis), AHEAD):
        texts = answer_prompts(forward, processor.chat.tokenizer, prompts, settings, rows=rows)
        own = [{"row": row, "prediction": text} for row, text in zip(rows, texts, strict=True)]
        lines = [line for of_rank in gather_values(own, axis, "answers") for line in of_rank]
        if axis.index == 0:
            with open(folder / ANSWERS, "a", encoding="utf-8") as out:
                out.writelines(json.dumps(line) + "\n" for line in lines)
        done.update(line["row"] for line in lines)
        on_batch(len(done))


def write_tables(asked: Asked, folder: Path) -> float:
    """Score all answers of a folder; write `items.csv`, `summary.csv` and both as `results.xlsx`; the mean score."""
    benchmark, predictions = BENCHMARKS[asked.kind], {line["row"]: line["prediction"] for line in _lines(folder)}
    items, groups = [list[Any](ITEMS)], dict[tuple[str, str], list[float]]()
    for row in range(len(asked)):
        question, prediction = asked.question(row), predictions[row]
        compared, score = benchmark.score(text_behind_thoughts(prediction), question)
        options = json.dumps(question.options, ensure_ascii=False) if question.options else ""
        about = [question.groups.get(name, "") for name in GROUPS]
        answers = json.dumps(question.answers, ensure_ascii=False) if len(question.answers) > 1 else question.answers[0]
        items.append([question.id, *about, question.question, options, answers, prediction, compared, score])
        for group in (("all", ""), *question.groups.items()):
            groups.setdefault(group, []).append(score)
    summary = [list[Any](SUMMARY), *([*group, len(each), fmean(each)] for group, each in sorted(groups.items()))]
    tables: dict[str, Table] = {"summary": summary, "items": items}
    for name, table in tables.items():
        with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as out:
            csv.writer(out).writerows(table)
    write_workbook(folder / "results.xlsx", tables)
    return fmean(groups["all", ""])


def _agreed_rows(path: Path, head: dict[str, str], axis: Axis) -> set[int]:
    """The rows that are answered, as the first rank finds them."""
    found: dict[str, Any] = {}
    if axis.index == 0:
        try:
            found = {"rows": _begin(path, head)}
        except UserError as error:
            found = {"error": str(error)}
    (found, *_) = gather_values(found, axis, "answers that are there")
    if "error" in found:
        raise UserError(found["error"])
    return set(found["rows"])


def _begin(path: Path, head: dict[str, str]) -> list[int]:
    """The rows answered in a file, which is made where there is none, and rid of a line that was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.stat().st_size == 0:
        path.write_text(json.dumps(head) + "\n", encoding="utf-8")
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    first, *rest = whole.splitlines() or [b"{}"]
    if json.loads(first) != head:
        raise UserError(
            f"{str(path)!r} holds answers of another model, file or setting; remove it, or give another --out"
        )
    if whole != text:
        path.write_bytes(whole)
    return [json.loads(line)["row"] for line in rest]


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    with open(folder / ANSWERS, encoding="utf-8") as file:
        next(file)
        yield from map(json.loads, file)
