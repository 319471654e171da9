"""The command line: `mmfn train CONFIG [key=value ...]`, `mmfn eval ...`, `mmfn generate ...`; also `python -m mmfn`.

Whatever a user can get wrong ends in one sentence on standard error and exit code 2, with nothing half-written.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mmfn import __version__

if TYPE_CHECKING:
    from mmfn.train.evaluate import Evaluation

USAGE_ERROR, INTERRUPTED = 2, 130
# What torch and Python say in a RuntimeError when the machine, not the program, is at its limit.
LIMITS = ("can't allocate memory", "out of memory", "can't start new thread")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence instead of the usage block."""
        _complain(f"{message}; see {self.prog} --help")
        raise SystemExit(USAGE_ERROR)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. With `--debug` errors keep their traceback."""
    args = _parse(argv)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # odd but readable images, one line for each
            args.run(args)
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        _complain(_one_line(error))
        return USAGE_ERROR
    except (MemoryError, RuntimeError) as error:
        if args.debug or not _is_limit(error):
            raise
        reason = _one_line(error)[:200]
        _complain(f"the machine is at its limit ({reason}); use smaller buckets, batches or models, or fewer workers")
        return USAGE_ERROR
    return 0


def train(args: argparse.Namespace) -> None:
    """`mmfn train`: a run folder with checkpoint, metrics, evaluation and report."""
    from mmfn.train.config import describe, load_config

    loaded = load_config(args.config, args.overrides)
    if args.print_config:
        print(describe(loaded), end="")
        return
    from mmfn.train import loop, progress, setup
    from mmfn.train.allocator import retain_freed_memory

    config = loaded.config
    if config.train.allocator == "retained":
        retain_freed_memory()
    run = setup.prepare(loaded, say=_say)
    result = loop.run_training(run, progress.standard(config.train.steps, config.train.log_every))
    tokens = sum(record["tokens"] for record in result.records)
    rate = f"{tokens / result.train_s:,.0f} tokens/s"
    _say(f"trained {config.train.steps} steps in {progress.format_duration(result.train_s)}, {rate}")
    _say(f"checkpoint: {result.folder / 'checkpoint'}")
    if result.evaluation is not None:
        _say(_summary(result.evaluation))
    _say(f"report: {result.folder / 'report.html'}")


def evaluate(args: argparse.Namespace) -> None:
    """`mmfn eval`: answer the held-out set of a config with the weights of `model.path`."""
    from mmfn.train import evaluate as evaluation
    from mmfn.train import loop, run_folder, setup
    from mmfn.train.config import load_config

    loaded = load_config(args.config, args.overrides)
    config = loaded.config
    if config.data.eval is None:
        raise ValueError("mmfn eval needs data.eval, the held-out set; set it in the file or as data.eval=FILE")
    if args.out is not None:
        run_folder.check_file("--out", args.out, loaded)
    processor = setup.load_model_processor(config.model.path, config.data.template)
    held_out = setup.open_dataset(config, config.data.eval, processor)
    model = setup.load_model(config.model, config.train.seed)
    setup.check_match(model, processor)
    found = evaluation.evaluate(
        model,
        held_out,
        batch_samples=config.eval.batch_samples,
        max_new_tokens=config.eval.max_new_tokens,
        eos_token_ids=setup.eos_token_ids(Path(config.model.path), processor, model.cfg.vocab_size),
    )
    if args.out is not None:
        loop.write_text(Path(args.out), evaluation.to_json(found))
    _say(_summary(found))
    found.check_finite()


def generate(args: argparse.Namespace) -> None:
    """`mmfn generate`: one greedy answer."""
    from mmfn.train import setup
    from mmfn.train.config import ModelSection
    from mmfn.train.evaluate import answer

    processor = setup.load_model_processor(args.checkpoint)
    section = ModelSection(path=args.checkpoint, dtype=args.dtype, device=args.device)
    model = setup.load_model(section, seed=0)
    setup.check_match(model, processor)
    eos = setup.eos_token_ids(Path(args.checkpoint), processor, model.cfg.vocab_size)
    print(answer(model, processor, args.prompt, args.image, max_new_tokens=args.max_new_tokens, eos_token_ids=eos))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; overrides may stand before and behind options, which argparse cannot do for subcommands."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and ("overrides" not in args or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mmfn", description="Fine-tune multimodal language models as pure functions.")
    parser.add_argument("--version", action="version", version=f"mmfn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=run)
        return sub

    def with_config(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("config", metavar="CONFIG", help="YAML file (docs/config.md)")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")

    sub = command("train", train, "train a model and evaluate it")
    with_config(sub)
    sub.add_argument("--print-config", action="store_true", help="print every setting with its origin and stop")
    sub = command("eval", evaluate, "evaluate a checkpoint on the config's held-out set")
    with_config(sub)
    sub.add_argument("--out", metavar="FILE", help="write every answer to this JSON file")
    sub = command("generate", generate, "print a checkpoint's greedy answer to one prompt")
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a Hugging Face checkpoint")
    sub.add_argument("prompt", metavar="PROMPT", help="what the user says; <image> marks where an image stands")
    sub.add_argument("--image", action="append", default=[], metavar="FILE", help="an image; may be repeated")
    sub.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default 128)")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default float32")
    sub.add_argument("--device", default="cpu", help="torch device (default cpu)")
    return parser


def _summary(evaluation: "Evaluation") -> str:
    right = f"{evaluation.num_correct} of {len(evaluation.answers)}"
    return f"held-out accuracy: {evaluation.accuracy:.4f} ({right}), loss {evaluation.loss:.4f}"


def _is_limit(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(text in str(error) for text in LIMITS)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _complain(sentence: str) -> None:
    print(f"mmfn: error: {sentence}", file=sys.stderr)


def _say(*values: Any) -> None:
    print(*values, flush=True)
