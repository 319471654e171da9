"""`mmfn export`: a training checkpoint as a Hugging Face checkpoint, or as an adapter."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from mmfn.train.run.state_export import export_state, settings_of
from mmfn.train.run.stored import open_state

KINDS = {"merged": "checkpoint", "separate": "adapter"}


def run(args: argparse.Namespace, say: Callable[..., None]) -> None:
    """`mmfn export`: a training checkpoint as a Hugging Face checkpoint, or as an adapter."""
    checkpoint, skipped = open_state(Path(args.checkpoint))
    for sentence in skipped:
        say(sentence)
    config = settings_of(checkpoint, model=args.model, experts=args.experts, weights=args.weights)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    export_state(checkpoint, config, Path(args.out), KINDS[args.adapter], dtype)
    say(f"{KINDS[args.adapter]} of step {checkpoint.manifest.facts.step}: {args.out}")
