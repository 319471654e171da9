"""`mmfn train`: a run folder with checkpoint, metrics, evaluation and report."""

import argparse
import shlex
from collections.abc import Callable

from mmfn.errors import spell_count
from mmfn.parallel.mesh import launch
from mmfn.train.build.model import find_device
from mmfn.train.build.run import prepare
from mmfn.train.commands.evaluate import summary
from mmfn.train.config.load import Loaded, describe, load_config
from mmfn.train.run import folder as run_folder
from mmfn.train.run import progress
from mmfn.train.run.allocator import retain_freed_memory
from mmfn.train.run.progress import format_duration
from mmfn.train.run.result import Result
from mmfn.train.run.resume import is_finished, is_restored
from mmfn.train.run.training import run_training
from mmfn.train.run.watchdog import watched


def run(args: argparse.Namespace, say: Callable[..., None]) -> None:
    """`mmfn train`: a run folder with checkpoint, metrics, evaluation and report."""
    loaded = load_config(args.config, args.overrides)
    if args.print_config:
        say(describe(loaded).rstrip("\n"))
        return
    config = loaded.config
    layout = config.layout.sizes
    launch.check_layout(layout, args.ranks, shlex.join(["mmfn", "train", args.config, *args.overrides]))
    if config.train.allocator == "retained":
        retain_freed_memory()
    device = find_device(config.model.device, args.ranks)
    run_folder.check_name("output.path", config.output.path)
    folder, timeout_s, result = run_folder.locate(config.output.path), config.layout.timeout_s, None
    with (
        watched(args.ranks, folder, timeout_s) as watch,
        launch.placed(args.ranks, layout, device, timeout_s) as place,
    ):
        if not is_finished(loaded, place.host["world"]):
            run = prepare(loaded, say, place, is_restored=is_restored(loaded, place.host["world"]))
            loaded, has_epochs = run.loaded, config.train.epochs is not None  # which are so many steps of these data
            if not (has_epochs and is_finished(loaded, place.host["world"])):
                steps = progress.standard(loaded.config.train.num_steps, config.train.log_every)
                result = run_training(run, steps, watch)
    if not place.is_first:
        return
    if result is not None:
        _conclude(result, say)
    else:
        say(_finished_text(loaded))


def _finished_text(loaded: Loaded) -> str:
    """What is said of a run that is asked for again."""
    config = loaded.config
    return (
        f"the run in {config.output.path} is finished: it has taken its {spell_count(config.train.num_steps, 'step')} "
        "with these settings; raise train.steps or train.epochs to go on, or set output.overwrite=true to train anew"
    )


def _conclude(result: Result, say: Callable[..., None]) -> None:
    """The last lines of a training run."""
    rate = f"{result.tally.num_tokens / result.train_s:,.0f} tokens/s"
    say(f"trained {spell_count(result.tally.num_steps, 'step')} in {format_duration(result.train_s)}, {rate}")
    for name, path in result.saved.items():
        say(f"{name}: {path}")
    if result.evaluation is not None:
        say(summary(result.evaluation))
    say(f"report: {result.folder / 'report.html'}")
