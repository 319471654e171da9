"""Joining ranks, where they compute, and who speaks when one fails; plain values between ranks."""

import importlib
import os
import subprocess
import sys
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from mmfn.errors import LOST
from mmfn.parallel.mesh import launch
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.host_values import gather_values, wait_for_all
from mmfn.parallel.mesh.launch import Ranks
from mmfn.parallel.mesh.layout import Layout, Mesh
from mmfn.parallel.mesh.virtual import run_virtual


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in launch.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_one_process_needs_no_environment(clean: pytest.MonkeyPatch) -> None:
    assert launch.join() == Ranks()
    clean.setenv("WORLD_SIZE", "8")  # what clusters set for every process is no launcher
    clean.setenv("RANK", "3")
    assert launch.join() == Ranks()


def test_a_launcher_of_one_rank_is_one_process(clean: pytest.MonkeyPatch) -> None:
    for name, value in zip(launch.VARIABLES, ("0", "1", "0", "nowhere", "1"), strict=True):
        clean.setenv(name, value)
    assert launch.join() == Ranks()


def test_incomplete_environment_is_refused(clean: pytest.MonkeyPatch) -> None:
    clean.setenv("LOCAL_RANK", "0")
    clean.setenv("RANK", "0")
    with pytest.raises(ValueError, match=r"LOCAL_RANK is set but WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not; start"):
        launch.join()


def test_layout_must_fit_the_ranks() -> None:
    layout = Layout(dp=2, cp=2)
    launch.check_layout(layout, Ranks(size=4), "mmfn train a.yaml")
    launch.check_layout(Layout(), Ranks(), "mmfn train a.yaml")
    expected = "layout dp 2, cp 2 needs 4 ranks but this is one process; start it with torchrun --nproc-per-node 4 -m "
    with pytest.raises(ValueError, match=f"{expected}mmfn train a.yaml"):
        launch.check_layout(layout, Ranks(), "mmfn train a.yaml")
    with pytest.raises(ValueError, match=r"layout dp 2, cp 2: .* = 4 but there are 3 ranks; .* start 4 ranks"):
        launch.check_layout(layout, Ranks(size=3), "mmfn train a.yaml")


def test_one_process_is_placed_without_a_process_group() -> None:
    with launch.placed(Ranks(), Layout(), torch.device("cpu"), 1.0) as place:
        assert place.is_first
        assert place.mesh["world"] == Axis(name="world")
        assert not torch.distributed.is_initialized()


def test_several_ranks_need_a_device_with_a_backend() -> None:
    ranks = Ranks(size=2, store=HashStore())
    with (
        pytest.raises(
            ValueError, match=r"model.device 'mps' cannot be used by several ranks; use one of cpu, cuda, npu"
        ),
        launch.placed(ranks, Layout(dp=2), torch.device("mps"), 1.0),
    ):
        pass


def test_only_the_first_failing_rank_speaks_and_all_have_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "GRACE_S", 0.1)
    store = HashStore()
    assert [Ranks(index=i, size=3, store=store).fail(7 + i) for i in (2, 0, 1)] == [None, 9, 9]
    assert Ranks(index=2, size=3, store=store).fail(2) == 9  # another thread of the first one
    assert store.add("told", 0) == 3  # every rank counts once
    assert Ranks().fail(1) is None

    class Gone:
        def add(self, key: str, amount: int) -> int:
            raise RuntimeError("Connection reset by peer")

    gone: Any = Gone()
    for index, speaks in ((0, False), (1, True), (2, True), (3, False)):  # of two machines with two ranks
        assert Ranks(index=index, size=4, local=index % 2, local_size=2, store=gone).fail(1) == LOST
        assert capsys.readouterr().err == (f"mmfn: error: {launch.STORE_LOST}\n" if speaks else "")


def test_the_first_rank_waits_for_no_rank_that_is_gone() -> None:
    store = HashStore()
    assert Ranks(size=2, store=store).fail(2) is None
    launch.count_told(store, 1)
    launch.count_told(store, 1)
    assert store.add("told", 0) == 2


def test_several_ranks_print_errors_of_torch_only(clean: pytest.MonkeyPatch) -> None:
    store = HashStore()
    module = importlib.import_module("torch.distributed.rendezvous")  # a function of that name hides it
    clean.setattr(module, "rendezvous", lambda *args, **settings: iter([(store, 1, 2)]))
    for name, value in zip(launch.VARIABLES, ("1", "2", "1", "nowhere", "1"), strict=True):
        clean.setenv(name, value)
    for level, expected in ((None, "ERROR"), ("INFO", "INFO")):
        clean.setenv(launch.LOG_LEVEL, level or "")
        if level is None:
            clean.delenv(launch.LOG_LEVEL)
        assert launch.join() == Ranks(index=1, size=2, local=1, local_size=2, store=store)
        assert os.environ[launch.LOG_LEVEL] == expected


LEAVE = """
import atexit, os, sys
from torch.distributed import HashStore
from mmfn.parallel.mesh.launch import Ranks

atexit.register(os.abort)
sys.stdout.write("said")
Ranks(size=2, store=HashStore()).leave(2)
"""


def test_a_rank_that_failed_ends_at_once() -> None:
    """What Python does last is left out, so that no thread of a process group meets it; what was said is written."""
    done = subprocess.run([sys.executable, "-c", LEAVE], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (2, "said", "")
    assert Ranks().leave(2) == 2


def test_lost_ranks_are_recognised_by_what_torch_says() -> None:
    store = HashStore()
    store.set_timeout(timedelta(milliseconds=10))
    with pytest.raises(RuntimeError) as caught:
        store.get("never set")
    assert launch.is_lost(caught.value)
    assert launch.is_lost(RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:23430"))
    assert not launch.is_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not launch.is_lost(ValueError("timeout must be positive"))


def test_values_of_all_ranks_reach_all_of_them() -> None:
    values = [{"text": "ü" * 3, "loss": 0.1}, [], [1, None, "a"]]

    def run(mesh: Mesh) -> list[Any]:
        wait_for_all(mesh["world"], "ready")
        return gather_values(values[mesh["world"].index], mesh["world"], "answers")

    world = run_virtual(Layout(dp=3), run)
    assert world.results == [values] * 3
    assert [(call.name, call.site) for call in world.calls[0]] == [
        ("all_reduce", "ready"),
        ("all_gather", "answers"),
        ("all_gather", "answers"),
    ]
    assert gather_values(values, Axis(name="world"), "answers") == [values]
