"""`mmfn data check`: what is in a data set, as a model would be trained on it."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mmfn.errors import UserError
from mmfn.train.build.data import open_dataset
from mmfn.train.build.model import find_family
from mmfn.train.build.processor import load_model_processor
from mmfn.train.config.load import load_section
from mmfn.train.config.schema import DataSection, ModelSection
from mmfn.train.data import Dataset
from mmfn.train.data.bad import BadSample
from mmfn.train.data.reader import check_learned
from mmfn.train.dialect import check_dialect
from mmfn.train.report.picture import data_url
from mmfn.train.run.folder import check_file, write_text
from mmfn.train.survey import excerpt, text
from mmfn.train.survey.fill import BUDGETS, plan_batches
from mmfn.train.survey.page import HEAD, Excerpt, render_page
from mmfn.train.survey.survey import survey

SHOWN_S = 0.5  # between two numbers of the progress


def run(args: argparse.Namespace, say: Callable[..., None]) -> None:
    """`mmfn data check FILE --model PATH`: counts, lengths, budgets, what is skipped, and how samples read."""
    if other := next((name for name in ("data.train", "data.eval") if _is_set(name, args.overrides)), None):
        raise UserError(f"override: {other} has no effect here, where FILE is what is checked; remove it")
    if args.samples < 0:
        raise UserError(f"--samples must not be negative, got {args.samples}; 0 shows none")
    values = {"train": args.source, "token_buckets": list(BUDGETS), "tower_buckets": {}, "workers": 2, "cache_mib": 0}
    section: DataSection = load_section("data", values, args.overrides)
    check_dialect(section.dialect)
    if args.html is not None:
        check_file("--html", args.html, HEAD)
    processor = load_model_processor(args.model, section.chat, section.media_settings)
    model, cfg = find_family(ModelSection(path=args.model, init="random"))
    dataset = open_dataset(section, section.train, processor, section.max_samples)
    show = _Progress() if sys.stderr.isatty() else None
    budgets, workers = section.token_buckets, section.workers
    seen = survey(dataset, model, cfg, plan_batches, budgets=budgets, workers=workers, show=show)
    say(text.on_terminal(seen))
    samples = list(_excerpts(dataset, args.samples))
    for sample in samples:
        say(f"\nsample {sample.id}:\n{excerpt.on_terminal(sample.spans, is_coloured=_is_coloured(args.colour))}")
    if args.html is not None:
        subtitle = f"{model.name}, {args.model}"
        page = render_page(seen, samples, title=args.source, subtitle=subtitle)
        write_text(Path(args.html), page)
        say(f"\nwrote {args.html}")


def _is_set(name: str, overrides: Sequence[str]) -> bool:
    return any(text.partition("=")[0].strip() == name for text in overrides)


def _excerpts(dataset: Dataset, count: int) -> Iterator[Excerpt]:
    """The first samples that can be used."""
    tokenizer = dataset.processor.chat.tokenizer
    for index in range(len(dataset)):
        if count <= 0:
            return
        try:
            sample, record = dataset.sample(index), dataset.records[index]
            check_learned(sample, dataset.place(index))
        except BadSample:
            continue
        images = [data_url(dataset.find_medium(index, name)) for name in record.images]
        yield Excerpt(id=sample.id, spans=list(excerpt.spans(sample, tokenizer)), images=images)
        count -= 1


class _Progress:
    """Rows so far, on one line of the terminal."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, done: int, total: int) -> None:
        if (now := time.monotonic()) >= self._next or done == total:
            self._next = now + SHOWN_S
            print(f"\r{done:,} of {total:,} rows", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _is_coloured(choice: str) -> bool:
    if choice != "auto":
        return choice == "always"
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ
