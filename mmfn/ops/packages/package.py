"""`Package`: what is known of a package whose kernels can lie over entries of a table, and which machine may use it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Release = tuple[int, ...]


@dataclass(frozen=True)
class Span:
    """Versions from `first` on, before `end`. `Span((0, 6), (0, 7)).has("0.6.1")`."""

    first: Release
    end: Release

    def has(self, version: str) -> bool:
        """Whether a version is one of them; what stands behind its numbers ("2.8.3.post2") does not count."""
        numbers = re.match(r"\d+(\.\d+)*", version)
        release = tuple(map(int, numbers[0].split("."))) if numbers else ()
        return self.first <= release < self.end

    def __str__(self) -> str:
        first, end = (".".join(map(str, release)) for release in (self.first, self.end))
        return f">={first},<{end}"


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Versions of a distribution that compute wrong numbers, or none. `cure`: what to install in place of them.

    `generation`: of the GPUs on which they do, the major number of their capability (9: Hopper); None: on all devices.
    """

    distribution: str
    versions: Span
    reason: str
    cure: str
    generation: int | None = None

    def is_of(self, package: "Package", machine: "Machine") -> bool:
        """Whether it is what a machine has, among what the package needs there."""
        version = machine.versions.get(self.distribution)
        is_used = self.distribution in (package.distribution, *package.needs[machine.device])
        is_there = is_used and version is not None and self.versions.has(version)
        return is_there and (None in (self.generation, machine.generation) or self.generation == machine.generation)


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package and the entries of a table that its kernels take.

    `distribution`: what pip installs. `checked`: versions whose functions are those that are called here. `needs`: the
    type of each device it has kernels for, and the distributions that these need. `module`: what is imported to know
    that it can be. `kernels`: makes the entries, by name; it needs nothing of the package.
    """

    name: str
    distribution: str
    module: str
    checked: Span
    needs: Mapping[str, tuple[str, ...]]
    refusals: tuple[Refusal, ...] = ()
    kernels: Callable[[], Mapping[str, Any]]

    @property
    def distributions(self) -> tuple[str, ...]:
        """All that it is judged by."""
        needs = (name for names in self.needs.values() for name in names)
        return tuple(dict.fromkeys((self.distribution, *needs, *(r.distribution for r in self.refusals))))


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a package is judged by: the type of the device, and versions by distribution, None where one is missing.

    `generation`: of a GPU, the major number of its capability; None: not known, so that what is wrong on one is wrong.
    """

    device: str
    versions: Mapping[str, str | None]
    generation: int | None = None


def why_not(package: Package, machine: Machine) -> str | None:
    """Why a machine cannot use a package, in one sentence that ends with the fix; None: it can."""
    name, distribution = package.name, package.distribution
    if machine.device not in package.needs:
        kinds = " and ".join(package.needs)
        return f"{name} has kernels for {kinds}, not for {machine.device}; remove {name!r} from model.kernel_packages"
    for needed in (distribution, *package.needs[machine.device]):
        if machine.versions.get(needed) is None:
            what = "is not installed" if needed == distribution else f"needs {needed}, which is not installed"
            return f"{name} {what}; pip install {needed!r}, or remove {name!r} from model.kernel_packages"
    for refusal in package.refusals:
        if refusal.is_of(package, machine):
            version = machine.versions[refusal.distribution]
            return f"{name} is refused with {refusal.distribution} {version}: {refusal.reason}; {refusal.cure}"
    version = machine.versions[distribution]
    if version is None or not package.checked.has(version):
        return (
            f"{name} {version} is not among the versions whose functions were checked; pip install "
            f"'{distribution}{package.checked}', or remove {name!r} from model.kernel_packages"
        )
    return None
