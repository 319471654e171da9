"""`mmfn replay`: a step of a run once more, and what differs first."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from mmfn.errors import UserError
from mmfn.train.run.folder import check_file, write_text
from mmfn.train.run.replay.replay import SIZES, Request, replay
from mmfn.train.run.replay.report import BEGINNING

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def run(args: argparse.Namespace, say: Callable[..., None]) -> None:
    """`mmfn replay`: a step of a run once more, and what differs first."""
    request = Request(
        folder=Path(args.run),
        step=args.step,
        layout=None if args.layout is None else read_layout(args.layout),
        dtype=None if args.dtype is None else DTYPES[args.dtype],
        kernels=args.ops,
        overrides=tuple(args.overrides),
        against=None if args.against is None else Path(args.against),
    )
    if args.json is not None:
        check_file("--json", args.json, BEGINNING)
    found = replay(request)
    if args.json is not None:
        write_text(Path(args.json), found.to_json())
    for line in found.lines():
        say(line)


def read_layout(text: str) -> dict[str, int]:
    """`dp=2,cp=2` -> sizes by name. Raises ValueError for anything else."""
    sizes = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in SIZES or not size.isdigit() or not int(size):
            raise UserError(f"--layout is {text!r} but must be sizes such as dp=2,cp=2, of {', '.join(SIZES)}")
        sizes[name] = int(size)
    return sizes
