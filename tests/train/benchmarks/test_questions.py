"""Rows in the published layouts as questions: what is shown and asked, which answers are right, and what is refused."""

import base64
from pathlib import Path

import pytest

from mmfn.train.benchmarks.questions import (
    BENCHMARKS,
    LETTER,
    SHORT,
    Question,
    encode_question,
    question_of,
    text_behind_thoughts,
)
from mmfn.train.benchmarks.tsv import TsvFile
from mmfn.train.build.processor import load_model_processor
from mmfn.train.data import decode_image
from mmfn.train.data.media import MediaReader
from tests.train.benchmarks.files import FILES, picture, write


def questions(kind: str, folder: Path) -> list[Question]:
    file = TsvFile(FILES[kind](folder / f"{kind}.tsv"))
    return [question_of(file, row, BENCHMARKS[kind]) for row in range(len(file))]


def image(number: int) -> bytes:
    return base64.b64decode(picture(number))


def test_ai2d(tmp_path: Path) -> None:
    found = questions("ai2d", tmp_path)
    assert found[1].parts == (0, f"What is 1?\nA. a leaf\nB. a root\nC. the stem\nD. none\n{LETTER}")
    assert [q.answers for q in found] == [("A",), ("B",), ("C",), ("D",), ("A",)]
    assert [q.images for q in found] == [(image(i),) for i in (0, 1, 2, 0, 1)]  # the last two name other rows
    assert found[1].groups == {"category": "animals"}


def test_chartqa(tmp_path: Path) -> None:
    first, *_ = questions("chartqa", tmp_path)
    assert first.parts == (0, f"How many\tin 0?\n{SHORT}")
    assert (first.answers, first.options, first.groups) == (("14",), {}, {"split": "human"})


def test_docvqa(tmp_path: Path) -> None:
    found = questions("docvqa", tmp_path)
    assert [q.answers for q in found] == [("J. Doe", "John Doe"), ("1999",), ("Rome",)]
    assert [q.id for q in found] == ["10", "11", "12"]
    assert found[2].images == ((tmp_path / "pages" / "2.png").resolve(),)


def test_mmmu(tmp_path: Path) -> None:
    found = questions("mmmu", tmp_path)
    assert found[0].parts == ("Compare ", 0, " with ", 1, f".\nA. same\nB. other\n{LETTER}")
    assert found[1].parts == ("Which one?\nA. ", 0, "\nB. ", 1, f"\n{LETTER}")
    assert found[2].parts == ("Count.\nHow much is ", 0, f"?\n{SHORT}")
    assert (found[2].answers, found[2].options) == (("7", "seven"), {})
    assert found[0].images == (image(1), image(2))
    assert found[0].groups == {"category": "Art", "split": "validation"}


@pytest.mark.parametrize(
    ("kind", "predictions", "scores"),
    [
        ("ai2d", ["A", "the answer is b", "the stem", "C", "<think>B</think>A"], [1, 1, 1, 0, 1]),
        ("chartqa", ["14.7", "0.0049", "blue"], [1, 1, 1]),
        ("chartqa", ["14.8", "0.5", "red"], [0, 0, 0]),
        ("docvqa", ["john doe", "1998", "Paris"], [1, 0.75, 0]),
        ("mmmu", ["(B)", "B", "so x = 7"], [1, 0, 1]),
    ],
)
def test_scores(kind: str, predictions: list[str], scores: list[float], tmp_path: Path) -> None:
    score = BENCHMARKS[kind].score
    found = [score(text_behind_thoughts(p), q)[1] for p, q in zip(predictions, questions(kind, tmp_path), strict=True)]
    assert found == scores


def test_prompts_show_every_image_where_it_is_named(small_demo: Path, tmp_path: Path) -> None:
    processor = load_model_processor(str(small_demo / "model"))
    reader = MediaReader(processor.media)
    first = encode_question(questions("mmmu", tmp_path)[0], processor, reader)
    text = processor.chat.tokenizer.decode(first.tokens_T)
    assert len(first.images) == 2
    assert "Compare <|vision_start|>" in text
    assert "<|vision_end|> with <|vision_start|>" in text
    assert text.endswith("assistant\n")
    for image_number, medium in zip((1, 2), first.images, strict=True):
        alone = reader.media.image(decode_image(image(image_number)))
        assert medium.inputs_UF.equal(alone.inputs_UF)


def test_another_instruction(tmp_path: Path) -> None:
    file = TsvFile(FILES["chartqa"](tmp_path / "x.tsv"))
    assert question_of(file, 0, BENCHMARKS["chartqa"], "Say it.").parts == (0, "How many\tin 0?\nSay it.")
    assert question_of(file, 0, BENCHMARKS["chartqa"], "").parts == (0, "How many\tin 0?")


ROW = {"index": "7", "question": "q", "image": picture(0), "A": "x", "B": "y", "answer": "A"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"answer": ""}, "row 7: it has no answer"),
        ({"answer": "C"}, "row 7: its answer 'C' is none of its options A, B"),
        ({"image": "?" * 100}, "row 7: its image is no base64"),
        ({"image": "99"}, "row 7: its image is no base64"),
        ({"question": "see <image 2>"}, "row 7: its text names image 2 but it has 1 images"),
        ({"question": "see <image 0>"}, "row 7: its text names image 0"),
        ({"image": "", "image_path": "../x.png"}, r"row 7: its image_path '../x.png' leaves the folder"),
    ],
)
def test_rows_that_are_wrong_are_one_sentence(changes: dict[str, str], expected: str, tmp_path: Path) -> None:
    file = TsvFile(write(tmp_path / "x.tsv", [{**ROW, **changes}]))
    with pytest.raises(ValueError, match=expected):
        question_of(file, 0, BENCHMARKS["choice"])
