"""Runs that are asked to stop or to save, by real signals to real processes, whatever they do at that moment."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmfn.parallel.mesh.axis import Axis
from mmfn.train.checkpoint import newest
from mmfn.train.config.load import load_config
from mmfn.train.run.stop import SECOND_S
from tests.train.processes import (
    HEARD,
    end_started,
    finish,
    is_halted,
    stall,
    stall_image,
    stalled,
    start,
    start_rank,
    wait_for,
    wait_for_line,
)
from tests.train.rank_cases import MakeConfig

ENDLESS = ("train.steps=100000", "train.log_every=1", "data.check=first")
PLAIN = {"data.eval": None}
AS_ASKED = "mmfn: stopped: as asked, behind step {}, which is saved; start it again to go on\n"


@pytest.fixture(autouse=True)
def _processes() -> Iterator[None]:
    yield
    end_started()


def saved_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a run folder."""
    return sorted(int(path.name.removeprefix("iter_")) for path in (folder / "state").glob("iter_*"))


def check_stop(ranks: list[tuple[int, str, str]], folder: Path, code: int = 143) -> int:
    """Check that all ranks have stopped with one sentence and a whole checkpoint; returns its step."""
    assert [rank[0] for rank in ranks] == [code] * len(ranks), ranks
    (step,) = saved_steps(folder)
    assert [errors for _, _, errors in ranks] == [AS_ASKED.format(step)] + [""] * (len(ranks) - 1)
    search = newest(folder / "state", Axis(name="world"))
    assert search.checkpoint is not None
    assert search.checkpoint.manifest.facts.step == step
    last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["step"] == step
    return step


@pytest.mark.dist
@pytest.mark.parametrize(
    ("layout", "number", "code"),
    [(("layout.dp=2",), signal.SIGTERM, 143), (("layout.cp=2", "layout.kind=ring"), signal.SIGINT, 130)],
)
def test_a_signal_to_one_rank_stops_all_behind_one_step(
    make_config: MakeConfig, tmp_path: Path, layout: tuple[str, ...], number: signal.Signals, code: int
) -> None:
    ranks = start(2, "train", str(make_config(PLAIN)), *ENDLESS, *layout)
    wait_for_line(ranks[0], "step=2/")
    ranks[1].send_signal(number)
    step = check_stop(finish(ranks), tmp_path / "run", code)
    again = start(
        2, "train", str(make_config(PLAIN)), *ENDLESS, *layout, "checkpoint.resume=auto", f"train.steps={step + 1}"
    )
    assert [(end, errors) for end, _, errors in finish(again)] == [(0, ""), (0, "")]


@pytest.mark.dist
def test_files_and_a_signal_ask_to_save_and_to_stop(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()  # of an earlier run
    (rank,) = start(1, "train", str(make_config(PLAIN)), *ENDLESS, "checkpoint.resume=auto")
    wait_for_line(rank, "step=1/")
    (tmp_path / "run" / "save").touch()
    wait_for(lambda: len(saved_steps(tmp_path / "run")) == 1, rank)
    (first,) = saved_steps(tmp_path / "run")
    wait_for_line(rank, f"step={first + 3}/")
    rank.send_signal(signal.SIGUSR1)
    wait_for(lambda: len(saved_steps(tmp_path / "run")) == 2, rank)
    second = saved_steps(tmp_path / "run")[1]
    wait_for_line(rank, f"step={second + 3}/")
    (tmp_path / "run" / "stop").touch()
    ((code, _, errors),) = finish([rank])
    last = max(saved_steps(tmp_path / "run"))
    assert (code, errors) == (143, AS_ASKED.format(last))
    assert last > second
    assert not {"stop", "save"} & set(os.listdir(tmp_path / "run"))


@pytest.mark.dist
@pytest.mark.parametrize("workers", [("threads", 2), ("threads", 0), ("processes", 1)], ids=str)
def test_a_stop_while_the_data_do_not_come(make_config: MakeConfig, tmp_path: Path, workers: tuple[str, int]) -> None:
    path = make_config(PLAIN)
    fifo, _, program = stall(path, tmp_path, 2, *ENDLESS)
    kind = (f"data.worker_kind={workers[0]}",) if workers[1] else ()
    (rank,) = start(1, "train", str(path), *ENDLESS, *kind, f"data.workers={workers[1]}", program=program)
    with stalled(fifo, rank):
        wait_for_line(rank, "step=1/")
        rank.send_signal(signal.SIGTERM)
        assert check_stop(finish([rank]), tmp_path / "run") == 2


@pytest.mark.dist
def test_a_stop_of_one_rank_while_the_data_of_another_do_not_come(make_config: MakeConfig, tmp_path: Path) -> None:
    path = make_config(PLAIN)
    fifo, reader, program = stall(path, tmp_path, 2, *ENDLESS)
    ranks = start(2, "train", str(path), *ENDLESS, "layout.dp=2", program=program)
    with stalled(fifo, ranks[reader]):
        wait_for_line(ranks[0], "step=1/")
        ranks[0].send_signal(signal.SIGTERM)
        assert check_stop(finish(ranks), tmp_path / "run") == 2


SAVING = """
import os, sys, time
from mmfn import cli
from mmfn.train.checkpoint import saver
from mmfn.train.run.stop import Requests

publish, hear, (saving, heard) = saver.publish, Requests.hear, {paths!r}

def publishing(*args, **settings):
    open(saving, "w").close()
    while not os.path.exists(heard):
        time.sleep(0.01)
    return publish(*args, **settings)

def hearing(self, number):
    is_second = hear(self, number)
    open(heard, "w").close()
    return is_second

saver.publish, Requests.hear = publishing, hearing
sys.exit(cli.entry())
"""


@pytest.mark.dist
@pytest.mark.parametrize("beside", [True, False], ids=["beside the next steps", "alone"])
def test_a_stop_in_a_save_completes_it(make_config: MakeConfig, tmp_path: Path, beside: bool) -> None:
    """A program that is mmfn, but whose first save is not over before a signal is heard."""
    saving, heard, program = (tmp_path / name for name in ("saving", "heard", "saving.py"))
    program.write_text(SAVING.format(paths=(str(saving), str(heard))))
    changes = ("checkpoint.every=2", f"checkpoint.asynchronous={str(beside).lower()}")
    (rank,) = start(1, "train", str(make_config(PLAIN)), *ENDLESS, *changes, program=(str(program),))
    wait_for(saving.exists, rank)
    rank.send_signal(signal.SIGTERM)
    ((code, _, errors),) = finish([rank])
    steps = saved_steps(tmp_path / "run")
    assert (code, errors) == (143, AS_ASKED.format(steps[-1]))
    assert steps[0] == 2
    assert steps[1:] in ([], [3], [4]) if beside else steps == [2]  # behind step 4 it waits for the save


@pytest.mark.dist
def test_a_stop_in_the_first_step_is_at_once(make_config: MakeConfig, tmp_path: Path) -> None:
    """While it compiles, say: there is nothing to save."""
    args = ("train", str(make_config(PLAIN)), *ENDLESS, "train.compile=layer")
    rank = start_rank(0, 1, 0, *args, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "graphs"))
    wait_for(lambda: list((tmp_path / "graphs").glob("*")), rank)
    rank.send_signal(signal.SIGTERM)
    ((code, _, errors),) = finish([rank])
    assert (code, errors) == (143, "mmfn: stopped: at once (step 1, step), no step was done\n")
    assert saved_steps(tmp_path / "run") == []


