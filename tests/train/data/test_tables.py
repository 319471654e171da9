"""Parquet files, tar files and saved data sets hold the samples that JSONL and files of images hold."""

import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mmfn.errors import UserError
from mmfn.train.data import Dataset
from mmfn.train.data.bad import BadSample
from mmfn.train.data.sources import open_source, parquet

NUM = 7


def picture(index: int) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((16 + 8 * index, 24), 60).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [picture(i) for i in range(NUM)]


def entry(index: int, **media: Any) -> dict[str, Any]:
    asked: list[dict[str, Any]] = [{"type": "image"}, {"type": "text", "text": f"What is {index}?"}]  # tables add nulls
    messages = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": [{"type": "text", "text": f"It is {index}."}]},
    ]
    return {"id": f"n{index}", "messages": messages, **media}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    lines = []
    for index, data in enumerate(PICTURES):
        (tmp_path / f"{index}.png").write_bytes(data)
        lines.append(json.dumps(entry(index, images=[f"{index}.png"])))
    (tmp_path / "plain.jsonl").write_text("\n".join(lines))
    return tmp_path


def add(archive: tarfile.TarFile, name: str, data: bytes, kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data) if kind == tarfile.REGTYPE else 0, kind, link
    archive.addfile(info, io.BytesIO(data))


def write_tar(path: Path, indices: range, form: int = tarfile.PAX_FORMAT, prefix: str = "") -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for index in indices:
            name = ("png", f"{index}.png", f"{prefix}{index}.png")[index % 3]
            add(archive, f"{prefix}{index}.json", json.dumps(entry(index, image=name)).encode())
            add(archive, f"{prefix}{index}.png", PICTURES[index])
    return path


def rows(kind: str) -> list[dict[str, Any]]:
    cells: dict[str, Any] = {
        "structs": lambda i: {"images": [{"bytes": PICTURES[i], "path": None}]},
        "named": lambda i: {"images": [{"bytes": PICTURES[i], "path": "/home/x/a.png"}]},
        "paths": lambda i: {"images": [{"bytes": None, "path": f"{i}.png"}]},
        "binary": lambda i: {"image": PICTURES[i]},
        "list": lambda i: {"images": [PICTURES[i]], "videos": None},
    }
    return [entry(i, **cells[kind](i)) for i in range(NUM)]


def write(folder: Path, kind: str) -> Path:
    if kind == "tar":
        return write_tar(folder / "a.tar", range(NUM))
    if kind == "gnu":
        return write_tar(folder / "a.tar", range(NUM), tarfile.GNU_FORMAT, "./" + "d" * 120 + "/")
    if kind == "shards":
        for shard in range(3):
            write_tar(folder / f"s-{shard:03d}.tar", range(3 * shard, min(3 * shard + 3, NUM)), prefix="ä/")
        return folder / "s-{000..002}.tar"
    form, _, cells = kind.partition("-")
    if form == "saved":
        datasets.Dataset.from_list(rows(cells)).save_to_disk(str(folder / "saved"))
        return folder / "saved"
    table = pa.Table.from_pylist(rows(cells))
    if form == "folder":
        (folder / "many").mkdir()
        for part in range(3):
            pq.write_table(table.slice(3 * part, 3), folder / "many" / f"{part}.parquet", row_group_size=2)
        return folder / "many"
    pq.write_table(table, folder / "a.parquet", row_group_size=2)
    return folder / "a.parquet"


KINDS = ["tar", "gnu", "shards", "saved-structs", "saved-list", "folder-structs"]
KINDS += [f"parquet-{cells}" for cells in ("structs", "named", "paths", "binary", "list")]


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_of_jsonl(plain: Path, processor: Any, kind: str) -> None:
    expected = Dataset(plain / "plain.jsonl", processor)
    data = Dataset(write(plain, kind), processor, media_root=plain, cache_bytes=0)
    assert len(data) == NUM
    for index in (*range(NUM), 3, 0, -1):
        one, two = data.sample(index), expected.sample(index)
        assert one.id == two.id
        assert torch.equal(one.tokens_T, two.tokens_T)
        assert torch.equal(one.images[0].inputs_UF, two.images[0].inputs_UF)
    places = {data.place(index) for index in range(NUM)}
    assert len(places) == NUM
    sent = pickle.dumps(data)
    assert len(sent) < 200_000
    assert torch.equal(pickle.loads(sent).sample(3).tokens_T, expected.sample(3).tokens_T)
    (plain / "again").mkdir()
    if not kind.startswith("saved"):  # the library writes a random number with each
        assert open_source(write(plain / "again", kind)).fingerprint == data.fingerprints[0]


def test_images_of_the_library_are_read_without_decoding(plain: Path, processor: Any) -> None:
    table = datasets.Dataset.from_list(rows("structs")).cast_column("images", datasets.List(datasets.Image()))
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(plain / "dict"))
    assert open_source(plain / "dict" / "train").medium(2, "images/0") == PICTURES[2]
    assert Dataset(plain / "dict" / "test", processor).sample(2).images[0].grid[0] == 1
    with pytest.raises(UserError, match=r"holds splits; name one of \['test', 'train'\], as .*dict/train"):
        open_source(plain / "dict")


def test_row_groups_are_read_once_and_few_are_held(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(write(plain, "parquet-binary"))
    read: list[int] = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, n, **kw: read.append(n) or original(self, n, **kw)
    )
    for index in (0, 1, 0, 2, 3, 1):
        source.entry(index)
        source.medium(index, "image")
    assert read == [0, 1]
    monkeypatch.setattr(parquet, "GROUPS", 1)
    for index in (6, 0, 6):
        source.entry(index)
    assert read == [0, 1, 3, 0, 3]


