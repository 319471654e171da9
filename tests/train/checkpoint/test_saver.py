"""Saves beside the loop: of what the state was when they were begun, one at a time, and every failure is told."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmfn import tree
from mmfn.parallel.mesh.layout import Mesh, distributed_mesh, single_mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.parallel.weights.sharding import local
from mmfn.train.checkpoint import Retention, Saver, disk, read, write
from tests.parallel.ranks import run_ranks
from tests.train.checkpoint.cases import LAYOUTS, attempt, check_read_on, facts_of, state_at

KIND, LAYOUT = "small", LAYOUTS["hsdp"]


def saver_of(mesh: Mesh, root: Path, **settings: Any) -> Saver:
    return Saver(root=root, world=mesh["saves"], retention=Retention(num_newest=2), **settings)


def spoil(state: Any) -> None:
    """What a donating step does to the state."""
    for leaf in tree.leaves(state):
        local(leaf).fill_(55)


@pytest.mark.parametrize("settings", [{}, {"is_asynchronous": False}, {"reads_back": True}])
def test_the_state_may_change_at_once(tmp_path: Path, settings: dict[str, bool]) -> None:
    def rank(mesh: Mesh) -> None:
        saver = saver_of(mesh, tmp_path, **settings)
        for step in (1, 2, 3):
            state = state_at(KIND, mesh, step)
            saver(state, facts_of(step))
            spoil(state)
        saver.wait()
        saver.wait()

    virtual(LAYOUT, rank)
    assert read.names(tmp_path) == ["iter_0000003", "iter_0000002"]
    for step in (2, 3):
        check_read_on(LAYOUTS["dp"], tmp_path / f"iter_000000{step}", KIND, step)


def test_buffers_are_reused(tmp_path: Path) -> None:
    one = single_mesh()
    saver, places = saver_of(one, tmp_path), []
    for step in (1, 2):
        saver(state_at(KIND, one, step), facts_of(step))
        saver.wait()
        places.append(sorted(x.data_ptr() for group in saver.memory.free.values() for x in group))
    assert places[0] == places[1]


def gated(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until it is set no file of slices is written."""
    gate, real = threading.Event(), write.write_file

    def write_file(path: Path, *rest: Any) -> None:
        gate.wait()
        real(path, *rest)

    monkeypatch.setattr(write, "write_file", write_file)
    return gate


def test_the_loop_goes_on_while_a_save_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks are back, and use their other axes, while nothing is written yet; the next save waits for the first."""
    gate = gated(monkeypatch)

    def rank(mesh: Mesh) -> None:
        saver = saver_of(mesh, tmp_path)
        saver(state_at(KIND, mesh, 1), facts_of(1))
        for _ in range(3):  # steps
            assert mesh["world"].all_reduce(state_at(KIND, mesh, 1)["step"][None], "step").shape == (1,)
        saver.wait(0.01)
        assert saver._thread is not None
        assert not read.names(tmp_path)
        if mesh["world"].index == 0:
            gate.set()
        saver(state_at(KIND, mesh, 2), facts_of(2))
        assert "iter_0000001" in read.names(tmp_path)
        saver.wait()

    virtual(LAYOUT, rank)
    assert read.names(tmp_path) == ["iter_0000002", "iter_0000001"]


@pytest.mark.parametrize("how", ["next", "wait"])
def test_a_failure_is_told_to_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Once, in one sentence; the save behind it is none the worse."""
    real = write.write_file

    def fail(path: Path, *rest: Any) -> None:
        if path.name == "rank_00002.safetensors" and "iter_0000001" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, *rest)

    monkeypatch.setattr(write, "write_file", fail)

    def rank(mesh: Mesh) -> str | None:
        told: list[bool] = []
        saver = saver_of(mesh, tmp_path, on_failure=lambda: told.append(True))
        saver(state_at(KIND, mesh, 1), facts_of(1))
        ways: dict[str, Callable[[], None]] = {
            "next": lambda: saver(state_at(KIND, mesh, 2), facts_of(2)),
            "wait": saver.wait,
        }
        said = attempt(ways[how])
        saver.wait()
        saver(state_at(KIND, mesh, 2), facts_of(2))
        saver.wait()
        assert told == [True]
        return said

    told = virtual(LAYOUT, rank)
    assert told == [told[0]] * 4
    assert "saving checkpoint iter_0000001 failed on rank 2: No space left on device (" in str(told[0])
    assert read.names(tmp_path) == ["iter_0000002"]


def test_what_the_disk_has_not_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that changes a byte: with `reads_back` the checkpoint never counts."""
    real = disk.os.pwrite

    def lie(file: int, data: memoryview, begin: int) -> int:
        return real(file, data if begin < 4096 else bytes(data[:-1]) + b"\xaa", begin)

    monkeypatch.setattr(disk.os, "pwrite", lie)
    one = single_mesh()
    saver = saver_of(one, tmp_path, reads_back=True)
    saver(state_at("moe", one, 1), facts_of(1))
    said = attempt(saver.wait)
    assert "is damaged: its bytes differ" in str(said)
    assert not read.names(tmp_path)


def real_rank(root: str) -> list[str]:
    mesh = distributed_mesh(LAYOUT)
    saver = saver_of(mesh, Path(root))
    for step in (1, 2, 3):
        state = state_at("moe", mesh, step)
        saver(state, facts_of(step))
        spoil(state)
        for _ in range(20):  # collectives of steps meanwhile
            mesh["world"].all_reduce(local(tree.leaves(state)[0]).double().sum()[None], "step")
    saver.wait()
    return read.names(Path(root))


@pytest.mark.dist
def test_real_ranks(tmp_path: Path) -> None:
    assert run_ranks(4, real_rank, str(tmp_path)) == [["iter_0000003", "iter_0000002"]] * 4
    check_read_on(LAYOUTS["odd"], tmp_path / "iter_0000003", "moe", 3)
