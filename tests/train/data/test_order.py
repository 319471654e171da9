"""The order of data is a function of data, settings and cursor, not of workers, ranks or interruptions; with skips."""

import functools
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmfn.batch import Sample
from mmfn.train.data import Workers, prefetch
from mmfn.train.data.cursor import COUNTS
from mmfn.train.data.sources.mixing import Epochs
from tests.train.data.order_cases import MODES, Data, joined, make_loader, run

STEPS = 300
ROOT = Path(__file__).parents[3]


@functools.cache
def expected(mode: str) -> list[dict[str, Any]]:
    """On one rank, without workers."""
    steps, state = run(mode, STEPS)
    assert state["step"] == len(steps) == STEPS
    return steps


@pytest.mark.parametrize("mode", MODES)
def test_there_is_something_of_everything(mode: str) -> None:
    steps = expected(mode)
    kinds = {kind for step in steps for skip in step["skips"] for kind in re.findall("kind='(.*?)'", skip)}
    reasons = {r for step in steps for skip in step["skips"] for r in re.findall("(missing|early|learn|bucket)", skip)}
    assert kinds == {"bad", "too_long"}
    assert reasons == {"missing", "early", "learn", "bucket"}
    assert sum(step["counts"][3] for step in steps) > 10  # cut
    digests = [one for step in steps for one in step["own"]]  # a few micro-batches hold nothing
    assert len(set(digests)) > 0.95 * len(digests) > 900


