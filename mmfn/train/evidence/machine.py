"""Where and with what figures were measured."""

import os
import platform
import subprocess
from pathlib import Path

import torch

import mmfn


def machine() -> dict[str, str]:
    """Processor, cores that this process may use, memory and accelerators."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    kind, names = torch.accelerator.current_accelerator(), list[str]()
    if kind is not None:
        names = [getattr(torch, kind.type).get_device_name(i) for i in range(torch.accelerator.device_count())]
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory": f"{memory:.0f} GiB",
        "accelerators": ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "none",
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Of mmfn (with the commit of a checkout), Python and what computes."""
    import transformers

    return {
        "mmfn": mmfn.__version__ + _commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def _commit() -> str:
    """ " (COMMIT)" of a checkout, with what was changed in it; "" of an installed package."""
    folder = Path(mmfn.__file__).parents[1]
    if not (folder / ".git").exists():
        return ""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    try:
        commit, changed = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain", "--", "mmfn")
    except OSError:  # there is no git
        return ""
    return f" ({commit}{', changed' if changed else ''})" if commit else ""
