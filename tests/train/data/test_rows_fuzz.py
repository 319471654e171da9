"""Rows as hostile input: each is a sample, or a `BadSample` with id, place and reason; the others are as they were."""

import io
import json
import pickle
import random
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmfn.errors import UserError
from mmfn.train.data import Dataset
from mmfn.train.data.bad import BadSample
from mmfn.train.data.sources import pieces

GOOD: dict[str, Any] = {
    "id": "g",
    "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
}
NUM = 500


VALUES = [None, 1.5, {}, [], "x", [[]], True, 10**400]
BYTES = [b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\x00", b"\\ud800", b"\x1f"]
ROWS = [b"{}", b"[]", b"null", b"NaN", b"1e999", b'"', b"\\", b"\xef\xbb\xbf{}", b"{" * 10_000, b"-", b"{}{}"]
PATHS = ["../x.png", "/etc/hostname", "nowhere.png", "\x00", "http://x/y.png", "a" * 5000, "."]


def fuzz(rng: random.Random) -> bytes:
    """One row that is wrong in one of many ways, without a line end."""
    row = json.dumps(GOOD).encode()
    kind = rng.randrange(9)
    if kind == 0:
        row = row[: rng.randrange(1, len(row))]
    elif kind == 1:
        flipped = bytearray(row)
        for _ in range(rng.randrange(1, 4)):
            flipped[rng.randrange(len(row))] ^= 1 << rng.randrange(8)
        row = bytes(flipped)
    elif kind == 2:
        row = row.replace(b'"hi"', b'"' + b"long " * rng.randrange(2000, 4000) + b'"')
    elif kind == 3:
        depth = rng.choice([50, 2000, 200_000])
        row = row.replace(b'"hi"', b"[" * depth + b"]" * depth)
    elif kind == 4:
        row = row.replace(b'"role"', b'"content"', 1)
    elif kind == 5:
        row = json.dumps({**GOOD, rng.choice(list(GOOD)): rng.choice(VALUES)}).encode()
    elif kind == 6:
        row = row.replace(b"hi", rng.choice(BYTES))
    elif kind == 7:
        row = rng.choice(ROWS)
    else:
        messages = [{"role": "user", "content": "<image>"}, GOOD["messages"][1]]
        row = json.dumps({**GOOD, "messages": messages, "images": [rng.choice(PATHS)]}).encode()
    return row.replace(b"\n", b" ").replace(b"\r", b" ").strip() or b"x"


def test_fuzzed_rows(tmp_path: Path, processor: Any) -> None:
    rng = random.Random(0)
    good = json.dumps(GOOD).encode()
    rows = [good, *(fuzz(rng) for _ in range(NUM)), good]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(rows))
    data = Dataset(path, processor, max_tokens=1000, cache_bytes=0)
    assert len(data) == NUM + 2
    bad: dict[int, BadSample] = {}
    for number in range(NUM + 2):
        try:
            data.sample(number)
        except BadSample as error:
            bad[number] = error
    assert NUM * 0.8 < len(bad) < NUM
    for number, error in bad.items():
        assert error.place == data.place(number) == f"{str(path)!r}, line {number + 1}"
        assert error.reason
        assert "\n" not in str(error)
        assert len(str(error)) < 12_000
        assert pickle.loads(pickle.dumps(error)).__dict__ == error.__dict__
    assert {error.id for error in bad.values()} >= {"g", "1"}
    assert data.sample(0).tokens_T.equal(data.sample(NUM + 1).tokens_T)


@pytest.mark.parametrize("kind", ["list", "lines"])
def test_a_row_too_long_to_be_text(tmp_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(pieces, "MAX_ROW_BYTES", 200)
    rows = [json.dumps(GOOD), json.dumps({**GOOD, "id": "x" * 300})]
    path = tmp_path / "a.json"
    path.write_text(f"[{','.join(rows)}]" if kind == "list" else "\n".join(rows))
    data = Dataset(path, processor)
    assert data.sample(0).id == "g"
    with pytest.raises(
        BadSample, match=r"sample '1' of .*: it takes \d+ bytes but at most 200 are read; keep media in"
    ):
        data.sample(1)


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_flipped_bits_of_tables(tmp_path: Path, processor: Any, kind: str) -> None:
    """A file is refused as a whole, or each of its rows is a sample or a `BadSample`; nothing else happens."""
    rng, path = random.Random(1), tmp_path / f"a.{kind}"
    rows = [{**GOOD, "id": f"n{number}"} for number in range(8)]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3, compression="none")
    else:
        with tarfile.open(path, "w") as archive:
            for row in rows:
                info = tarfile.TarInfo(f"{row['id']}.json")
                data = json.dumps(row).encode()
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    whole = path.read_bytes()
    outcomes = {"refused": 0, "bad": 0, "good": 0}
    for case in range(120):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data if case % 6 else data[: rng.randrange(1, len(data))])
        try:
            dataset = Dataset(path, processor, cache_bytes=0)
        except UserError:
            outcomes["refused"] += 1
            continue
        for number in range(len(dataset)):
            try:
                dataset.sample(number)
                outcomes["good"] += 1
            except BadSample:
                outcomes["bad"] += 1
    assert min(outcomes.values()) > 0, outcomes
