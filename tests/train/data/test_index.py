"""Indexes of large files: written once, by one process, found again, and never believed of a file that has changed."""

import json
import multiprocessing
import os
import pickle
import time
from pathlib import Path

import pytest

from mmfn.errors import UserError
from mmfn.train.data.sources import index, open_source


@pytest.fixture(autouse=True)
def no_file_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "SMALL_BYTES", 0)


def write(path: Path, rows: int, text: str = "x") -> Path:
    path.write_text("".join(json.dumps({"n": n, "text": text * (n % 7)}) + "\n" * (1 + n % 3) for n in range(rows)))
    return path


def numbers(source: object) -> list[int]:
    return [source.entry(i)["n"] for i in range(len(source))]  # type: ignore[attr-defined,arg-type]


def test_an_index_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", 50)
    first = open_source(path)
    monkeypatch.setattr(index, "_write", None)
    again = open_source(path)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "a.jsonl.index"]
    assert numbers(first) == numbers(again) == list(range(50))
    assert [first.place(i) for i in range(50)] == [again.place(i) for i in range(50)]
    assert first.fingerprint == again.fingerprint


@pytest.mark.parametrize("change", ["size", "time", "middle", "kind"])
def test_a_changed_file_is_indexed_anew(tmp_path: Path, change: str) -> None:
    path = write(tmp_path / "a.jsonl", 5000)
    before, stat = open_source(path), path.stat()
    text, rows = path.read_text(), list(range(5000))
    if change == "size":
        path.write_text(text + '{"n": 5000}\n')
        rows.append(5000)
    elif change == "kind":
        path.write_text("[" + ",".join(json.dumps({"n": n}) for n in rows) + "]")
    elif change == "middle":  # the same size and time
        path.write_text(text[: len(text) // 2] + text[len(text) // 2 :].replace("x", "y"))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_size == stat.st_size
    else:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    after = open_source(path)
    assert numbers(after) == rows
    assert (after.fingerprint == before.fingerprint) == (change == "time")
    if change != "middle":
        with pytest.raises(OSError, match=r"has changed since it was opened; start again: '.*a\.jsonl'"):
            before.entry(0)


def test_a_broken_index_is_not_believed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 50)
    open_source(path)
    name = tmp_path / "a.jsonl.index"
    whole = name.read_bytes()
    for broken in (b"", whole[:100], whole[:-8], b"x" * len(whole), b"[]".ljust(len(whole)), whole + b"12345678"):
        name.write_bytes(broken)
        assert numbers(open_source(path)) == list(range(50))
        assert name.read_bytes() == whole


def test_a_source_is_sent_without_its_index(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 5000)
    sent = pickle.dumps(open_source(path, tmp_path))
    assert len(sent) < 1000
    assert numbers(pickle.loads(sent)) == list(range(5000))
    write(path, 4999)
    with pytest.raises(OSError, match="has changed since it was opened"):
        pickle.loads(sent)


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", 50)

    def fail(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(index, "_publish", fail)
        with pytest.raises(
            UserError, match=r"index '.*a\.jsonl\.index' .* \(Permission denied\); set data\.index_folder"
        ):
            open_source(path)
    assert os.listdir(tmp_path) == ["a.jsonl"]
    (tmp_path / "b").mkdir()
    folder = tmp_path / "new" / "folder"
    assert numbers(open_source(path, folder)) == list(range(50))
    assert numbers(open_source(write(tmp_path / "b" / "a.jsonl", 20), folder)) == list(range(20))
    assert len(os.listdir(folder)) == 2
    assert {file.parent for file in tmp_path.rglob("*.index")} == {folder}


def _open(path: Path, seconds: float, queue: "multiprocessing.Queue[tuple[int, int]]") -> None:
    index.SMALL_BYTES = 0  # type: ignore[misc]
    written = []
    original = index._publish

    def publish(*args: object) -> None:
        written.append(1)
        time.sleep(seconds)
        original(*args)  # type: ignore[arg-type]

    index._publish = publish
    queue.put((len(open_source(path)), len(written)))


def test_of_several_processes_one_writes_and_the_others_wait(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 1000)
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[tuple[int, int]] = context.Queue()
    processes = [context.Process(target=_open, args=(path, 0.3, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    assert [rows for rows, _ in results] == [1000] * 4
    assert sum(written for _, written in results) == 1
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "a.jsonl.index"]


def test_a_writer_that_is_killed_leaves_no_lock(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 100)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_open, args=(path, 60, context.Queue()))
    process.start()
    lock = tmp_path / ".a.jsonl.index.lock"
    while not lock.exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert lock.exists()
    assert numbers(open_source(path)) == list(range(100))
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "a.jsonl.index"]


def test_a_row_is_read_in_no_time_wherever_it_is(tmp_path: Path) -> None:
    """The scaled-down form of `benchmarks/streams.py`: nothing but the index and one row is read."""
    path = tmp_path / "a.jsonl"
    row = json.dumps({"text": "x" * 980}) + "\n"
    with open(path, "w") as file:
        for _ in range(40):
            file.write(row * 1000)
    open_source(path)
    read = _bytes_read()
    source = open_source(path)
    for place in (39_999, 0, 20_000):
        source.entry(place)
    assert _bytes_read() - read < 1_000_000


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("\n")[0].split()[1])


@pytest.mark.parametrize("kind", ["beside", "cache", "read-only"])
def test_many_small_files_are_indexed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Read whole once, and never again where an index of theirs can be written; few of them have none."""
    monkeypatch.setattr(index, "SMALL_BYTES", 2**20)
    parts = [write(tmp_path / f"part-{i}.jsonl", 40) for i in range(3)]
    total = sum(part.stat().st_size for part in parts)
    cache, pattern = tmp_path / "cache" if kind == "cache" else None, tmp_path / "part-*.jsonl"
    monkeypatch.setattr(index, "MANY_BYTES", total + 1)
    few = open_source(pattern, cache)
    assert sorted(tmp_path.iterdir()) == parts
    monkeypatch.setattr(index, "MANY_BYTES", total)
    if kind == "read-only":
        monkeypatch.setattr(index, "_publish", refuse)
    many, written = open_source(pattern, cache), []
    monkeypatch.setattr(index, "_write", lambda *args, write=index._write: written.append(args) or write(*args))
    again, copy = open_source(pattern, cache), pickle.loads(pickle.dumps(many))
    assert len(written) == (2 * len(parts) if kind == "read-only" else 0)
    assert numbers(few) == numbers(many) == numbers(again) == numbers(copy) == 3 * list(range(40))
    assert len({source.fingerprint for source in (few, many, again, copy)}) == 1


def refuse(*args: object) -> None:
    raise PermissionError(13, "Permission denied")