@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("mode", MODES)
def test_any_number_of_workers(mode: str, number: int) -> None:
    assert run(mode, STEPS, workers=Workers(number=number, ahead=3))[0] == expected(mode)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_any_number_of_ranks(mode: str, ranks: int) -> None:
    assert run(mode, STEPS, ranks=ranks, workers=Workers(number=1))[0] == expected(mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_run_interrupted_at_thirty_steps(mode: str) -> None:
    """Each time another number of ranks and workers goes on, with nothing but the state of the one before."""
    draw = random.Random(7)
    stops = sorted(draw.sample(range(1, STEPS), 30))
    steps: list[dict[str, Any]] = []
    state: Any = None
    for stop in [*stops, STEPS]:
        workers = Workers(number=draw.choice([0, 1, 4]), ahead=draw.choice([1, 3, 9]))
        part, state = run(mode, stop, ranks=draw.choice([1, 2, 4]), workers=workers, state=state)
        steps += part
    assert steps == expected(mode)
    assert all(type(value) in (int, str) for value in state.values())


def test_worker_processes() -> None:
    for mode in MODES:
        found, _ = run(mode, 40, workers=Workers(number=2, ahead=4, kind="processes"))
        assert found == expected(mode)[:40]


def test_worker_processes_end_with_the_steps() -> None:
    """When the loop is left in the middle, and when a step fails: then with the worker's traceback."""
    workers = Workers(number=2, ahead=4, kind="processes")
    steps = make_loader("samples", workers=workers).steps(STEPS)
    next(steps)
    assert len(multiprocessing.active_children()) == 2
    steps.close()
    assert not multiprocessing.active_children()
    failing = make_loader("samples", workers=workers, long_samples="stop").steps(STEPS)
    with pytest.raises(ValueError, match="but the largest bucket holds 64") as error:
        list(failing)
    assert "in _take" in error.value.__notes__[0]
    assert not multiprocessing.active_children()


def test_a_worker_process_that_is_still_starting_ends_with_the_steps() -> None:
    """Torch waits for it for ten seconds and goes. What is meant for the run does not end it before."""
    workers = Workers(number=2, ahead=4, kind="processes")
    steps = make_loader("samples", workers=workers, dataset=SlowToArrive()).steps(STEPS)
    next(steps)
    children = multiprocessing.active_children()
    for child in children:
        os.kill(child.pid, signal.SIGTERM)
        child.join(1)
        assert child.is_alive()
    assert len(children) == 2
    steps.close()
    assert not multiprocessing.active_children()


class SlowToArrive(Data):
    """Data that the second process to which they are sent does not have for a minute."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    def __getstate__(self) -> dict[str, Any]:
        self.sent += 1  # the first time to see that they can be sent
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        time.sleep(60 if self.sent > 2 else 0)


def double(job: int) -> int:
    return 2 * job


def double_or_wait(come: Path, job: int) -> int:
    while job == 3 and not come.exists():
        time.sleep(0.01)
    return 2 * job


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_jobs_are_taken_at_the_same_moments_with_any_worker(kind: Any, tmp_path: Path) -> None:
    """Whether or not what is waited for comes: taking a job may be a collective."""
    taken: list[int] = []

    def jobs() -> Iterator[int]:
        for job in itertools.count():
            taken.append(job)
            yield job

    num_taken: list[int] = []
    make = functools.partial(double_or_wait, tmp_path / "come")
    workers = Workers(number=2, ahead=4, kind=kind)
    for result in prefetch(make, jobs(), workers, lambda: len(num_taken) < 3):
        assert result == 2 * len(num_taken)
        num_taken.append(len(taken))
    (tmp_path / "come").touch()
    assert num_taken == [5, 6, 7]
    assert len(taken) == 8  # for the result that has not come, as for one that has


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_workers_end_with_the_jobs(kind: Any) -> None:
    """Be they fewer than are taken early; an error of theirs is raised when a job is taken, ahead of results."""
    workers = Workers(number=1, ahead=4, kind=kind)
    for number in (3, 7):
        assert list(prefetch(double, range(number), workers)) == [2 * job for job in range(number)]

    def jobs(number: int) -> Iterator[int]:
        yield from range(number)
        raise OSError("no more can be read")

    for number, expected in ((2, []), (6, [0, 2])):
        results: list[int] = []
        with pytest.raises(OSError, match="no more can be read"):
            results.extend(prefetch(double, jobs(number), workers))
        assert results == expected
        assert not multiprocessing.active_children()


def test_data_that_no_process_can_be_sent_are_refused() -> None:
    loader = make_loader("samples", workers=Workers(number=1, kind="processes"), dataset=Unsendable())
    with pytest.raises(ValueError, match=r"data.worker_kind 'processes' cannot send the data to one .*; use threads"):
        next(loader.steps(1))


class Unsendable(Data):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.dist
@pytest.mark.parametrize("mode", MODES)
def test_ranks_of_gloo(mode: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "tests.train.data.order_cases", mode, str(STEPS), "2"]
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    found = [json.loads(rank.communicate(timeout=600)[0]) for rank in ranks]
    assert joined(found) == expected(mode)


def test_later_windows_are_measured_by_workers() -> None:
    """So that no step waits for them: the caller measures the first window, and nothing that a job can bring along."""
    threads: Counter[bool] = Counter()

    class Watched(Data):
        def measure(self, index: int) -> Any:
            threads[threading.current_thread().name.startswith("mmfn-data")] += 1
            return super().measure(index)

    loader = make_loader("tokens", dataset=Watched(), workers=Workers(number=1, ahead=2))
    first = threads[False]
    steps = loader.steps(60)
    next(steps)
    assert first == 97
    planned = threads[False]
    list(steps)
    assert threads[False] == planned <= 2 * first
    assert threads[True] > 500


def test_a_cursor_costs_the_same_anywhere() -> None:
    """It reads the samples of its window and step, and no others."""
    asked: list[int] = []

    class Counted(Data):
        def measure(self, index: int) -> Any:
            asked.append(index)
            return super().measure(index)

    numbers = {}
    for place in (0, 10**9):
        loader = make_loader("tokens", dataset=Counted())
        state = {**loader.state(loader.resume(loader.state(next(loader.steps(1)).cursor))), "place": place}
        asked.clear()
        next(make_loader("tokens", dataset=Counted()).steps(state["step"] + 1, loader.resume(state)))
        numbers[place] = len(asked)
    assert abs(numbers[0] - numbers[10**9]) < 100
    assert max(numbers.values()) < 700


class Reordered(Data):
    """Of other weights, as it were."""

    def order(self, seed: int) -> Epochs:
        return Epochs(self.size, seed + 1)


class Shorter(Data):
    """One sample of another size; not that of the mean."""

    def _sample(self, index: int, num_tokens: int) -> Sample:
        return super()._sample(index, num_tokens - 1 if index == 13 else num_tokens)


@pytest.mark.parametrize(
    ("mode", "change", "expected_error"),
    [
        ("samples", {"seed": 4}, "the cursor is of a run with seed 3 but this one has 4; resume with the same data"),
        ("samples", {"batch_samples": 8}, "with batch_samples 6 but this one has 8"),
        ("samples", {"dataset": Data(96)}, "with samples 97 but this one has 96"),
        ("samples", {"dataset": Reordered()}, "with order '.*' but this one has '.*'; resume with the same"),
        ("tokens", {"dataset": Shorter()}, "with sizes '.*' but this one has '.*'; resume with the same"),
        ("tokens", {"batch_tokens": 512}, "with batch_tokens 256 but this one has 512"),
        ("tokens", {"window_samples": 50}, "with window_samples .* but this one has 50"),
        ("tokens", {"long_samples": "skip"}, "with long_samples 'cut' but this one has 'skip'"),
        ("tokens", {"token_buckets": [128]}, "with samples_per_microbatch|largest_buckets"),
    ],
)
def test_a_cursor_of_another_run_is_refused(mode: str, change: dict[str, Any], expected_error: str) -> None:
    _, state = run(mode, 2)
    with pytest.raises(ValueError, match=expected_error):
        make_loader(mode, **change).resume(state)


def test_a_cursor_that_is_damaged_is_refused() -> None:
    loader = make_loader("samples")
    state = loader.state(next(loader.steps(1)).cursor)
    assert {name: state[name] for name in COUNTS} == {
        "step": 1,
        "place": 6,
        "window_step": 0,
        "seen": 6,
        "bad": state["bad"],
    }
    for name in COUNTS:
        with pytest.raises(ValueError, match=f"{name} of the cursor is .* but must count from 0"):
            loader.resume({**state, name: -1})
    with pytest.raises(ValueError, match="the cursor lacks 'place'"):
        loader.resume({name: value for name, value in state.items() if name != "place"})
