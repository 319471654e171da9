"""`mmfn generate`: one greedy answer."""

import argparse
from collections.abc import Callable
from pathlib import Path

from mmfn.ops import table
from mmfn.train.build.data import eos_token_ids, load_model_processor
from mmfn.train.build.match import check_match
from mmfn.train.build.model import load_model
from mmfn.train.config.schema import ModelSection
from mmfn.train.run.evaluate import answer


def run(args: argparse.Namespace, say: Callable[..., None]) -> None:
    """`mmfn generate`: one greedy answer."""
    processor = load_model_processor(args.checkpoint)
    section = ModelSection(
        path=args.checkpoint, dtype=args.dtype, device=args.device, adapter=args.adapter, kernels=args.kernels
    )
    ops = table(args.kernels)
    model = load_model(section, seed=0)
    check_match(model, processor)
    eos = eos_token_ids(Path(args.checkpoint), processor, model.cfg.vocab_size)
    media, limits = (args.image, args.audio), {"max_new_tokens": args.max_new_tokens, "eos_token_ids": eos}
    say(answer(model, processor, args.prompt, *media, **limits, ops=ops))
