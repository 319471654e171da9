"""What is said of a machine: a line for each thing, and which of them stop a run."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from packaging.version import Version

from mmfn.errors import UserError
from mmfn.ops import TABLES, kernels, table
from mmfn.ops.packages import PACKAGES as KERNEL_PACKAGES
from mmfn.ops.packages.package import Machine, why_not
from mmfn.parallel.mesh.launch import BACKENDS
from mmfn.parallel.planning.devices import peak_flops
from mmfn.parallel.planning.plan import size
from mmfn.train.doctor.probe import DEVICE_PACKAGES, PACKAGES, Devices, Found

CANN = {"2.11": "9.1.0", "2.12": "9.1.0"}
"""Release of torch_npu -> the CANN it was published for. None is published for 2.13."""
PIP = {"cuda": "torch", "npu": "'mmfn[npu]'"}  # type of a device -> what is installed for it


@dataclass(frozen=True)
class Finding:
    """One line: whether a thing is well, absent ("left"), worth knowing ("note"), or stops a run ("WRONG")."""

    kind: Literal["ok", "left", "note", "WRONG"]
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind:6} {self.name}: {self.text}"


def judge(found: Found, device: str | None = None) -> list[Finding]:
    """All that is said of a machine. `device`: the type a run wants, whose absence is wrong; None: any will do."""
    return [
        *_machine(found),
        *_packages(found),
        *_npu_pairs(found),
        *_kernel_packages(found),
        *(finding for kind in DEVICE_PACKAGES for finding in _devices(kind, found, device == kind)),
        *_collectives(found),
        *_tables(),
        *(Finding("note", "variable", f"{name}={value}") for name, value in found.variables.items()),
    ]


def _machine(found: Found) -> Iterator[Finding]:
    names = ("mmfn", "python", "system", "processor", "cores", "memory")
    yield from (Finding("ok", name, found.machine[name]) for name in names)


def _packages(found: Found) -> Iterator[Finding]:
    for name, need in found.needs.items():
        have, wants = found.packages[name], f"{name}{need.specifier}"
        if have is None:
            yield Finding("WRONG", name, f"is not installed; pip install '{wants}'")
        elif not need.specifier.contains(have, prereleases=True):
            yield Finding("WRONG", name, f"{have}, but mmfn needs {need.specifier}; pip install '{wants}'")
        else:
            yield Finding("ok", name, f"{have} ({need.specifier})")
    for name in PACKAGES:
        if name not in found.needs and found.packages[name] is not None:
            yield Finding("ok", name, str(found.packages[name]))


def _npu_pairs(found: Found) -> Iterator[Finding]:
    """Whether torch, torch_npu and CANN are of one release."""
    npu, torch = found.packages["torch_npu"], found.packages["torch"]
    if npu is None or torch is None:
        return
    release = Version(npu).release
    if release[:3] != Version(torch).release[:3]:
        base = Version(torch).base_version
        yield Finding("WRONG", "torch_npu", f"{npu} is made for torch {npu}, here is {torch}; install torch_npu {base}")
    if found.cann is None:
        yield Finding("note", "CANN", "none was found; source its set_env.sh, which sets ASCEND_HOME_PATH")
        return
    known = CANN.get(f"{release[0]}.{release[1]}")
    fits = "no release is known to be made for it" if known is None else f"published together: {known}"
    yield Finding("ok" if found.cann == known else "note", "CANN", f"{found.cann} with torch_npu {npu}, {fits}")


def _kernel_packages(found: Found) -> Iterator[Finding]:
    """Every package of kernels on the devices that are here (or on those it is for): its version, or why not."""
    for package in KERNEL_PACKAGES.values():
        here = [kind for kind in package.needs if kind in found.devices and found.devices[kind].devices]
        for kind in here or package.needs:
            devices = found.devices.get(kind, Devices())
            machine = Machine(device=kind, versions=found.packages, generation=devices.generation)
            have, name, reason = (
                found.packages.get(package.distribution),
                f"package {package.name}",
                why_not(package, machine),
            )
            if have is None:
                yield Finding("left", name, str(reason))
                break
            if reason is None:
                yield Finding("ok", name, f"{have} for {kind}: {', '.join(package.kernels())}")
            else:
                yield Finding("note", name, f"not for {kind}: {reason}")


def _devices(kind: str, found: Found, is_wanted: bool) -> Iterator[Finding]:
    devices, package = found.devices.get(kind), DEVICE_PACKAGES[kind]
    problem: Literal["WRONG", "left"] = "WRONG" if is_wanted else "left"
    if devices is None:
        yield Finding(problem, kind, f"{package} is not installed; pip install {PIP[kind]}")
    elif devices.error is not None:
        yield Finding(problem, kind, f"{package} cannot be loaded ({devices.error}); {_cure(kind, devices)}")
    elif not devices.devices:
        yield Finding(problem, kind, f"{package} sees no device; {_cure(kind, devices)}")
    else:
        yield Finding("ok", kind, _describe(devices, found))


def _cure(kind: str, devices: Devices) -> str:
    if kind == "npu":
        return "source CANN's set_env.sh, and see npu-smi info"
    return "see nvidia-smi" if devices.libraries else "this torch was built without CUDA"


def _describe(devices: Devices, found: Found) -> str:
    names = [f"{devices.devices.count(name)} x {name}" for name in dict.fromkeys(devices.devices)]
    peak = peak_flops(devices.devices[0])
    parts = [", ".join(names), f"{size(devices.memory_bytes)} each"]
    parts += [f"{name} {number}" for name, number in (devices.libraries or {}).items()]
    parts += [f"driver {found.driver}"] if found.driver else []
    parts += [f"{peak / 1e12:.0f} TFLOP/s in bfloat16"] if peak else ["peak unknown: set train.peak_tflops for MFU"]
    return ", ".join(parts)


def _collectives(found: Found) -> Iterator[Finding]:
    """The backend of each type of device that is here."""
    there = {backend for devices in found.devices.values() for backend in devices.backends}
    for kind, backend in BACKENDS.items():
        if kind == "cpu" or (kind in found.devices and found.devices[kind].devices):
            text = f"{backend} for several ranks on {kind}"
            yield (
                Finding("ok", "ranks", text) if backend in there else Finding("WRONG", "ranks", f"torch has no {text}")
            )


def _tables() -> Iterator[Finding]:
    """Every table of kernels: how many ops of it are its own, or why there is none here."""
    base = _functions("portable")
    for name in TABLES:
        try:
            made = table(name)
        except UserError as error:
            yield Finding("left", f"kernels {name}", str(error))
            continue
        own = [op for op, fn in _functions(name).items() if fn is not base[op]]
        what = f"{len(base)} ops" if name == "portable" else f"{len(own)} of {len(base)} ops are its own"
        yield Finding("ok", f"kernels {name}", "; ".join((what, *made.notes)))


def _functions(name: str) -> Mapping[str, Callable[..., object]]:
    return {op: getattr(kernel, "fn", kernel) for op, kernel in kernels(table(name)).items()}
