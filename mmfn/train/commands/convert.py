"""`mmfn convert`: between Hugging Face checkpoints and folders of torch.distributed.checkpoint."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from mmfn.errors import UserError
from mmfn.interop.convert import dcp_to_hf, hf_to_dcp
from mmfn.interop.dcp_names import Prefixes
from mmfn.train.run.stored import find_state

STYLES = {"meg": ("model.", "flat"), "native": ("", "merged")}
"""Prefix of names and form of experts, as the trainers that users come from have them."""


def run(args: argparse.Namespace, say: Callable[..., None]) -> None:
    """`mmfn convert`: between Hugging Face checkpoints and folders of torch.distributed.checkpoint."""
    if args.action == "hf-to-dcp":
        prefix, experts = STYLES[args.style]
        count = hf_to_dcp(
            Path(args.source),
            Path(args.out),
            prefix=prefix if args.prefix is None else args.prefix,
            drop=args.drop,
            experts=args.experts or experts,
            has_head=args.tied_head,
        )
        say(f"{count:,} tensors: {args.out}")
        return
    if (state := find_state(Path(args.source))) is not None:
        raise UserError(f"{state} holds checkpoints of a run of mmfn; use mmfn export {args.source} {args.out}")
    layout = dcp_to_hf(
        Path(args.source),
        Path(args.out),
        model=Path(args.model),
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
        layout=args.experts,
        prefixes=None if args.cut is None else Prefixes(cut=args.cut, put=args.put),
    )
    say(f"layout {layout!r} read; checkpoint: {args.out}")
