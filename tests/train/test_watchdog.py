"""Four ranks of which one raises, hangs, is killed or exits: all end, with one sentence that names it and one code."""

import errno
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

import mmfn
from mmfn.errors import TERMINATED
from mmfn.interop.checkpoint import read_config
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.collective import Collective, find_collective
from mmfn.parallel.mesh.launch import STORE_LOST, Ranks
from mmfn.parallel.mesh.peers import Beat, Peers, describe_hang
from mmfn.train.config.load import load_config
from tests.train.processes import (
    end_started,
    finish,
    is_halted,
    run_for_a_while,
    stall,
    stall_image,
    stalled,
    start,
    wait_for,
    wait_for_line,
)
from tests.train.rank_cases import MakeConfig

NUM = 4
MANY = ("train.steps=100000", "train.log_every=1", "data.check=first", f"layout.dp={NUM}", "checkpoint.every=2")
WITHIN_S = 120  # that all ranks end in, behind the event, on a machine with other things to do; else a few seconds


@pytest.fixture(autouse=True)
def _processes() -> Iterator[None]:
    yield
    end_started()


def check_end(ends: list[tuple[int, str, str]], code: int) -> str:
    """Check that the ranks have ended with a code and one line, which is returned; torch may say more of sockets."""
    assert [end[0] for end in ends] == [code] * len(ends), ends
    lines = [line for _, _, errors in ends for line in errors.splitlines() if line.startswith("mmfn: ")]
    assert len(lines) == 1, ends
    return lines[0]


@pytest.mark.dist
@pytest.mark.parametrize("rank", [0, 2])
def test_a_killed_rank_is_named(make_config: MakeConfig, tmp_path: Path, rank: int) -> None:
    ranks = start(NUM, "train", str(make_config({"data.eval": None})), *MANY)
    run_for_a_while(ranks[0])
    ranks[rank].kill()
    began = time.monotonic()
    others = [r for i, r in enumerate(ranks) if i != rank]
    said = check_end(finish(others), 3)
    assert time.monotonic() - began < WITHIN_S
    if rank == 0:  # with the store goes what was said in it
        assert said == f"mmfn: error: {STORE_LOST}"
    else:
        assert said.startswith(f"mmfn: error: rank {rank} ended without a word, last heard of in step ")
    assert list((tmp_path / "run" / "state").glob("iter_*"))


@pytest.mark.dist
def test_a_frozen_rank_is_named(make_config: MakeConfig, tmp_path: Path) -> None:
    ranks = start(NUM, "train", str(make_config({"data.eval": None})), *MANY, "layout.timeout_s=10")
    run_for_a_while(ranks[0])
    ranks[2].send_signal(signal.SIGSTOP)
    wait_for(lambda: is_halted(ranks[2].pid), ranks[2])
    began = time.monotonic()
    said = check_end(finish([ranks[0], ranks[1], ranks[3]]), 3)
    assert time.monotonic() - began < 10 + WITHIN_S
    assert said.startswith("mmfn: error: rank 2 hangs and does not answer, last heard of in step ")
    assert " s (layout.timeout_s is 10); stacks" in said
    assert said.endswith(f"; stacks of all ranks are in {tmp_path / 'run' / 'stacks'}")
    stacks = {path.name: path.read_text() for path in (tmp_path / "run" / "stacks").iterdir()}
    assert stacks.keys() == {f"rank_{i}.txt" for i in (0, 1, 3)}
    # of whoever has not heard of the end before: it waits for a collective, whichever it was
    assert any(re.search(r"mesh/axis\.py\", line \d+ in wait$", stack, re.M) for stack in stacks.values())


@pytest.mark.dist
def test_a_rank_whose_data_do_not_come_is_named_with_what_waits_for_it(make_config: MakeConfig, tmp_path: Path) -> None:
    path = make_config({"data.eval": None})
    fifo, reader, program = stall(path, tmp_path, 3, *MANY[:3])
    ranks = start(NUM, "train", str(path), *MANY, "layout.timeout_s=10", program=program)
    with stalled(fifo, ranks[reader]):
        said = check_end(finish(ranks), 3)
    assert said.startswith(
        f"mmfn: error: rank {reader} hangs in step 4, data: 3 others wait in all_gather 'data' over world, for 1"
    )
    stack = (tmp_path / "run" / "stacks" / f"rank_{reader}.txt").read_text()
    assert "stalling.py" in stack
    assert (tmp_path / "run" / "state" / "iter_0000002").is_dir()


@pytest.mark.dist
@pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "hangs"])
def test_an_evaluation_by_itself_is_watched_too(
    make_config: MakeConfig, small_demo: Path, tmp_path: Path, is_killed: bool
) -> None:
    model = mmfn.init(read_config(small_demo / "model"), seed=0)
    mmfn.save_hf(tmp_path / "model", model, assets=small_demo / "model")
    path = make_config({"model.path": str(tmp_path / "model"), "model.init": "load"})
    loaded = load_config(path, ())
    fifo, program = stall_image(loaded, str(loaded.config.data.eval), 0, tmp_path)
    timeout = () if is_killed else ("layout.timeout_s=10",)
    ranks = start(NUM, "eval", str(path), f"layout.dp={NUM}", *timeout, program=program)
    with stalled(fifo, ranks[0]):
        if is_killed:
            ranks[2].kill()
        ends = finish([rank for rank in ranks if not is_killed or rank is not ranks[2]])
    said = check_end(ends, 3)
    if is_killed:
        assert said.startswith("mmfn: error: rank 2 ended without a word")  # where is known when it has told once
    else:
        assert said.startswith("mmfn: error: rank 0 hangs in evaluation: 3 others wait in ")
        assert said.endswith(" s (layout.timeout_s is 10)")
    assert not (tmp_path / "run").exists()


