"""`mmfn train`: a run folder with checkpoint, metrics, evaluation and report."""

import argparse
from collections.abc import Callable

from mmfn.parallel.mesh import launch
from mmfn.train.build.model import find_device
from mmfn.train.build.run import prepare
from mmfn.train.commands.evaluate import summary
from mmfn.train.config.load import describe, load_config
from mmfn.train.run import progress
from mmfn.train.run.allocator import retain_freed_memory
from mmfn.train.run.progress import format_duration
from mmfn.train.run.result import Result
from mmfn.train.run.training import run_training


def run(args: argparse.Namespace, say: Callable[..., None]) -> None:
    """`mmfn train`: a run folder with checkpoint, metrics, evaluation and report."""
    loaded = load_config(args.config, args.overrides)
    if args.print_config:
        say(describe(loaded).rstrip("\n"))
        return
    config = loaded.config
    layout = config.layout.sizes
    launch.check_layout(layout, args.ranks, f"mmfn train {args.config}")
    if config.train.allocator == "retained":
        retain_freed_memory()
    shown = progress.standard(config.train.steps, config.train.log_every)
    device = find_device(config.model.device, args.ranks)
    with launch.placed(args.ranks, layout, device, config.layout.timeout_s) as place:
        result = run_training(prepare(loaded, say, place), shown)
    if place.is_first:
        _conclude(result, config.train.steps, say)


def _conclude(result: Result, num_steps: int, say: Callable[..., None]) -> None:
    """The last lines of a training run."""
    tokens = sum(record["tokens"] for record in result.records)
    rate = f"{tokens / result.train_s:,.0f} tokens/s"
    say(f"trained {num_steps} steps in {format_duration(result.train_s)}, {rate}")
    for name, path in result.saved.items():
        say(f"{name}: {path}")
    if result.evaluation is not None:
        say(summary(result.evaluation))
    say(f"report: {result.folder / 'report.html'}")