@pytest.mark.dist
def test_a_stop_in_an_evaluation_on_the_way_gives_it_up(make_config: MakeConfig, tmp_path: Path) -> None:
    path = make_config()
    loaded = load_config(path, ENDLESS)
    fifo, program = stall_image(loaded, loaded.config.data.eval, 3, tmp_path)
    changes = (*ENDLESS, "eval.every=1", "eval.batch_samples=1", "data.cache_mib=0")
    (rank,) = start(1, "train", str(path), *changes, program=program)
    with stalled(fifo, rank):
        rank.send_signal(signal.SIGTERM)
        wait_for((tmp_path / HEARD).exists, rank)
    assert check_stop(finish([rank]), tmp_path / "run") == 1
    assert "eval_loss" not in json.loads((tmp_path / "run" / "metrics.jsonl").read_text())


@pytest.mark.dist
def test_a_stop_in_the_evaluation_keeps_the_model(make_config: MakeConfig, tmp_path: Path) -> None:
    changes = {"train.steps": 1, "eval.max_new_tokens": 100_000, "data.check": "first", "eval.batch_samples": 1}
    ranks = start(2, "train", str(make_config(changes)), "layout.dp=2")
    wait_for_line(ranks[0], "evaluating 24 held-out samples")
    ranks[1].send_signal(signal.SIGTERM)
    ends = finish(ranks)
    assert [code for code, _, _ in ends] == [143, 143]
    said = "".join(errors for _, _, errors in ends)
    assert said == (
        f"mmfn: stopped: at once (step 1, evaluation), its model is in {tmp_path / 'run'}, evaluation and "
        "report are not\n"
    )
    assert (tmp_path / "run" / "checkpoint" / "config.json").exists()


@pytest.mark.dist
def test_a_second_signal_ends_at_once(make_config: MakeConfig, tmp_path: Path) -> None:
    ranks = start(2, "train", str(make_config(PLAIN)), *ENDLESS, "layout.dp=2", "checkpoint.every=1")
    wait_for_line(ranks[0], "step=2/")
    wait_for(lambda: saved_steps(tmp_path / "run"), ranks[0])  # beside the steps
    ranks[1].send_signal(signal.SIGSTOP)  # the other one waits for it, however long
    wait_for(lambda: is_halted(ranks[1].pid), ranks[1])
    ranks[0].send_signal(signal.SIGTERM)
    ranks[0].send_signal(signal.SIGTERM)  # as launchers do
    time.sleep(SECOND_S + 1)
    assert ranks[0].poll() is None
    while ranks[0].poll() is None:  # on a machine that is busy the first may be heard late
        ranks[0].send_signal(signal.SIGTERM)
        time.sleep(SECOND_S + 1)
    ((code, _, errors),) = finish(ranks[:1])
    assert code == 143
    assert errors.startswith("mmfn: stopped: at once (step ")
    assert errors.endswith("), what was done since the last save is lost\n")
    ranks[1].send_signal(signal.SIGCONT)
    assert finish(ranks[1:])[0][2].count("\n") <= 1
    assert newest(tmp_path / "run" / "state", Axis(name="world")).checkpoint is not None