def test_a_table_that_changes_is_noticed(plain: Path) -> None:
    path = write(plain, "parquet-binary")
    source = open_source(path)
    assert source.entry(0)["id"] == "n0"
    pq.write_table(pa.Table.from_pylist(rows("list")), path)
    assert source.entry(1)["id"] == "n1"  # of the same row group
    with pytest.raises(OSError, match=r"has changed since it was opened; start again: '.*a\.parquet'"):
        source.entry(5)


def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, processor: Any) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for index, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)):
            add(archive, f"{index}.json", json.dumps(entry(index, image="png")).encode())
            add(archive, f"{index}.png", b"", kind, "/etc/hostname")
        add(archive, "d", b"", tarfile.DIRTYPE)
        add(archive, "x.json", b"", tarfile.SYMTYPE, "/etc/hostname")
        add(archive, "y.png", b"")
        add(archive, "z.json", json.dumps(entry(9, image="../a.png")).encode())
    data = Dataset(tmp_path / "a.tar", processor)
    assert len(data) == 7
    for index in range(4):
        with pytest.raises(
            BadSample, match=rf"sample 'n{index}' of .*sample '{index}': member 'png' is a link or no regular"
        ):
            data.sample(index)
    for index, reason in (
        (4, "is a link or no regular file"),
        (5, r"has 0 members \.json"),
        (6, "leaves the media root"),
    ):
        with pytest.raises(BadSample, match=reason):
            data.sample(index)


def test_a_tar_that_is_cut_off_or_broken_is_refused(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", range(3)).read_bytes()
    inside = whole.index(PICTURES[2]) + 100
    header = whole.index(b"2.json")
    cases = {
        "cut off in '2.png'": whole[:inside],
        "bad header at byte": whole[:header] + b"\xff" + whole[header + 1 :],
        "give an uncompressed one": b"x" * 10_000,
    }
    for sentence, data in cases.items():
        (tmp_path / "b.tar").write_bytes(data)
        with pytest.raises(UserError, match=sentence):
            open_source(tmp_path / "b.tar")


@pytest.mark.parametrize(
    ("column", "sentence"),
    [
        (
            {"date": [__import__("datetime").date(2026, 1, 1)]},
            "'date' holds datetime.date.* of type date; store it as text",
        ),
        ({"x": [float("nan")]}, "'x' holds nan, which is no JSON number"),
        ({"image": [{"bytes": None, "path": None}]}, "'image' has neither bytes nor a path"),
    ],
)
def test_values_that_json_does_not_know(tmp_path: Path, processor: Any, column: dict[str, Any], sentence: str) -> None:
    pq.write_table(pa.table({"instruction": ["a"], "output": ["b"], **column}), tmp_path / "a.parquet")
    with pytest.raises(BadSample, match=rf"sample '0' of .*a\.parquet', row 0: {sentence}"):
        Dataset(tmp_path / "a.parquet", processor).sample(0)


def test_files_that_are_no_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8bxx")
    (tmp_path / "a.parquet").write_bytes(b"PAR1xx")
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.jsonl").write_text("{}")
    (tmp_path / "mixed" / "b.json").write_text("[{}]")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"b": [1]}), tmp_path / "2.parquet")
    cases = {
        "a.jsonl.gz": "is packed with gzip; unpack it first",
        "a.parquet": "cannot be read as parquet",
        "empty": r"is a folder that holds no file that ends in \.jsonl, \.json, \.parquet, \.tar; name the files",
        "mixed": "is a folder that holds JSON and JSONL files; name the files",
        "no-*.tar": "no file fits",
        "no-{0..2}.tar": r"no-0\.tar.*cannot be read|cannot be read",
        "[12].parquet": "has columns ..b.. but .* ..a..; open them apart",
        "{0..1000000}.tar": "counts more than 100000 files",
    }
    for name, sentence in cases.items():
        with pytest.raises(UserError, match=sentence):
            open_source(tmp_path / name)
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 10)
    with pytest.raises(UserError, match=r"has a row group of \d+ bytes but at most 10 .*row_group_size"):
        open_source(tmp_path / "1.parquet")


@pytest.mark.parametrize(("name", "extra"), [("pyarrow.parquet", "parquet"), ("datasets", "datasets")])
def test_what_is_missing_is_named(plain: Path, monkeypatch: pytest.MonkeyPatch, name: str, extra: str) -> None:
    path = write(plain, "parquet-list" if extra == "parquet" else "saved-list")
    monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(UserError, match=rf"pip install mmfn\[{extra}\]"):
        open_source(path)


def test_jsonl_files_of_a_folder_are_one_data_set(tmp_path: Path) -> None:
    for part in range(3):
        lines = [json.dumps({"a": [part, row]}) for row in range(part + 1)]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines))
    for path in (tmp_path, tmp_path / "*.jsonl", tmp_path / "{0,1,2}.jsonl", tmp_path / "{0..2}.jsonl"):
        source = open_source(path)
        assert [source.entry(i)["a"] for i in range(len(source))] == [[0, 0], [1, 0], [1, 1], [2, 0], [2, 1], [2, 2]]
        assert source.place(4) == f"{str(tmp_path / '2.jsonl')!r}, line 2"
    assert sorted(os.listdir(tmp_path)) == ["0.jsonl", "1.jsonl", "2.jsonl"]  # no index of small files
