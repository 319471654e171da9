"""What a run is asked for on its way: heard once, agreed by all ranks, done behind one step."""

import errno
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from mmfn.errors import INTERRUPTED, TERMINATED, Stop, UserError
from mmfn.parallel.mesh.axis import Axis
from mmfn.train.build.run import Run, prepare
from mmfn.train.checkpoint import saver, write
from mmfn.train.config.load import load_config
from mmfn.train.data import Workers, prefetch
from mmfn.train.data.cursor import Cursor
from mmfn.train.run import loop, stop
from mmfn.train.run.keeper import Keeper
from mmfn.train.run.on_demand import OnDemand
from mmfn.train.run.stop import Requests
from mmfn.train.watch import SAVE, Watch
from tests.train.rank_cases import SMALL, MakeConfig
from tests.train.test_ranks import on_ranks


def test_a_stop_stays_and_a_save_is_answered() -> None:
    watch = Watch()
    assert (watch.asked, watch.is_stopping) == (0, False)
    watch.ask(SAVE)
    assert (watch.asked, watch.is_stopping) == (SAVE, False)
    watch.answer()
    assert watch.asked == 0
    for what in (TERMINATED, SAVE, INTERRUPTED):
        watch.ask(what)
    watch.answer()
    assert (watch.asked, watch.is_stopping) == (TERMINATED, True)


def test_a_second_signal_is_one_that_comes_later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = [100.0]
    monkeypatch.setattr(stop.time, "monotonic", lambda: now[0])
    (tmp_path / "stop").touch()  # of an earlier run
    requests = Requests(Watch(), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert not requests.hear(signal.SIGUSR1)
    assert requests.watch.asked == SAVE
    assert not requests.hear(signal.SIGINT)
    now[0] += stop.SECOND_S - 0.1
    assert not requests.hear(signal.SIGINT)  # passed on by a launcher
    now[0] += 1
    assert not requests.hear(signal.SIGUSR1)
    assert requests.hear(signal.SIGTERM)


def test_a_file_counts_once(tmp_path: Path) -> None:
    requests = Requests(Watch(), tmp_path)
    (tmp_path / "save").touch()
    requests.look()
    assert requests.watch.asked == SAVE
    requests.watch.answer()
    requests.look()
    assert (requests.watch.asked, list(tmp_path.iterdir())) == (0, [])
    (tmp_path / "stop").touch()
    requests.look()
    assert requests.watch.asked == TERMINATED
    Requests(Watch(), None).look()  # of the other ranks


def test_a_file_in_a_folder_of_somebody_else_is_theirs(tmp_path: Path) -> None:
    """As `output.path` may be by a slip; the run is refused a moment later."""
    for name in ("thesis.tex", "save"):
        (tmp_path / name).write_text("mine")
    requests = Requests(Watch(), tmp_path)
    requests.look()
    assert requests.watch.asked == 0
    assert (tmp_path / "save").read_text() == "mine"


def test_one_signal_saves_once_though_ranks_hear_it_at_two_steps() -> None:
    saved: list[int] = []
    answer = OnDemand(keeping(saved), Cursor(step=2), Watch())
    for step, asked in ((2, SAVE), (4, SAVE), (5, SAVE), (6, 0), (7, SAVE), (8, SAVE)):
        answer(asked, {}, Cursor(step=step))
    assert saved == [4, 7]
    with pytest.raises(Stop, match="behind step 8, which is saved; start it again to go on") as caught:
        answer(INTERRUPTED, {}, Cursor(step=8))
    assert (caught.value.code, saved) == (INTERRUPTED, [4, 7, 8])
    overwriting = OnDemand(keeping(saved), Cursor(), Watch(), "start it again with output.overwrite=false")
    with pytest.raises(Stop, match=r"which is saved; start it again with output\.overwrite=false to go on"):
        overwriting(INTERRUPTED, {}, Cursor(step=9))


def keeping(saved: list[int]) -> Any:
    """What saves: steps into a list."""

    class Keep:
        def is_due(self, step: int, loss: float | None = None) -> bool:
            return False

        def __call__(self, state: Any, cursor: Cursor, loss: float | None = None) -> None:
            saved.append(cursor.step)

    return Keep()


@pytest.mark.parametrize("rank", range(4))
def test_what_one_rank_is_asked_all_do_behind_one_step(make_config: MakeConfig, rank: int) -> None:
    """Ranks of one batch too, which exchange no counts with each other."""
    path = make_config({"data.eval": None, "data.check": "first"})
    loaded = load_config(path, ("layout.dp=2", "layout.cp=2", "layout.kind=ring", *SMALL))

    def work(run: Run) -> list[int]:
        watch, asked = Watch(), []
        for agreed in run.loader.steps(4, watch=watch):
            asked.append(agreed.asked)
            if agreed.cursor.step == 2 and run.place.host["world"].index == rank:
                watch.ask(SAVE)
        return asked

    assert on_ranks(loaded, work) == [[0, 0, SAVE, SAVE]] * 4


def test_a_save_that_fails_ends_all_ranks_behind_one_step(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though one of them learns of it three steps later than the other."""
    path = make_config({"data.eval": None, "data.check": "first", "train.steps": 100, "checkpoint.every": 2})
    loaded, first_has_gone_on = load_config(path, ("layout.dp=2", *SMALL)), threading.Event()

    def fail(file: Path, *rest: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    def publish_late(root: Path, part: Any, facts: Any, world: Axis, **settings: Any) -> None:
        try:
            publish(root, part, facts, world, **settings)
        finally:
            if world.index == 1:
                first_has_gone_on.wait(60)

    publish = saver.publish
    monkeypatch.setattr(write, "write_file", fail)
    monkeypatch.setattr(saver, "publish", publish_late)

    def work(run: Run) -> tuple[int, str]:
        watch, steps, is_first = Watch(), list[int](), run.place.host["world"].index == 0

        def emit(record: dict[str, Any]) -> None:
            steps.append(record["step"])
            if is_first and watch.is_stopping:
                first_has_gone_on.set()

        with pytest.raises(UserError) as caught, Keeper.of(run, tmp_path / "run", watch=watch) as keep:
            loop.train(run, emit, keep=keep, watch=watch)
        first_has_gone_on.set()
        return steps[-1], str(caught.value)

    first, second = on_ranks(loaded, work)
    assert first == second
    assert first[0] < 100
    assert first[1].startswith("saving checkpoint iter_0000002 failed on rank 0: No space left on device (")


def test_the_loop_stops_behind_the_step_in_which_it_is_asked(make_config: MakeConfig) -> None:
    run = prepare(load_config(make_config({"data.eval": None, "data.check": "first"})), lambda text: None)
    watch, records, saved = Watch(), list[dict[str, Any]](), list[int]()

    def emit(record: dict[str, Any]) -> None:
        records.append(record)
        if record["step"] == 1:  # while step 2 is computed
            watch.ask(TERMINATED)

    with pytest.raises(Stop, match="behind step 2"):
        loop.train(run, emit, keep=keeping(saved), watch=watch)
    assert [record["step"] for record in records] == [1, 2]
    assert saved == [2]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_result_that_is_no_longer_wanted_is_not_waited_for(number: int) -> None:
    def make(job: int) -> int:
        if job == 3:
            never.wait()
        return job

    never, taken = threading.Event(), list[int]()
    try:
        for result in prefetch(make, range(6), Workers(number=number, ahead=1), lambda: len(taken) < 3):
            taken.append(result)  # looked at in between
    finally:
        never.set()
    assert taken == [0, 1, 2]
