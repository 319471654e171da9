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
        pytest.param(
            "step.py --sizes tiny --seeds 1 --rounds 1 --variants eager --allocators default", marks=pytest.mark.slow
        ),
        "cross_entropy.py --sizes 64x128x32 --rounds 1 --allocators default",
        "gated_delta_rule.py --sizes 1:2x70x16 --rounds 1",
        "memory.py --width 128 --layers 2 --tokens 64 --rounds 1 --policies none",
        "gpu.py --device cpu --smallest --variants eager transformers",
        pytest.param("gpu.py --device cpu --smallest", marks=pytest.mark.slow),  # and compiled
        pytest.param(
            "communication.py --ranks 2 --layers 1 --tokens 64 --rounds 1 --width 128", marks=pytest.mark.slow
        ),
    ],
)
def test_a_benchmark_at_its_smallest(command: str) -> None:
    """Those that compare refuse to print figures where first losses are others (`step`, `gpu`, `communication`)."""
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2  # a head and a row


def test_published_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each names a model, a source and a device that are there; a small one is planned; ranks by hand."""
    spec = importlib.util.spec_from_file_location("published", ROOT / "benchmarks" / "published.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "published", module)  # dataclasses look there
    spec.loader.exec_module(module)
    points = [*module.points("points"), *module.points("others"), *module.sweep()]
    assert len(module.points("points")) >= 12
    assert all(point.source in module.DATA["sources"] and point.target.flops for point in points)
    assert {point.model for point in points} == set(module.DATA["models"])
    assert all((point.tokens_s is None) != (point.tflops is None) for point in points)
    assert module.rank_correlation([1.0, 2.0, 3.0], [10.0, 30.0, 20.0]) == 0.5
    assert module.rank_correlation([1.0, 1.0, 2.0], [5.0, 5.0, 4.0]) == -1.0
    monkeypatch.setitem(module.DATA["models"], "small", [64, 256, 512, 2, 2, 1])
    small = module.Point(
        source="fms", model="small", device="a100", devices=2, length=64, batch=2, layout={}, network=5, tokens_s=64.0
    )
    plan = module.plan_point(small)
    assert (plan.tokens, small.published_s(plan)) == (128, 2.0)
    assert {c.site for c in plan.collectives if c.axis == "shard"} >= {"weights", "gradients"}
    assert plan.time.overlapped_s > 0
    assert small.target.network == 5 * 10**9
