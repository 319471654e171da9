"""What is found on a machine: packages, device packages and their devices, drivers, variables. Nothing is judged here.

A device package is loaded in a process of its own: one that cannot be loaded, or that changes torch as it is, changes
nothing here.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from mmfn.ops.packages import PACKAGES as KERNEL_PACKAGES
from mmfn.train.evidence.machine import machine, versions

DEVICE_PACKAGES = {"cuda": "torch", "npu": "torch_npu"}
"""Type of a device -> the package whose import makes torch know it."""
PACKAGES = (
    "torch_npu",
    *dict.fromkeys(name for package in KERNEL_PACKAGES.values() for name in package.distributions),
    "av",
)
"""What is told of beside what mmfn cannot do without."""
VARIABLES = re.compile(
    "|".join(
        (
            r"OMP_NUM_THREADS|MKL_NUM_THREADS|TASK_QUEUE_ENABLE|CPU_AFFINITY_CONF|MULTI_STREAM_MEMORY_REUSE",
            r"PYTORCH_\w*ALLOC_CONF|TORCH_\w*|TORCHINDUCTOR_(?!CACHE_DIR)\w*|(CUDA|ASCEND|NCCL|HCCL|GLOO|ACLNN)_\w*|INF_NAN_MODE_\w*",
        )
    )
)
"""Those that change how torch, a device or its collectives work. mmfn sets none; torch itself sets the cache's."""
ASCEND_HOMES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
ASCEND_DRIVER = Path("/usr/local/Ascend/driver/version.info")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
PROBE_S = 120

_LOAD = """
import json, sys
kind, package = sys.argv[1:]
found = {"error": None, "devices": [], "memory_bytes": 0, "libraries": {}, "backends": [], "generation": None}
try:
    import torch
    if package != "torch":
        __import__(package)
    module, known = getattr(torch, kind), ("gloo", "nccl", "hccl")
    found["backends"] = [name for name in known if torch.distributed.is_backend_available(name)]
    found["devices"] = [module.get_device_name(i) for i in range(module.device_count())]
    if found["devices"]:
        found["memory_bytes"] = module.get_device_properties(0).total_memory
        found["generation"] = torch.cuda.get_device_capability(0)[0] if kind == "cuda" else None
    if kind == "cuda" and torch.version.cuda:
        found["libraries"] = {"CUDA": torch.version.cuda, "cuDNN": str(torch.backends.cudnn.version())}
        found["libraries"]["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
except BaseException as error:
    found["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
print("\\n" + json.dumps(found))
"""


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Devices of one type. `error`: why their package cannot be loaded. `libraries`: what it was built with.

    `backends`: of collectives, that torch has with it. `generation`: of GPUs, the major number of their capability.
    """

    error: str | None = None
    devices: Sequence[str] = ()
    memory_bytes: int = 0
    libraries: Mapping[str, str] | None = None
    backends: Sequence[str] = ()
    generation: int | None = None


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a machine has. `packages`: of those that mmfn needs or knows, the version, None where it is missing.

    `needs`: what mmfn itself says it needs. `devices`: by the type's name in torch, where its package is there.
    `cann`, `driver`: versions of Ascend's toolkit and of the driver, where files say so.
    """

    machine: Mapping[str, str]
    packages: Mapping[str, str | None]
    needs: Mapping[str, Requirement]
    devices: Mapping[str, Devices]
    cann: str | None = None
    driver: str | None = None
    variables: Mapping[str, str]


def probe() -> Found:
    """What this machine has."""
    needs = {r.name: r for r in map(Requirement, requires("mmfn") or ()) if r.marker is None}
    packages = {name: _version(name) for name in (*needs, *PACKAGES)}
    return Found(
        machine={**versions(), **machine()},
        packages=packages,
        needs=needs,
        devices={kind: _load(kind, name) for kind, name in DEVICE_PACKAGES.items() if packages.get(name)},
        cann=find_cann(os.environ),
        driver=find_driver((ASCEND_DRIVER, NVIDIA_DRIVER)),
        variables={name: value for name, value in sorted(os.environ.items()) if VARIABLES.fullmatch(name)},
    )


def find_cann(variables: Mapping[str, str]) -> str | None:
    """The version of CANN in the folder that its set_env.sh names; None without one, or where no file there tells."""
    for home in (Path(variables[name]) for name in ASCEND_HOMES if variables.get(name)):
        for file in sorted((*home.glob("*/ascend_toolkit_install.info"), *home.glob("version.cfg"))):
            if found := re.search(r"(?m)^\W*version=\W*(\d[\w.]*)", file.read_text(encoding="utf-8", errors="replace")):
                return found[1]
    return None


def find_driver(files: Sequence[Path]) -> str | None:
    """The version that the first of the files that is there tells of a driver."""
    for file in files:
        if file.is_file():
            found = re.search(r"\d+(\.\w+)+", file.read_text(encoding="utf-8", errors="replace"))
            return found[0] if found else None
    return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _load(kind: str, package: str) -> Devices:
    """What a device package says of its devices, loaded by itself."""
    own = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [sys.executable, "-c", _LOAD, kind, package]
    try:
        done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=PROBE_S, check=False)
    except subprocess.TimeoutExpired:
        return Devices(error=f"nothing was heard of it in {PROBE_S} s")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return Devices(error=f"its process ended with code {done.returncode}: {last}")
    return Devices(**json.loads(done.stdout.splitlines()[-1]))
