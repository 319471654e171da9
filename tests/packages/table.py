"""The portable table with packages laid over it, on a machine that has them."""

from dataclasses import replace

from mmfn.ops import Ops, portable
from mmfn.ops.packages import overlay
from mmfn.ops.packages.package import Machine
from mmfn.parallel.program import Program

VERSIONS = {"fla-core": "0.6.0", "triton": "3.7.1", "triton-ascend": "3.6.0", "flash-attn": "2.8.3.post2"}


def machine(device: str = "cuda", generation: int | None = 9, **changed: str | None) -> Machine:
    """One that has all packages in versions that are known. `changed`: other versions, with "_" for "-"."""
    versions = VERSIONS | {name.replace("_", "-"): version for name, version in changed.items()}
    return Machine(device=device, versions=versions, generation=generation)


def laid_over(*names: str) -> Ops:
    """By default by all packages."""
    return overlay(portable(cross_entropy="logits"), names or ("fla", "flash-attn"), machine())


def on_packages(program: Program) -> Program:
    """As a transform, which comes first."""
    return replace(program, ops=laid_over())
