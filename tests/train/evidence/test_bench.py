"""Training that is killed: a stand-in for `mmfn train` writes the files that are watched."""

import json
import sys
from pathlib import Path

import pytest

from mmfn.parallel.mesh.launch import Ranks
from mmfn.train.evidence import bench
from mmfn.train.evidence.bench import Bench, num_steps
from mmfn.train.evidence.card import read_card

ROOT = Path(__file__).parents[3]
CARD = ROOT / "docs" / "evidence" / "cards" / "qwen3_vl.yaml"
WRITE = """\
import json, pathlib, sys, time
folder = pathlib.Path(next(a for a in reversed(sys.argv) if a.startswith("output.path=")).partition("=")[2])
(folder / "state").mkdir(parents=True, exist_ok=True)
(folder / "state" / "latest_checkpointed_iteration.txt").write_text("2")
lines = [json.dumps({"step": step}) for step in range(1, STEPS + 1)]
(folder / "metrics.jsonl").write_text("\\n".join(lines) + "\\n" + '{"st')
END
"""


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A bench whose configs are found and whose training is another program."""
    monkeypatch.chdir(ROOT)
    said: list[str] = []
    return Bench(card=read_card(CARD), path="a.yaml", overrides=("train.steps=60",), ranks=Ranks(), say=said.append)


def stand_in(monkeypatch: pytest.MonkeyPatch, num: int, end: str) -> None:
    code = WRITE.replace("STEPS", str(num)).replace("END", end)
    monkeypatch.setattr(bench, "MMFN", (sys.executable, "-c", code))


def test_it_is_killed_behind_a_step_of_its_own(train: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier run has left in the folder is none."""
    stand_in(monkeypatch, 20, "time.sleep(600)")
    earlier = "".join(json.dumps({"step": step}) + "\n" for step in range(1, 61))
    (tmp_path / "metrics.jsonl").write_text(earlier, encoding="utf-8")
    train.train(tmp_path, until=14)
    assert num_steps(tmp_path) == 20


@pytest.mark.parametrize(
    ("num", "end", "expected"),
    [
        (3, "sys.exit('mmfn: error: full')", r"^mmfn train ended behind step 3, before it could be killed: full$"),
        (60, "", r"^a.yaml: training was done before it could be killed; raise steps of stage resume$"),
    ],
)
def test_one_that_ends_by_itself_is_said(
    num: int, end: str, expected: str, train: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, num, end)
    with pytest.raises(ValueError, match=expected):
        train.train(tmp_path, until=14)


def test_one_that_fails_is_said_by_what_it_says(train: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, 3, "sys.exit('mmfn: error: the disk is full')")
    with pytest.raises(ValueError, match=r"^mmfn train failed: the disk is full$"):
        train.train(tmp_path)
