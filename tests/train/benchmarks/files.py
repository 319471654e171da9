"""TSV files in the layout in which the four benchmarks are published, with pictures drawn here."""

import base64
import csv
import io
from pathlib import Path
from typing import Any

from PIL import Image


def picture(number: int) -> str:
    """A small image in base64."""
    out = io.BytesIO()
    Image.new("RGB", (16, 16), (37 * number % 256, 91 * number % 256, 20)).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def ai2d(path: Path) -> Path:
    """Rows 3 and 4 name the row that holds their picture."""
    options = {"A": "a leaf", "B": "a root", "C": "the stem", "D": "none"}
    rows = [
        {
            "index": i,
            "image": picture(i) if i < 3 else str(i - 3),
            "question": f"What is {i}?",
            **options,
            "answer": "ABCDA"[i],
            "category": ["plants", "animals"][i % 2],
        }
        for i in range(5)
    ]
    return write(path, rows)


def chartqa(path: Path) -> Path:
    rows = [
        {"index": i, "image": picture(i), "question": f"How many\tin {i}?", "answer": answer, "split": split}
        for i, (answer, split) in enumerate([("14", "human"), ("0.5%", "human"), ("Blue", "augmented")])
    ]
    return write(path, rows)


def docvqa(path: Path) -> Path:
    """Some answers are lists, and one picture is in a file."""
    (path.parent / "pages").mkdir(exist_ok=True)
    (path.parent / "pages" / "2.png").write_bytes(base64.b64decode(picture(2)))
    rows: list[dict[str, Any]] = [
        {"index": 10, "image": picture(0), "question": "Who\nsigned?", "answer": "['J. Doe', \"John Doe\"]"},
        {"index": 11, "image": picture(1), "question": "When?", "answer": "1999"},
        {"index": 12, "image_path": "pages/2.png", "question": "Where?", "answer": "['Rome']"},
    ]
    return write(path, rows)


def mmmu(path: Path) -> Path:
    """Several images, marks in the text and in options, and an open question."""
    rows: list[dict[str, Any]] = [
        {
            "index": "val_1",
            "image": str([picture(1), picture(2)]),
            "answer": "B",
            "category": "Art",
            "question": "Compare <image 1> with <image 2>.",
            "A": "same",
            "B": "other",
            "split": "validation",
        },
        {
            "index": "val_2",
            "image": str([picture(3), picture(4)]),
            "answer": "A",
            "category": "Art",
            "question": "Which one?",
            "A": "<image 1>",
            "B": "<image 2>",
            "split": "validation",
        },
        {
            "index": "dev_3",
            "image": picture(5),
            "question": "How much is <image 1>?",
            "answer": "['7', 'seven']",
            "category": "Maths",
            "split": "dev",
            "hint": "Count.",
        },
    ]
    return write(path, rows)


FILES = {"ai2d": ai2d, "chartqa": chartqa, "docvqa": docvqa, "mmmu": mmmu}
