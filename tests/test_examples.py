"""The examples and benchmarks that no other test runs."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_mesh_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("mesh_experiment", ROOT / "examples" / "mesh_experiment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main() < 1e-12
    printed = capsys.readouterr().out
    assert printed.startswith("one device: loss ")
    for name in module.LAYOUTS:
        assert f"\n{name} (" in printed
    assert printed.count("11 x all_gather weights") == len(module.LAYOUTS)  # 2 + 2 blocks, and what lies around them
    table = printed[printed.index("planned for a rank") :].splitlines()
    assert [row[:20].strip() for row in table[1:]] == list(module.LAYOUTS)


@pytest.mark.parametrize(
    "command",
    [
        "step.py --sizes tiny --seeds 1 --rounds 1 --variants eager --allocators default",
        "cross_entropy.py --sizes 64x128x32 --rounds 1 --allocators default",
        "gated_delta_rule.py --sizes 1:2x70x16 --rounds 1",
        "memory.py --width 128 --layers 2 --tokens 64 --rounds 1 --policies none",
    ],
)
def test_a_benchmark_at_its_smallest(command: str) -> None:
    """`step.py` refuses to print figures where transformers' first loss is another, on packed rows with images."""
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2  # a head and a row
