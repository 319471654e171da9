"""`mmfn calibrate`: figures of the machine at hand, by hand-computed times and as a command whose file plans read."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmfn import cli
from mmfn.ops import table
from mmfn.parallel.mesh.launch import Place
from mmfn.parallel.mesh.layout import single_mesh
from mmfn.parallel.planning import calibration, devices
from mmfn.parallel.planning.calibration import SIZES, Sizes, Timer
from tests.parallel.plan_cases import hf_config

TINY = Sizes(
    products=((8, 4, 2), (4, 4, 4)),
    narrow=((8, 2, 2),),
    experts=(2, 4, 8, 4),
    narrow_experts=(2, 4, 8, 2),
    attention=(2, 4, 2, 1, 8),
    copied=1024,
    sent=4096,
)
CPU = torch.device("cpu")


class Stopwatch(Timer):
    """It runs what it is given, once, and says that a call takes two seconds, or that which is next in `answers`."""

    def __init__(self, *answers: float) -> None:
        super().__init__(device=CPU, seconds=1.0)
        object.__setattr__(self, "answers", list(answers))

    def __call__(self, run: Any, count: int = 0) -> float:
        run()
        answers: list[float] = self.answers  # type: ignore[attr-defined]
        return answers.pop(0) if answers else 2.0

    def issue(self, run: Any, count: int = 200) -> float:
        run()
        return 0.5


def test_rates_are_work_over_time() -> None:
    """Products: 128 and 128 FLOPs in 4 s; a gated layer has three of them, each with two more backward; attention sees
    10 pairs a segment and head, two products forward and five backward."""
    rates = calibration.rates_of(Stopwatch(), table("portable"), torch.float32, TINY)
    assert rates == {
        "products": 256 / 4,
        "narrow products": 64 / 2,
        "grouped products": 3 * 3 * 2 * 8 * 8 * 4 / 2,
        "narrow grouped products": 3 * 3 * 2 * 8 * 8 * 2 / 2,
        "attention": 7 * 2 * 10 * 2 * 2 * 8 / 2,
    }


def test_memory_by_copies_and_sums() -> None:
    """A copy of 1,024 bytes reads and writes them in 1 s; a sum reads two and writes one in 2 s."""
    found = calibration.machine_of(Stopwatch(1.0, 2.0), torch.float32, TINY)
    assert found["memory_bandwidth"] == 2048
    assert found["memory_share"] == 0.75
    assert found["host_link"] == 1024
    assert found["launch_s"] == 0.5
    assert found["memory_bytes"] > 2**28


def test_links_and_latencies() -> None:
    """Of 4 ranks: a large all-gather 7 s, a small one 1 s, a small all-reduce 1.6 s: 0.2 s a hop, 0.4 s a call."""
    axis = SimpleNamespace(size=4, all_gather=lambda x, site: x, all_reduce=lambda x, site: x)
    one = SimpleNamespace(size=1)
    found = calibration.mesh_of(Stopwatch(7.0, 1.0, 1.6), {"dp": axis, "replicate": one}, TINY)  # type: ignore[arg-type]
    assert found == pytest.approx({"link": 3 * 4096 / 6, "link_share": 1.0, "hop_s": 0.2, "call_s": 0.4})
    several = calibration.mesh_of(Stopwatch(7.0, 1.0, 1.6, 5.0, 2.0, 2.6), {"dp": axis, "replicate": axis}, TINY)  # type: ignore[arg-type]
    assert several["network"] == 3 * 4096 / 3
    assert several["network_hop_s"] == pytest.approx(0.2)
    assert several["call_s"] == pytest.approx(1.4)


def test_a_device_is_what_was_measured_and_else_its_base() -> None:
    mesh = single_mesh()
    base = devices.device("cpu")
    place = Place(device=CPU, mesh=mesh, host=mesh)
    found = calibration.measure(base, table("portable"), place, torch.float32, seconds=1e-3, sizes=TINY)
    assert max(found.shares.values()) == 1.0
    assert set(found.shares) == set(base.shares)
    assert min(found.shares.values()) > 0
    assert found.flops > 0
    assert found.launch_s > 0
    assert (found.link, found.network, found.hop_s) == (base.link, base.network, base.hop_s)


def test_sizes_are_of_their_classes() -> None:
    """What is measured as narrow is what plans call narrow."""
    for sizes in SIZES.values():
        assert all(min(shape) >= 1024 for shape in sizes.products)
        assert all(min(shape) < 1024 for shape in sizes.narrow)
        assert min(sizes.experts[2:]) >= 1024 > min(sizes.narrow_experts[2:])


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(calibration, "SIZES", {"cpu": TINY, "cuda": TINY})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(hf_config()))
    assert cli.main(["calibrate", "--seconds", "0.001"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# Measured by mmfn calibrate: ")
    assert "# Not measured but those of cpu: link, network, call_s, hop_s, network_hop_s" in printed
    assert cli.main(["calibrate", "--seconds", "0.001", "--out", "here.yaml"]) == 0
    assert capsys.readouterr().out == "wrote here.yaml; plan with mmfn plan CONFIG --device here.yaml\n"
    assert cli.main(["calibrate", "--seconds", "0.001", "--out", "here.yaml"]) == 0
    capsys.readouterr()
    (tmp_path / "c.yaml").write_text("train: {steps: 1}\n")
    small = ["--tokens", "64", "--sample-tokens", "32", "--image-side", "4"]
    assert cli.main(["plan", "config.json", *small, "--device", "here.yaml"]) == 0
    assert "predicted step on here.yaml: " in capsys.readouterr().out
    wrong = {
        ("plan", "config.json", *small, "--device", "there.yaml"): "device file 'there.yaml' cannot be read",
        ("calibrate", "--out", "here.txt"): "--out 'here.txt' must end in .yaml",
        ("calibrate", "--out", "no/here.yaml"): "--out 'no/here.yaml' lies in a folder that does not exist",
        ("calibrate", "--out", "c.yaml"): "--out 'c.yaml' is there and was not written by this command",
        ("calibrate", "--seconds", "0"): "--seconds 0 must be above 0",
        ("calibrate", "--device", "tpu"): "invalid choice: 'tpu'",
    }
    for arguments, expected in wrong.items():
        assert cli.main(list(arguments)) == 2
        assert expected in capsys.readouterr().err
