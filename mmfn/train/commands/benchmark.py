"""`mmfn eval --tsv`: a benchmark's questions, answered by a checkpoint and scored."""

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from mmfn.errors import UserError
from mmfn.parallel.mesh import launch
from mmfn.parallel.mesh.host_values import wait_for_all
from mmfn.train.benchmarks.questions import BENCHMARKS
from mmfn.train.benchmarks.run import Asked, answer_questions, write_tables
from mmfn.train.benchmarks.tsv import TsvFile
from mmfn.train.build.forward import build_forward
from mmfn.train.build.match import check_match
from mmfn.train.build.model import find_device
from mmfn.train.build.processor import eos_token_ids, load_model_processor
from mmfn.train.build.shards import load_shards
from mmfn.train.config.inference import ASKED, LONGEST, checkpoint_config, for_inference
from mmfn.train.config.load import load_config
from mmfn.train.config.schema import Config
from mmfn.train.data.media import MediaReader
from mmfn.train.run.answer import AnswerSettings
from mmfn.train.run.watchdog import watched


def run(args: argparse.Namespace, say: Callable[..., None]) -> None:
    """Answer the questions of `--tsv` into the folder `--out`, go on where answers are there, and score them."""
    if args.benchmark is None or args.out is None:
        raise UserError(
            f"mmfn eval --tsv needs --benchmark, one of {', '.join(BENCHMARKS)}, and --out, a folder for the results"
        )
    config, folder = for_inference(_config(args), args.ranks.size), Path(args.out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {args.out!r} is a file; with --tsv give a folder, for answers and tables")
    asked = Asked(
        file=TsvFile(args.tsv), kind=args.benchmark, instruction=args.instruction, max_samples=args.max_samples
    )
    processor = load_model_processor(config.model.path, config.data.chat, config.data.media_settings)
    device = find_device(config.model.device, args.ranks)
    timeout_s = config.layout.timeout_s
    with (
        watched(args.ranks, None, timeout_s) as watch,
        launch.placed(args.ranks, config.layout.sizes, device, timeout_s) as place,
    ):
        watch.loss = f"what is answered is in {folder}; start it again to go on"
        model = load_shards(config, place)
        check_match(model, processor)
        settings = AnswerSettings(
            max_new_tokens=config.eval.max_new_tokens,
            eos_token_ids=eos_token_ids(Path(config.model.path), processor, model.cfg.vocab_size),
        )
        watch.enter("evaluation")
        answer_questions(
            build_forward(config, model, place),
            processor,
            asked,
            settings,
            folder,
            identity=_identity(config),
            batch_samples=config.eval.batch_samples,
            reader=MediaReader(processor.media, limits=config.data.limits),
            on_batch=lambda num_done: say(f"answered {num_done} of {len(asked)}"),
        )
        if place.is_first:
            score = write_tables(asked, folder)
            say(f"{BENCHMARKS[asked.kind].metric} of {args.benchmark}: {score:.4f} ({len(asked)} questions)")
            say(f"tables: {folder / 'results.xlsx'}, {folder / 'items.csv'}, {folder / 'summary.csv'}")
        wait_for_all(place.host["world"], "tables")


def _config(args: argparse.Namespace) -> Config:
    """That of a file, or of the folder of a checkpoint."""
    if Path(args.config).is_dir():
        return checkpoint_config({"path": args.config}, {}, args.overrides, counting=ASKED | {LONGEST})
    return load_config(args.config, args.overrides).config


def _identity(config: Config) -> str:
    """A digest of what decides answers but the questions: weights, by size and time of their files, and settings."""
    places = [config.model.path, *([config.model.adapter] if config.model.adapter is not None else [])]
    files = [file for place in places for file in sorted(Path(place).iterdir()) if file.is_file()]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    settings = [
        config.model.model_dump(mode="json", exclude={"path", "adapter", "device"}),
        config.data.media_settings,
        config.data.template,
        config.data.enable_thinking,
        config.eval.max_new_tokens,
    ]
    return hashlib.sha256(json.dumps([stats, settings]).encode()).hexdigest()[:12]
