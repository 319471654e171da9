"""What the benchmarks share: the time and the peak memory of a call, and processes of their own. Linux with glibc."""

import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock time of a call."""
    gc.collect()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_mib(run: Callable[[], object]) -> float:
    """Resident high-water mark of a call, above the level before it. Call once before: a first call loads code."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    before = _status_mib("VmRSS")
    run()
    return _status_mib("VmHWM") - before


def in_a_process(script: str, options: Sequence[str], *, is_verbose: bool = False) -> dict[str, Any]:
    """The JSON object that `script --child options` prints last, run in a process of its own."""
    done = subprocess.run(
        [sys.executable, script, "--child", *options],
        stdout=subprocess.PIPE,
        stderr=None if is_verbose else subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(options)} failed: {done.stderr or 'see above'}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _status_mib(field: str) -> float:
    """A field of /proc/self/status in MiB."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024
