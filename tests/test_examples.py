"""The examples that no other test runs."""

import importlib.util
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
