"""The script for clusters, with two machines that are processes of this one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.processes import ROOT
from tests.train.rank_cases import MakeConfig

SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit=1
trap 'kill -TERM $(jobs -p)' TERM  # as Slurm does with the tasks of a step
for node in 1 2; do "$@" & done
code=0
for job in $(jobs -p); do wait "$job" || code=$?; done
exit $code
"""

# more names than a pipe holds: a script that reads the first of them only kills it by SIGPIPE
SCONTROL = """#!/bin/bash
set -e
echo localhost
for node in {1..20000}; do echo "node$node"; done
"""


@pytest.mark.dist
def test_two_machines_train(make_config: MakeConfig, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {
        "srun": SRUN,
        "scontrol": SCONTROL,
        "torchrun": f'#!/bin/bash\nexec "{sys.executable}" -m torch.distributed.run "$@"\n',
    }.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"SLURM_JOB_NODELIST": "localhost,other", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7", "PORT": str(port)}
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    config = str(make_config({"data.eval": None, "data.check": "first"}))
    done = subprocess.run(
        [str(ROOT / "examples" / "slurm.sh"), config, "layout.dp=2"],
        cwd=ROOT, env={**env, **job, "RANKS": "1"}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "data_parallel: parameters over 2 ranks" in done.stdout
    assert (tmp_path / "run" / "checkpoint" / "config.json").is_file()