FAULTY = """
import os, sys, threading, time
from mmfn import cli
from mmfn.train.run import loop

event, fault = sys.argv[1:3]

def end():
    while not os.path.exists(event):
        time.sleep(0.01)
    os._exit(0)

if fault == "exits" and os.environ["RANK"] == "2":
    threading.Thread(target=end, daemon=True).start()
if fault == "raises" and os.environ["RANK"] == "2":
    facts_of = loop.facts_of
    def raising(step, share):
        if step == 3:
            raise AssertionError("a fault of the program")
        return facts_of(step, share)
    loop.facts_of = raising
sys.argv[1:] = sys.argv[3:]
sys.exit(cli.entry())
"""


@pytest.mark.dist
@pytest.mark.parametrize("fault", ["exits", "raises"])
def test_a_rank_that_exits_or_raises_ends_all(make_config: MakeConfig, tmp_path: Path, fault: str) -> None:
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    program = (str(script), str(tmp_path / "event"), fault)
    ranks = start(NUM, "train", str(make_config({"data.eval": None})), *MANY, program=program)
    if fault == "exits":
        wait_for_line(ranks[0], "step=3/")
        (tmp_path / "event").touch()
        assert check_end(finish([ranks[0], ranks[1], ranks[3]]), 3).startswith("mmfn: error: rank 2 ended without a")
        return
    ends = finish(ranks)
    assert [code for code, _, _ in ends] == [1] * NUM, ends
    assert [index for index, (_, _, errors) in enumerate(ends) if "Traceback" in errors] == [2]
    assert "AssertionError: a fault of the program" in ends[2][2]


DATA = Beat(number=9, step=7, phase="data")
WAITING = replace(DATA, collective="all_gather 'data' over batch", waits_s=31.2)


def moved(beats: dict[int, Beat]) -> dict[int, Beat]:
    """The same a moment later."""
    return {rank: replace(beat, number=beat.number + 3) for rank, beat in beats.items()}


def test_the_rank_that_hangs_is_the_one_that_has_not_come() -> None:
    beats = {0: WAITING, 1: DATA, 2: WAITING}
    assert describe_hang(beats, moved(beats), 30) == (
        "rank 1 hangs in step 7, data: 2 others wait in all_gather 'data' over batch, for 31 s (layout.timeout_s is 30)"
    )
    assert describe_hang(beats, {**moved(beats), 1: DATA}, 30) == (
        "rank 1 hangs and does not answer, last heard of in step 7, data: 2 others wait in all_gather 'data' over "
        "batch, for 31 s (layout.timeout_s is 30)"
    )
    late = {0: replace(WAITING, step=8), 1: WAITING}
    assert describe_hang(late, moved(late), 30) == (
        "rank 1 hangs in step 7, data, all_gather 'data' over batch: 1 other waits in all_gather 'data' over batch, "
        "for 31 s (layout.timeout_s is 30)"
    )
    both = {0: WAITING, 1: WAITING}
    assert describe_hang(both, moved(both), 30) == (
        "ranks 0, 1 hang in step 7, data, all_gather 'data' over batch, for 31 s (layout.timeout_s is 30)"
    )


def test_a_collective_is_found_by_its_name_site_and_axis() -> None:
    found: list[Collective | None] = []

    class Looking:
        widest, name, is_traceable = torch.float64, "looking", False

        def all_reduce(self, x: torch.Tensor, site: str) -> torch.Tensor:
            found.append(find_collective())
            return x

        def wait(self, x: torch.Tensor) -> torch.Tensor:
            found.append(find_collective())
            return x

    Axis(name="ep", size=2, transport=Looking()).all_reduce(torch.ones(1), "experts")
    assert [str(one) for one in found] == ["all_reduce 'experts' over ep"] * 2
    assert found[0] is found[1]  # one call
    assert find_collective() is None


@pytest.mark.parametrize("refusal", [errno.ENOSYS, errno.EPERM])
def test_a_system_that_hands_out_no_process_leaves_the_rest_of_the_watch(
    monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    """Linux before 5.3, and containers: the thread that watches must not end, as it hears stops and hangs too."""

    def refuse(pid: int) -> int:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(os, "pidfd_open", refuse)
    store = HashStore()
    first, second = (Peers(Ranks(index=i, size=2, local=i, local_size=2, store=Cloned(store))) for i in range(2))
    for _ in range(2):
        for peers in (first, second):
            peers.beat(1, "step")
            assert peers.find_lost() is None
            assert peers.find_hang(30) is None
    second.tell_stop(TERMINATED)
    assert first.asked_to_stop() == TERMINATED


class Cloned:
    """A store in memory of which there is one, where others are connected to once more."""

    def __init__(self, store: HashStore) -> None:
        self.store = store

    def clone(self) -> HashStore:
        return self.store
