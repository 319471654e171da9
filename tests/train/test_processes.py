"""Runs of several processes: the numbers and files of one, and how they end when one rank fails or differs."""

import ctypes.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import mmfn
from mmfn import tree
from mmfn.interop.checkpoint import read_config
from mmfn.train.build.run import prepare
from mmfn.train.config.load import load_config
from tests.train.processes import ROOT, finish, run_for_a_while, start, start_rank
from tests.train.rank_cases import SMALL, MakeConfig, train


@pytest.mark.dist
def test_torchrun_trains_and_evaluates(make_config: MakeConfig, tmp_path: Path) -> None:
    path = make_config()
    expected = train(prepare(load_config(path), lambda text: None))
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mmfn"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command, "train", str(path), "layout.dp=2"],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("step=")] == ["step=2/4", "step=4/4"]
    assert lines[0] == "data_parallel: parameters over 2 ranks, next gather ahead, 2 sums of gradients behind"
    assert sum(line.startswith("held-out accuracy") for line in lines) == 1
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in expected], rel=2e-3)
    stored = json.loads((tmp_path / "run" / "eval.json").read_text())
    again = finish(
        start(2, "eval", str(path), f"model.path={tmp_path / 'run' / 'checkpoint'}", "model.init=load",
              "--out", str(tmp_path / "again.json"))
    )  # fmt: skip
    assert [(code, errors) for code, _, errors in again] == [(0, ""), (0, "")]
    assert [output.count("held-out accuracy") for _, output, _ in again] == [1, 0]
    assert json.loads((tmp_path / "again.json").read_text())["answers"] == stored["answers"]


@pytest.mark.dist
def test_a_wrong_layout_is_one_sentence_and_exit_code_2_on_all_ranks(make_config: MakeConfig, tmp_path: Path) -> None:
    ranks = finish(start(2, "train", str(make_config()), "layout.dp=3"))
    assert [code for code, _, _ in ranks] == [2, 2]
    assert "".join(errors for _, _, errors in ranks) == (
        "mmfn: error: layout dp 3: replicate * dp * cp = 3 but there are 2 ranks; change the layout, or start 3 ranks\n"
    )
    assert not (tmp_path / "run").exists()


def two_ranks(*settings: Sequence[str], command: str = "train") -> list[tuple[int, str, str]]:
    """Two agents of one rank each, which were started with different arguments."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return finish([start_rank(rank, 2, port, command, *own) for rank, own in enumerate(settings)])


@pytest.mark.dist
@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("optimizer.lr=3e-3", "rank 1 has optimizer.lr 0.003 but rank 0 has 0.002; start all ranks with the same"),
        ("train.seed=1", "rank 1 has train.seed 1 but rank 0 has 0; start all ranks with the same"),
        ("data.train=", "rank 1 has data.train with the content '"),
        ("model.path=", "rank 1 has weights (model.path, model.adapter) with the content '"),
    ],
    ids=["settings", "order", "data", "weights"],
)
def test_ranks_that_differ_are_refused(
    make_config: MakeConfig, small_demo: Path, tmp_path: Path, changed: str, expected: str
) -> None:
    """Everything that decides a number is the same on all ranks, or nothing is trained."""
    path = make_config({"data.eval": None, "data.check": "first"})
    common = [str(path), "layout.dp=2"]
    if changed == "data.train=":
        entries = json.loads((small_demo / "train.json").read_text())
        (tmp_path / "train.json").write_text(json.dumps(entries[1:] + entries[:1]))
        changed += str(tmp_path / "train.json")
    if changed == "model.path=":
        base = mmfn.init(read_config(small_demo / "model"), seed=0)
        for name, model in (("a", base), ("b", replace(base, params=tree.map(lambda x: 1.01 * x, base.params)))):
            mmfn.save_hf(tmp_path / name, model, assets=small_demo / "model")
        common += ["model.init=load", f"model.path={tmp_path / 'a'}"]
        changed += str(tmp_path / "b")
    ranks = two_ranks(common, [*common, changed])
    assert [code for code, _, _ in ranks] == [2, 2]
    said = "".join(errors for _, _, errors in ranks)
    assert said.count("\n") == 1
    assert said.startswith("mmfn: error: " + expected)
    assert not (tmp_path / "run").exists()


@pytest.mark.dist
def test_ranks_may_differ_in_paths_and_workers(make_config: MakeConfig, small_demo: Path, tmp_path: Path) -> None:
    path = make_config({"data.eval": None, "data.check": "first", "train.steps": 1})
    copy = tmp_path / "copy.json"
    copy.write_bytes((small_demo / "train.json").read_bytes())
    common = [str(path), "layout.dp=2"]
    own = [*common, f"data.train={copy}", "data.workers=0", "train.log_every=7", f"output.path={tmp_path / 'other'}"]
    assert [(code, errors) for code, _, errors in two_ranks(common, own)] == [(0, ""), (0, "")]
    assert (tmp_path / "run" / "checkpoint").is_dir()
    assert not (tmp_path / "other").exists()


def end_by_a_broken_sample(make_config: MakeConfig, tmp_path: Path) -> list[tuple[int, str, str]]:
    """How two ranks end of which one alone prepares it."""
    path = make_config({"data.eval": None})
    entries = json.loads(Path(load_config(path).config.data.train).read_text())
    (tmp_path / "broken.png").write_bytes(b"no image")
    entries[-1]["images"] = ["broken.png"]
    for entry in entries[:-1]:
        entry["images"] = []
        entry["messages"][0]["content"] = "Which digit is this?"
    (tmp_path / "train.json").write_text(json.dumps(entries))
    changes = ["layout.dp=2", f"data.train={tmp_path / 'train.json'}", f"data.root={tmp_path}"]
    return finish(start(2, "train", str(path), *changes))


@pytest.mark.dist
def test_an_error_of_one_rank_ends_all(make_config: MakeConfig, tmp_path: Path) -> None:
    """Only one of the two ranks prepares the broken sample; the other waits for it before it makes the run folder."""
    ranks = end_by_a_broken_sample(make_config, tmp_path)
    assert [code for code, _, _ in ranks] == [2, 2], ranks
    assert [bool(errors) for _, _, errors in ranks].count(True) == 1
    assert "broken.png" in "".join(errors for _, _, errors in ranks)
    assert not (tmp_path / "run").exists()


FULL = """
import errno, os, sys
from mmfn import cli
from mmfn.train.run import folder

