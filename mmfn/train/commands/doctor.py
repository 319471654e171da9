"""`mmfn doctor`: what this machine has, whether its parts go together, and which kernels there are."""

import argparse
import os
from collections.abc import Callable

from mmfn.errors import UserError


def run(args: argparse.Namespace, say: Callable[..., None]) -> None:
    """A line for each thing. Raises ValueError where one stops a run."""
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # a package that torch cannot load is a finding here
    from mmfn.train.doctor.findings import judge
    from mmfn.train.doctor.probe import probe

    findings = judge(probe(), args.device)
    for finding in findings:
        say(str(finding))
    wrong = [f"{finding.name}: {finding.text}" for finding in findings if finding.kind == "WRONG"]
    if wrong:
        raise UserError(f"{len(wrong)} of {len(findings)} things are wrong, the first: {wrong[0]}")
