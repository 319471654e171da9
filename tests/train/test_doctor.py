"""What is said of machines: of this one, and of others by what would be found on them."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mmfn.cli import main
from mmfn.errors import UserError
from mmfn.train.build import model
from mmfn.train.config.load import known_keys
from mmfn.train.doctor.findings import judge
from mmfn.train.doctor.probe import Devices, Found, find_cann, find_driver, probe

NEEDS = {r.name: r for r in (Requirement("torch<2.14,>=2.11"), Requirement("optree>=0.14"))}
PACKAGES = {"torch": "2.12.0", "optree": "0.20.0", "torch_npu": "2.12.0.post1", "triton": "3.6.0"}
NPUS = Devices(devices=["Ascend910B3"] * 8, memory_bytes=64 * 2**30, backends=["gloo", "hccl"])
ATLAS = Found(
    machine=dict.fromkeys(("mmfn", "python", "system", "processor", "cores", "memory"), "x"),
    packages={**PACKAGES, "triton-ascend": None, "fla-core": None, "flash-attn": None, "av": None},
    needs=NEEDS,
    devices={"npu": NPUS, "cuda": Devices()},
    cann="9.1.0",
    driver="25.0.rc1",
    variables={"HCCL_CONNECT_TIMEOUT": "1200"},
)


def said(found: Found, name: str, device: str | None = None) -> list[str]:
    """The lines about a thing."""
    return [str(finding) for finding in judge(found, device) if finding.name == name]


def test_a_machine_with_npus() -> None:
    assert not [finding for finding in judge(ATLAS, "npu") if finding.kind == "WRONG"]
    assert said(ATLAS, "npu") == [
        "ok     npu: 8 x Ascend910B3, 64.00 GiB each, driver 25.0.rc1, 376 TFLOP/s in bfloat16",
    ]
    assert said(ATLAS, "CANN") == ["ok     CANN: 9.1.0 with torch_npu 2.12.0.post1, published together: 9.1.0"]
    assert said(ATLAS, "cuda") == ["left   cuda: torch sees no device; this torch was built without CUDA"]
    assert said(ATLAS, "ranks") == [
        "ok     ranks: gloo for several ranks on cpu",
        "ok     ranks: hccl for several ranks on npu",
    ]
    assert said(ATLAS, "variable") == ["note   variable: HCCL_CONNECT_TIMEOUT=1200"]


def test_parts_that_do_not_go_together() -> None:
    later = replace(ATLAS, packages={**ATLAS.packages, "torch_npu": "2.13.0"})
    assert said(later, "torch_npu")[-1] == (
        "WRONG  torch_npu: 2.13.0 is made for torch 2.13.0, here is 2.12.0; install torch_npu 2.12.0"
    )
    assert said(later, "CANN") == ["note   CANN: 9.1.0 with torch_npu 2.13.0, no release is known to be made for it"]
    assert said(replace(ATLAS, cann="8.0.RC1"), "CANN")[0].startswith(
        "note   CANN: 8.0.RC1 with torch_npu 2.12.0.post1"
    )
    assert "source its set_env.sh" in said(replace(ATLAS, cann=None), "CANN")[0]
    old = replace(ATLAS, packages={**ATLAS.packages, "torch": "2.10.0", "optree": None})
    assert said(old, "torch") == ["WRONG  torch: 2.10.0, but mmfn needs <2.14,>=2.11; pip install 'torch<2.14,>=2.11'"]
    assert said(old, "optree") == ["WRONG  optree: is not installed; pip install 'optree>=0.14'"]


@pytest.mark.parametrize(("triton", "is_wrong"), [("3.3.1", False), ("3.4.0", True), ("3.7.0", True), ("3.7.1", False)])
def test_compilers_whose_gradients_are_wrong(triton: str, is_wrong: bool) -> None:
    hopper = Devices(devices=["NVIDIA H200"], memory_bytes=2**37, backends=["gloo", "nccl"], generation=9)
    packages = {**ATLAS.packages, "fla-core": "0.6.0", "triton": triton}
    found = replace(ATLAS, packages=packages, devices={"cuda": hopper})
    (line,) = said(found, "package fla")
    assert ("wrong on Hopper" in line) == is_wrong
    assert line.startswith(
        "note   package fla: not for cuda: " if is_wrong else "ok     package fla: 0.6.0 for cuda: gated"
    )
    (line,) = said(replace(found, devices={"cuda": replace(hopper, generation=8)}), "package fla")
    assert line.startswith("ok")


def test_packages_of_kernels() -> None:
    assert said(ATLAS, "package fla")[0].startswith(
        "left   package fla: fla is not installed; pip install 'fla-core', or"
    )
    packages = {**ATLAS.packages, "fla-core": "0.6.0", "flash-attn": "2.6.3"}
    found = replace(ATLAS, packages=packages)
    assert said(found, "package fla") == [
        "note   package fla: not for npu: fla needs triton-ascend, which is not installed; pip install "
        "'triton-ascend', or remove 'fla' from model.kernel_packages"
    ]
    assert "is refused with flash-attn 2.6.3" in said(found, "package flash-attn")[0]
    found = replace(ATLAS, packages={**packages, "triton-ascend": "3.6.0"})
    assert said(found, "package fla")[0].startswith("ok     package fla: 0.6.0 for npu: gated_delta_rule, ")


def test_devices_that_a_run_wants_and_are_not_there() -> None:
    broken = replace(ATLAS, devices={"npu": Devices(error="ImportError: libhccl.so: no such file")}, driver=None)
    text = "npu: torch_npu cannot be loaded (ImportError: libhccl.so: no such file); source CANN's set_env.sh, and"
    assert said(broken, "npu", "npu")[0].startswith(f"WRONG  {text}")
    assert said(broken, "npu")[0].startswith(f"left   {text}")
    assert said(broken, "cuda", "cuda") == ["WRONG  cuda: torch is not installed; pip install torch"]
    assert said(broken, "ranks") == ["WRONG  ranks: torch has no gloo for several ranks on cpu"]
    alone = replace(ATLAS, devices={"npu": replace(NPUS, backends=["gloo"])})
    assert said(alone, "ranks")[1] == "WRONG  ranks: torch has no hccl for several ranks on npu"
    unknown = replace(ATLAS, devices={"npu": replace(NPUS, devices=["Ascend999"])})
    assert "peak unknown: set train.peak_tflops" in said(unknown, "npu")[0]
    assert "train.peak_tflops" in known_keys(), "what is named is a setting"


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ok     kernels portable: ") for line in lines)
    assert any(line.startswith("ok     kernels reference: ") for line in lines)
    found = probe()
    assert found.packages["torch"] is not None
    assert found.devices["cuda"].error is None
    if not found.devices["cuda"].devices:
        assert main(["doctor", "--device", "cuda"]) == 2
        assert "things are wrong, the first: cuda: torch sees no device" in capsys.readouterr().err


def test_versions_are_read_from_files(tmp_path: Path) -> None:
    assert find_cann({}) is None
    assert find_cann({"ASCEND_HOME_PATH": str(tmp_path)}) is None
    info = tmp_path / "x86_64-linux" / "ascend_toolkit_install.info"
    info.parent.mkdir()
    info.write_text("package_name=Ascend-cann-toolkit\nversion=8.5.0\ninnerversion=V100R001C23\n")
    assert find_cann({"ASCEND_HOME_PATH": str(tmp_path)}) == "8.5.0"
    driver = tmp_path / "version"
    assert find_driver([driver]) is None
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.124.06  Wed Feb 26 2025\n")
    assert find_driver([tmp_path / "none", driver]) == "570.124.06"


def test_a_package_that_torch_cannot_load_is_a_finding(tmp_path: Path) -> None:
    """What the wheel of an NPU does where there is none: `import torch` raises, and doctor still tells why."""
    (tmp_path / "lone_device.py").write_text("raise ImportError('liblone.so: cannot open shared object file')\n")
    info = tmp_path / "lone_device-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lone_device\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\nlone = lone_device:load\n")

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
        env["PYTHONPATH"] = os.pathsep.join((str(tmp_path), str(Path(__file__).parents[2])))
        return subprocess.run(
            [sys.executable, "-m", "mmfn", *command], env=env, capture_output=True, text=True, timeout=600, check=False
        )

    done = run("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    done = run("config", "schema")
    assert done.returncode == 2
    assert done.stderr.startswith("mmfn: error: Failed to load the backend extension: lone. ")
    assert "set TORCH_DEVICE_BACKEND_AUTOLOAD=0 where it is not wanted" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(find_spec("torch_npu") is not None, reason="torch_npu is installed")
def test_a_run_on_npus_says_what_is_missing() -> None:
    with pytest.raises(UserError, match=r"need torch_npu, which is not installed; pip install 'mmfn\[npu\]', or use"):
        model.find_device("npu:0")
