"""Kills, errors of one rank, full disks and folders that may not be written: nothing half-written ever has a name."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.layout import Mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.train.checkpoint import Retention, disk, newest, read, remove_old, save, write
from mmfn.train.checkpoint.format import LATEST
from tests.train.checkpoint.cases import LAYOUTS, attempt, check_read_on, facts_of, save_on, state_at

ROOT = Path(__file__).parents[3]
ALONE = Axis(name="world")
KIND, LAYOUT = "small", LAYOUTS["hsdp"]


def kill(folder: Path, number: int, seed: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.train.checkpoint.kills", str(folder), str(number), str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_kills(tmp_path: Path) -> None:
    """Behind each, the newest is whole, of one step, no older than what was acknowledged; nothing else has a name."""
    found = kill(tmp_path, 40, seed=1)
    assert len(found["steps"]) == 40
    assert found["steps"] == sorted(found["steps"])
    assert found["leftovers"] > 10, "kills fell into saves"
    assert found["hidden"] == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_more_kills(tmp_path: Path, seed: int) -> None:
    found = kill(tmp_path, 120, seed=100 + seed)
    assert len(found["steps"]) == 120
    assert found["hidden"] == []


def saying(layout: Any, work: Callable[[Mesh], Any]) -> list[str | None]:
    """What every rank is told."""
    return virtual(layout, lambda mesh: attempt(lambda: work(mesh)))


@pytest.mark.parametrize("bad_rank", range(4))
def test_an_error_of_one_rank_is_told_to_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad_rank: int) -> None:
    save_on(LAYOUT, tmp_path, KIND, 1)
    real = write.write_file

    def fail(path: Path, *rest: Any) -> None:
        real(path, *rest)
        if path.name == f"rank_{bad_rank:05d}.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(write, "write_file", fail)
    told = saying(LAYOUT, lambda mesh: save(tmp_path, state_at(KIND, mesh, 2), facts_of(2), mesh["world"]))
    assert len(set(told)) == 1
    assert told[0] is not None
    assert f"saving checkpoint iter_0000002 failed on rank {bad_rank}: No space left on device (" in told[0]
    assert sorted(os.listdir(tmp_path)) == ["iter_0000001", LATEST]
    monkeypatch.undo()
    save_on(LAYOUT, tmp_path, KIND, 2)
    check_read_on(LAYOUT, tmp_path / "iter_0000002", KIND, 2)


@pytest.mark.parametrize("call", ["mkdir", "posix_fallocate", "fsync", "rename", "pwrite"])
def test_every_call_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    save_on(LAYOUT, tmp_path, KIND, 1)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(disk.os, call, fail)
    told = saying(LAYOUT, lambda mesh: save(tmp_path, state_at(KIND, mesh, 2), facts_of(2), mesh["world"]))
    monkeypatch.undo()
    assert len(set(told)) == 1
    assert told[0] is not None
    assert "Input/output error" in told[0]
    assert sorted(os.listdir(tmp_path)) == ["iter_0000001", LATEST]


def test_the_tracker_is_no_authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it cannot be written the checkpoint is whole, is found, and the sentence says so."""
    save_on(LAYOUT, tmp_path, KIND, 1)

    def fail(*args: Any) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(disk.os, "replace", fail)
    told = saying(LAYOUT, lambda mesh: save(tmp_path, state_at(KIND, mesh, 2), facts_of(2), mesh["world"]))
    monkeypatch.undo()
    assert told[0] is not None
    assert "it is whole, but" in told[0]
    assert (tmp_path / LATEST).read_text() == "1\n"
    search = newest(tmp_path, ALONE, is_thorough=True)
    assert search.checkpoint is not None
    assert search.checkpoint.manifest.facts.step == 2
    assert search.skipped == []


def test_ranks_that_differ_save_nothing(tmp_path: Path) -> None:
    def counters(mesh: Mesh) -> Path:
        state = state_at(KIND, mesh, 1)
        state["guard"]["skipped"].add_(mesh["world"].index == 2)
        return save(tmp_path, state, facts_of(1), mesh["world"])

    told = saying(LAYOUT, counters)
    assert told == [told[0]] * 4
    assert "rank 2: its guard/skipped differs from rank 0's but is no shard" in str(told[0])

    def leaves(mesh: Mesh) -> Path:
        state = state_at(KIND, mesh, 1)
        if mesh["world"].index == 3:
            del state["step"]
        return save(tmp_path, state, facts_of(1), mesh["world"])

    assert "rank 3: its state has other leaves" in str(saying(LAYOUT, leaves)[1])
    assert os.listdir(tmp_path) == []


def test_a_save_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    """Its hidden folder is locked; one that nobody locks, and what is not a folder of a save, tell themselves."""
    save_on(LAYOUT, tmp_path, KIND, 1)
    living, dead = (tmp_path / f".iter_0000009.writing-{letter * 32}" for letter in "ab")
    deleted, strange = tmp_path / ".iter_0000001.deleting", tmp_path / ".iter_0000009.mine"
    for folder in (living, dead, deleted, strange):
        folder.mkdir()
        (folder / "rank_00000.safetensors").touch()
    lock = os.open(living, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    save_on(LAYOUT, tmp_path, KIND, 2)
    assert (living / "rank_00000.safetensors").exists()
    assert strange.exists()
    assert not dead.exists()
    assert not deleted.exists()
    os.close(lock)
    save_on(LAYOUT, tmp_path, KIND, 3)
    assert not living.exists()


def test_files_are_durable_before_they_have_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the rename every file, and then the folder, is synced behind its last write; behind it the parent is."""
    order: list[tuple[str, str]] = []
    real = {name: getattr(os, name) for name in ("fsync", "pwrite", "rename", "replace")}

    def by_number(name: str) -> Callable[..., Any]:
        def call(file: int, *rest: Any) -> Any:
            order.append((name, os.path.basename(os.readlink(f"/proc/self/fd/{file}"))))
            return real[name](file, *rest)

        return call

    def by_path(name: str) -> Callable[..., Any]:
        def call(old: Path, new: Path) -> Any:
            order.append((name, new.name))
            return real[name](old, new)

        return call

    for name in ("fsync", "pwrite"):
        monkeypatch.setattr(os, name, by_number(name))
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, by_path(name))
    save_on(LAYOUT, tmp_path, KIND, 1)
    monkeypatch.undo()
    publish, tracker = order.index(("rename", "iter_0000001")), order.index(("replace", LATEST))
    written = {name for call, name in order[:publish] if call == "pwrite"}
    assert len(written) == 5
    for name in written:
        last = max(i for i, event in enumerate(order[:publish]) if event == ("pwrite", name))
        assert ("fsync", name) in order[last:publish]
    synced = [name for call, name in order[:publish] if call == "fsync"]
    assert synced[-1].startswith(".iter_0000001.writing-")
    assert order[publish + 1] == ("fsync", tmp_path.name)
    assert order[tracker - 1] == ("fsync", f".{LATEST}.writing")
    assert order[tracker + 1 :] == [("fsync", tmp_path.name)]


def test_old_ones_are_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10_000_001):
        save_on(LAYOUT, tmp_path, KIND, step)
    (tmp_path / "iter_0000003" / "manifest.msgpack").unlink()
    assert remove_old(tmp_path, Retention(num_newest=2), ALONE) == ["iter_0000001"]
    assert read.names(tmp_path) == ["iter_10000001", "iter_0000003", "iter_0000002"]
    assert "at least 1" in str(attempt(lambda: Retention(num_newest=0)))
