"""TSV files against Python's own reader of the whole, and what is wrong with them."""

import base64
import csv
import random
import sys
from pathlib import Path

import pytest

from mmfn.train.benchmarks.tsv import TsvFile


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    """As pandas writes it: quotes where they are needed."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("seed", range(8))
def test_rows_are_those_of_the_whole(seed: int, tmp_path: Path) -> None:
    r = random.Random(seed)
    signs = ["a", "\t", "\n", '"', "\u00e9", "\r\n", "\u2028", ",", "\N{PILE OF POO}", ""]
    rows = [
        {"index": f"i{n}", "question": "".join(r.choice(signs) for _ in range(r.randint(0, 12))), "A": r.choice("xy ")}
        for n in range(r.randint(1, 20))
    ]
    file = TsvFile(write(tmp_path / "x.tsv", rows))
    with open(tmp_path / "x.tsv", encoding="utf-8", newline="") as stream:
        want = [{k: v for k, v in row.items() if v} for row in csv.DictReader(stream, delimiter="\t")]
    order = r.sample(range(len(rows)), len(rows))
    assert [file[n] for n in order] == [want[n] for n in order]
    assert len(file) == len(rows)
    assert [file.find(row["index"]) for row in rows] == list(range(len(rows)))
    assert file.find("none") is None


def test_large_fields_and_the_limit_of_the_process_stay(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    assert before < 10**6
    image = base64.b64encode(bytes(10**6)).decode()
    file = TsvFile(write(tmp_path / "x.tsv", [{"index": "0", "question": "q", "image": image}]))
    assert file[0]["image"] == image
    assert csv.field_size_limit() == before
    assert sys.maxsize > before


def test_a_mark_of_the_byte_order_is_no_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_bytes("\ufeffindex\tquestion\r\n1\tq\r\n".encode())
    assert TsvFile(tmp_path / "x.tsv")[0] == {"index": "1", "question": "q"}


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    rows = [{"index": "0", "question": "q"}]
    same = [TsvFile(write(tmp_path / name, rows)).fingerprint for name in ("a.tsv", "b.tsv")]
    assert same[0] == same[1]
    rows[0]["question"] = "r"
    assert TsvFile(write(tmp_path / "a.tsv", rows)).fingerprint != same[0]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "has no column 'index'"),
        (b"index\tA\n1\tx\n", "has no column 'question'"),
        (b"index\tquestion\n", "has no row"),
        (b"index\tquestion\n1\tq\n2\n", r"line 3, has 1 fields for 2 columns"),
        (b"index\tquestion\n\tq\n", "line 2, has no index"),
        (b"index\tquestion\tindex\n1\tq\t2\n", "has column 'index' twice"),
        (b"index\tquestion\n1\t\xff\n", "is no TSV file at line"),
        (b'index\tquestion\n1\t"open\n', "is no TSV file at line 2"),
    ],
)
def test_broken_files_are_one_sentence(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=expected):
        TsvFile(tmp_path / "x.tsv")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*none.tsv' \(No such file"):
        TsvFile(tmp_path / "none.tsv")
