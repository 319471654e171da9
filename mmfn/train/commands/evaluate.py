"""`mmfn eval`: the held-out set of a config, answered with the weights of `model.path`."""

import argparse
from collections.abc import Callable
from pathlib import Path

from mmfn.errors import UserError
from mmfn.ops import table
from mmfn.parallel.mesh import launch
from mmfn.parallel.mesh.layout import Layout
from mmfn.train.build.agreement import check_same, files_in_common, settings_in_common, weights_in_common
from mmfn.train.build.data import eos_token_ids, load_model_processor, open_dataset
from mmfn.train.build.match import check_match
from mmfn.train.build.model import find_device, load_model
from mmfn.train.config.load import load_config
from mmfn.train.run.evaluate import Evaluation, evaluate, to_json
from mmfn.train.run.folder import check_file, write_text


def run(args: argparse.Namespace, say: Callable[..., None]) -> None:
    """`mmfn eval`: answer the held-out set of a config with the weights of `model.path`.

    Of several ranks each holds the whole model and answers its part, whatever the config's layout.
    """
    loaded = load_config(args.config, args.overrides)
    config = loaded.config
    if config.data.eval is None:
        raise UserError("mmfn eval needs data.eval, the held-out set; set it in the file or as data.eval=FILE")
    if args.out is not None:
        check_file("--out", args.out, loaded)
    ops = table(config.model.kernels)
    processor = load_model_processor(config.model.path, config.data.template)
    held_out = open_dataset(config, config.data.eval, processor)
    device = find_device(config.model.device, args.ranks)
    with launch.placed(args.ranks, Layout(dp=args.ranks.size), device, config.layout.timeout_s) as place:
        model = load_model(config.model, config.train.seed, device)
        if args.ranks.size > 1:
            common = settings_in_common(config) | files_in_common(config) | weights_in_common(model.params)
            check_same(common, place.host["world"])
        check_match(model, processor)
        evaluation = evaluate(
            model,
            held_out,
            batch_samples=config.eval.batch_samples,
            max_new_tokens=config.eval.max_new_tokens,
            eos_token_ids=eos_token_ids(Path(config.model.path), processor, model.cfg.vocab_size),
            ops=ops,
            axis=place.host["world"],
        )
    if args.out is not None and place.is_first:
        write_text(Path(args.out), to_json(evaluation))
    say(summary(evaluation))
    evaluation.check_finite()


def summary(evaluation: Evaluation) -> str:
    right = f"{evaluation.num_correct} of {len(evaluation.answers)}"
    return f"held-out accuracy: {evaluation.accuracy:.4f} ({right}), loss {evaluation.loss:.4f}"