write_text = folder.write_text

def writing(path, text):
    if path.name in ("report.html", "answers.json"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    write_text(path, text)

folder.write_text = writing
sys.exit(cli.entry())
"""


@pytest.mark.dist
@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_disk_that_is_full_at_the_very_end_ends_all_ranks_alike(
    make_config: MakeConfig, tmp_path: Path, command: str
) -> None:
    """Only the first rank writes the report, or the answers; the others have nothing left to do."""
    (tmp_path / "full.py").write_text(FULL)
    settings = {"train": {"data.eval": None}, "eval": {"eval.max_new_tokens": 1}}[command]
    path = make_config({"data.check": "first", "train.steps": 1, **settings})
    out = {"train": (), "eval": ("--out", str(tmp_path / "answers.json"))}[command]
    ranks = finish(start(2, command, str(path), "layout.dp=2", *out, program=(str(tmp_path / "full.py"),)))
    assert [code for code, _, _ in ranks] == [2, 2], ranks
    assert [errors.count("No space left on device") for _, _, errors in ranks] == [1, 0]


STUCK = """
import sys, time
from mmfn import cli
from mmfn.errors import UserError
from mmfn.train.checkpoint import saver
from mmfn.train.run import loop

facts_of = loop.facts_of

def failing(step, share):
    if step == 3:
        raise UserError("the data broke")
    return facts_of(step, share)

saver.publish, loop.facts_of = lambda *args, **settings: time.sleep(10**6), failing
sys.exit(cli.entry())
"""


@pytest.mark.dist
def test_a_run_that_fails_does_not_wait_for_ever_for_a_disk(make_config: MakeConfig, tmp_path: Path) -> None:
    """Nor does its process, whose save is under way."""
    (tmp_path / "stuck.py").write_text(STUCK)
    path = make_config({"data.eval": None, "data.check": "first", "checkpoint.every": 2, "layout.timeout_s": 1})
    ((code, _, errors),) = finish(start(1, "train", str(path), program=(str(tmp_path / "stuck.py"),)))
    assert (code, errors) == (2, "mmfn: error: the data broke\n")


@pytest.fixture
def heap_checker(monkeypatch: pytest.MonkeyPatch) -> None:
    """glibc checks the heap of new processes at every call, and fills what is freed: whoever uses that reads junk."""
    monkeypatch.setenv("MALLOC_CHECK_", "3")
    monkeypatch.setenv("MALLOC_PERTURB_", "165")
    if library := ctypes.util.find_library("c_malloc_debug"):  # where the checks are since glibc 2.34
        monkeypatch.setenv("LD_PRELOAD", library)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.usefixtures("heap_checker")
@pytest.mark.parametrize("layout", [("layout.dp=4",), ("layout.dp=2", "layout.cp=2", "layout.kind=ring")])
def test_runs_of_four_ranks_under_a_heap_checker(make_config: MakeConfig, layout: tuple[str, ...]) -> None:
    """A run of this size once ended with "double free or corruption" on one rank."""
    path = make_config({"train.steps": 60, "train.log_every": 60, "data.check": "first"})
    for code, _, errors in finish(start(4, "train", str(path), *layout, *SMALL)):
        assert (code, errors) == (0, "")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.usefixtures("heap_checker")
@pytest.mark.parametrize("time", range(4))
def test_errors_of_one_rank_under_a_heap_checker(make_config: MakeConfig, tmp_path: Path, time: int) -> None:
    """Without `Ranks.leave` about one in four ended with SIGABRT: a thread of gloo met a Python that was gone."""
    ends = end_by_a_broken_sample(make_config, tmp_path)
    assert [code for code, _, _ in ends] == [2, 2], ends
    assert sum(errors.startswith("mmfn: error: ") for _, _, errors in ends) == 1


@pytest.mark.dist
def test_a_killed_rank_ends_the_others(make_config: MakeConfig) -> None:
    ranks = start(2, "train", str(make_config({"train.steps": 10_000, "train.log_every": 1})), "layout.dp=2")
    run_for_a_while(ranks[0])
    ranks[1].kill()
    (code, _, errors), _ = finish(ranks)
    assert code == 3
    assert errors.startswith("mmfn: error: rank 1 ended without a word, last heard of in step ")
    assert errors.count("\n") == 1
