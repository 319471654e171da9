"""`mmfn eval`: the held-out set of a config, answered with the weights of `model.path`."""

import argparse
from collections.abc import Callable
from pathlib import Path

from mmfn.errors import UserError
from mmfn.parallel.mesh import launch
from mmfn.parallel.mesh.host_values import wait_for_all
from mmfn.train.build.agreement import check_same, files_in_common, settings_in_common
from mmfn.train.build.data import open_dataset
from mmfn.train.build.forward import build_forward
from mmfn.train.build.kernels import build_ops
from mmfn.train.build.match import check_match
from mmfn.train.build.model import find_device
from mmfn.train.build.processor import eos_token_ids, load_model_processor
from mmfn.train.build.shards import load_shards
from mmfn.train.commands import benchmark
from mmfn.train.config.inference import for_inference
from mmfn.train.config.load import load_config
from mmfn.train.run.evaluate import BEGINNING, Evaluation, evaluate, to_json
from mmfn.train.run.folder import check_file, write_text
from mmfn.train.run.watchdog import watched


def run(args: argparse.Namespace, say: Callable[..., None]) -> None:
    """`mmfn eval`: answer the held-out set of a config with the weights of `model.path`, or a benchmark (`--tsv`).

    Several ranks hold shards, by the config's layout where it is of so many ranks, else by one of their number.
    """
    if args.tsv is not None:
        benchmark.run(args, say)
        return
    if told := [f"--{name}" for name in ("benchmark", "instruction", "max_samples") if getattr(args, name) is not None]:
        raise UserError(f"{told[0].replace('_', '-')} has no effect without --tsv; add it, or remove this")
    if Path(args.config).is_dir():
        raise UserError(
            f"{args.config} is a folder, which answers a benchmark by --tsv FILE --benchmark NAME; for a held-out set "
            f"give the config that names it: mmfn eval CONFIG model.init=load model.path={args.config}"
        )
    loaded = load_config(args.config, args.overrides)
    config = for_inference(loaded.config, args.ranks.size)
    if config.data.eval is None:
        raise UserError("mmfn eval needs data.eval, the held-out set; set it in the file or as data.eval=FILE")
    if args.out is not None:
        check_file("--out", args.out, BEGINNING)
    build_ops(config.model)  # refused before a weight is read
    if config.model.init == "random":
        say("note: model.init is random, so nothing was learned; model.init=load model.path=RUN/checkpoint is a run's")
    processor = load_model_processor(config.model.path, config.data.chat, config.data.media_settings)
    held_out = open_dataset(config.data, config.data.eval, processor)
    device = find_device(config.model.device, args.ranks)
    timeout_s = config.layout.timeout_s
    with (
        watched(args.ranks, None, timeout_s) as watch,
        launch.placed(args.ranks, config.layout.sizes, device, timeout_s) as place,
    ):
        watch.loss = "its answers are lost"
        if args.ranks.size > 1:
            common = settings_in_common(config) | files_in_common(config, {"data.eval": held_out})
            check_same(common, place.host["world"])
        model = load_shards(config, place)
        check_match(model, processor)
        watch.enter("evaluation")
        evaluation = evaluate(
            build_forward(config, model, place),
            held_out,
            batch_samples=config.eval.batch_samples,
            max_new_tokens=config.eval.max_new_tokens,
            eos_token_ids=eos_token_ids(Path(config.model.path), processor, model.cfg.vocab_size),
        )
        if args.out is not None and place.is_first:
            write_text(Path(args.out), to_json(evaluation))
        wait_for_all(place.host["world"], "results")  # what the first rank cannot write ends all
    if place.is_first:  # which has the answers
        say(summary(evaluation))
    evaluation.check_finite()


def summary(evaluation: Evaluation) -> str:
    """One line for a person."""
    right = f"{evaluation.num_correct} of {len(evaluation.answers)}"
    return f"held-out accuracy: {evaluation.accuracy:.4f} ({right}), loss {evaluation.loss:.4f}"
