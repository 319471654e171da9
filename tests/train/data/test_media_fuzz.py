"""Damaged and hostile media: each becomes a sample or one sentence of ours, in bounded memory and time.

The inputs are read by a process of its own (`fuzz_media`), whose memory is limited by the system.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.train.data import fuzz_media

pytest.importorskip("av", reason="PyAV is an optional dependency")
ROOT = Path(__file__).parents[3]
MIB = 256  # that memory may grow by, of which a decoded image of 2 megapixels in float takes 24
SHARES = [pytest.param(0, 340, id="sampled"), pytest.param(0, fuzz_media.NUM, id="all", marks=pytest.mark.slow)]


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and inotify are Linux's")
@pytest.mark.parametrize(("first", "num"), SHARES)
def test_whatever_comes_is_read_or_refused(tmp_path, first, num):
    command = [sys.executable, "-m", "tests.train.data.fuzz_media", str(tmp_path), str(first), str(num), "1024"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    *rows, last = map(json.loads, done.stdout.splitlines())
    assert len(rows) == num
    counts = Counter((row["kind"], row["is_read"]) for row in rows)
    assert min(counts[kind, is_read] for kind in ("image", "video", "audio") for is_read in (True, False)) >= 5
    for row in rows:
        assert "fault" not in row, row
        assert row["seconds"] < fuzz_media.SECONDS, row
        assert (row["outside"], row["started"]) == (0, []), row
        assert row["is_read"] or "\n" not in row["sentence"], row
    assert last["grown_kib"] < MIB * 2**10
