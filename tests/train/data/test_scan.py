"""Rows that are found in blocks of bytes are those that Python's own parser finds."""

import io
import json
import random
from pathlib import Path

import pytest

from mmfn.train.data.sources import open_source, scan

PIECES = ['"', "\\", "\\\\", '\\"', "[", "]", "{", "}", ",", "ä", "\u2028", "x", " ", "\n", "\r", "😀"]


def value(rng: random.Random, depth: int = 0) -> object:
    kind = rng.randrange(5 if depth < 3 else 2)
    if kind < 2:
        return "".join(rng.choice(PIECES) for _ in range(rng.randrange(12)))
    if kind == 2:
        return rng.choice([None, True, 3, -1.5e9])
    if kind == 3:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {str(i): value(rng, depth + 1) for i in range(rng.randrange(4))}


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 2**20])
@pytest.mark.parametrize("kind", ["lines", "list"])
def test_rows_are_those_of_the_parser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, block: int) -> None:
    monkeypatch.setattr(scan, "BLOCK", block)
    rng = random.Random(block)
    for case in range(12):
        entries = [value(rng) for _ in range(rng.randrange(1, 9))]
        space = ("", " ", "\n", " \r\n\t")[case % 4]
        texts = [json.dumps(e, ensure_ascii=bool(case % 2)) for e in entries]
        if kind == "list":
            text = space + "[" + space + f"{space},{space}".join(texts) + space + "]" + space
        else:
            texts[0], entries[0] = "{}", {}  # a first [ would make it a list
            ends = [rng.choice(["\n", "\r\n", "\n\n", "\n \t\n\r\n"]) for _ in texts]
            text = "".join(t + e for t, e in zip(texts, ends, strict=True)).removesuffix("\n" if case % 3 else "")
        path = tmp_path / f"{case}.json"
        path.write_bytes(b"\xef\xbb\xbf" * (case % 5 == 0) + text.encode())
        source = open_source(path)
        assert [source.entry(i) for i in range(len(source))] == entries
        if kind == "lines":
            numbers = [
                i for i, line in enumerate(path.read_bytes().split(b"\n"), start=1) if line.strip(b"\xef\xbb\xbf \t\r")
            ]
            assert [source.place(i) for i in range(len(source))] == [f"{str(path)!r}, line {n}" for n in numbers]


@pytest.mark.parametrize(
    ("text", "starts", "gaps"),
    [
        ("", [0], []),
        ("\n\n", [2], []),
        ("a", [0, 1], []),
        ("a\n", [0, 2], []),
        ("\na\nb\n\n\nc", [1, 3, 7, 8], [[0, 1], [2, 3]]),
        ("\ufeffa\nb", [3, 5, 6], []),
    ],
)
@pytest.mark.parametrize("block", [1, 3, 100])
def test_starts_and_gaps(
    monkeypatch: pytest.MonkeyPatch, text: str, starts: list[int], gaps: list[list[int]], block: int
) -> None:
    monkeypatch.setattr(scan, "BLOCK", block)
    blocks: list[bytes] = []
    parts = list(scan.scan_lines(io.BytesIO(text.encode()), blocks.append))
    assert [start for part, _ in parts for start in part.tolist()] == starts
    assert [gap for _, part in parts for gap in part.tolist()] == gaps
    assert b"".join(blocks) == text.encode()
