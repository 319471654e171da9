"""Kernels of installed packages, laid over the entries of a table: `model.kernel_packages`.

    overlay(table("cuda"), ["fla"], machine_of("cuda"))

One mechanism for all packages and devices. A package is never chosen by itself; one that was asked for and cannot be
used is refused, and so are shapes and dtypes that its kernels do not take.
"""

from collections.abc import Iterable
from dataclasses import replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch

from mmfn.errors import UserError
from mmfn.ops import Ops
from mmfn.ops.packages import fla, flash_attn
from mmfn.ops.packages.package import Machine, Package, why_not

PACKAGES: dict[str, Package] = {package.name: package for package in (fla.PACKAGE, flash_attn.PACKAGE)}
"""By the name that `model.kernel_packages` has for it."""


def overlay(ops: Ops, names: Iterable[str], machine: Machine | None) -> Ops:
    """The table with entries of packages in place of its own; its `notes` say which.

    `machine`: what the packages are judged by and loaded for; None: nothing is asked of them, as of a plan, whose
    tensors have no values. Raises ValueError for another name than those of `PACKAGES`, for a package that the machine
    cannot use, and for one that cannot be imported.
    """
    for name in names:
        if name not in PACKAGES:
            raise UserError(f"{name!r} is no package of kernels; use one of {', '.join(map(repr, PACKAGES))}")
        package = PACKAGES[name]
        if machine is not None:
            _load(package, machine)
        kernels = package.kernels()
        where = name if machine is None else f"{name} {machine.versions[package.distribution]}"
        ops = replace(ops, **kernels, notes=(*ops.notes, f"{', '.join(kernels)} by {where}"))
    return ops


def machine_of(device: str) -> Machine:
    """This machine with a device of a type: versions as their distributions say, nothing is imported."""
    names = {name for package in PACKAGES.values() for name in package.distributions}
    has_gpu = device == "cuda" and torch.cuda.is_available()
    generation = torch.cuda.get_device_capability()[0] if has_gpu else None
    return Machine(device=device, versions={name: _version(name) for name in names}, generation=generation)


def _load(package: Package, machine: Machine) -> None:
    if (reason := why_not(package, machine)) is not None:
        raise UserError(reason)
    try:
        import_module(package.module)
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"{package.name} cannot be imported ({error}); install it for torch {torch.__version__}, or remove "
            f"{package.name!r} from model.kernel_packages"
        ) from error


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
