"""A sample of the campaign of kills; the whole of it is run by hand, and docs/reliability.md has what it found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "tests.train.checkpoint.campaign", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_that_is_killed_is_the_one_that_was_not() -> None:
    assert "| **3** | | | | **0** |" in run("--kills", "3", "--steps", "8", "--case", "images")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sound, experts", "video, packed by tokens"])
def test_of_every_kind_of_data(case: str) -> None:
    assert "| **4** | | | | **0** |" in run("--kills", "4", "--steps", "12", "--case", case)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("case", ["images, 4 ranks", "sound, experts, 4 ranks", "video, packed by tokens, 4 ranks"])
def test_of_several_ranks(case: str) -> None:
    assert "| **3** | | | | **0** |" in run("--kills", "3", "--steps", "8", "--case", case)
