"""`mmfn calibrate`: the figures of this machine, by which `mmfn plan --device FILE` predicts."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from mmfn.errors import UserError
from mmfn.ops import table
from mmfn.parallel.mesh import launch
from mmfn.parallel.mesh.layout import Layout
from mmfn.parallel.planning.calibration import measure
from mmfn.parallel.planning.devices import Device, like
from mmfn.train.build.model import find_device
from mmfn.train.evidence.machine import machine
from mmfn.train.planning.device_file import SUFFIXES, device_text
from mmfn.train.run.folder import check_file, write_text

TIMEOUT_S = 600.0
WRITTEN = "Measured by mmfn calibrate: "  # what its file begins with
BY_RANKS = ("link", "network", "call_s", "hop_s", "network_hop_s")


def run(args: argparse.Namespace, say: Callable[..., None]) -> None:
    """`mmfn calibrate`: measure, then print the file or write it with --out.

    Of several ranks (torchrun) all measure, what they send each other too, and the slowest counts.
    """
    if not 0 < args.seconds < 60:
        raise UserError(f"--seconds {args.seconds:g} must be above 0 and below 60; it is the time of one measurement")
    if args.out is not None and not args.out.endswith(SUFFIXES):
        raise UserError(f"--out {args.out!r} must end in .yaml; mmfn plan knows a device's file by it")
    if args.out is not None:
        check_file("--out", args.out, f"# {WRITTEN}")
    device = find_device(args.device, args.ranks)
    base = like(device.type, _name(device))
    nodes = args.ranks.size // args.ranks.local_size
    layout = Layout(replicate=nodes, dp=args.ranks.size // nodes)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with launch.placed(args.ranks, layout, device, TIMEOUT_S) as place:
        ops = table("portable" if device.type == "cpu" else device.type)
        found = measure(base, ops, place, dtype, seconds=args.seconds)
        found = replace(found, ranks_per_node=max(args.ranks.local_size, base.ranks_per_node), source="mmfn calibrate")
        text = device_text(found, _head(found, base, device, dtype))
        if place.is_first and args.out is not None:
            write_text(Path(args.out), text)
            say(f"wrote {args.out}; plan with mmfn plan CONFIG --device {args.out}")
        elif args.out is None:
            say(text.rstrip())


def _name(device: torch.device) -> str:
    return "" if device.type == "cpu" else str(getattr(torch, device.type).get_device_name(device))


def _head(found: Device, base: Device, device: torch.device, dtype: torch.dtype) -> list[str]:
    """What was measured, and what is still that of another device."""
    rest = [name for name in BY_RANKS if getattr(found, name) == getattr(base, name)]
    here = machine()
    what = _name(device) or f"{here['processor']}, {torch.get_num_threads()} of {here['cores']} cores"
    return [
        f"{WRITTEN}{what}; {str(dtype).removeprefix('torch.')}, torch {torch.__version__}.",
        "flops is the best product that was seen, and shares are of it.",
        *([f"Not measured but those of {base.name}: {', '.join(rest)}; start it on more ranks."] if rest else []),
    ]
