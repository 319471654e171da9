"""The command line: `mmfn train CONFIG [key=value ...]`, `mmfn eval ...`, `mmfn data ...`; also `python -m mmfn`.

Whatever a user can get wrong ends in one sentence on standard error and exit code 2, with nothing half-written; a fault
of the program keeps its traceback and exits with 1. Of several ranks (`torchrun --nproc-per-node N -m mmfn ...`) the
first that fails says it, and the others end as well.
"""

import argparse
import errno
import gc
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from mmfn import __version__
from mmfn.errors import UserError
from mmfn.parallel.mesh import launch

COMMANDS = {
    "train": "train",
    "eval": "evaluate",
    "plan": "plan",
    "generate": "generate",
    "data": "data",
}  # and its module
KERNELS = ("portable", "reference", "cuda", "npu")
ON_RANKS = ("train", "eval")
FAULT, USAGE_ERROR, INTERRUPTED = 1, 2, 130
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)  # disks and tables of open files
# What torch and Python say in a RuntimeError when the machine, not the program, is at its limit.
LIMITS = ("can't allocate memory", "out of memory", "can't start new thread")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence instead of the usage block."""
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. With `--debug` errors keep their traceback."""
    ranks, args = launch.Ranks(), argparse.Namespace(debug=False)
    try:
        ranks = launch.join()
        args = _parse(argv)
        args.ranks = ranks
        if ranks.size > 1 and args.command not in ON_RANKS:
            raise UserError(f"mmfn {args.command} runs in one process; start it without torchrun")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # odd but readable images, one line for each
            _load(args.command).run(args, _say if ranks.index == 0 else _say_nothing)
    except (KeyboardInterrupt, Exception) as error:
        code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else USAGE_ERROR
        if not ranks.fail():  # a consequence of what happened on another rank, which says it
            return ranks.leave(code)
        sentence = None if args.debug and isinstance(error, Exception) else _sentence(error, args)
        if sentence is None:
            if ranks.size == 1:
                raise
            traceback.print_exception(error)
            return ranks.leave(FAULT)
        _complain(sentence)
        return ranks.leave(code)
    return 0


def _load(command: str) -> Any:
    """The module of a command.

    What it imports stays until the process ends, so Python's collector of cycles need not look at it, now or later.
    """
    name, is_collecting = f"mmfn.train.commands.{COMMANDS[command]}", gc.isenabled()
    if name in sys.modules:
        return sys.modules[name]
    gc.disable()
    try:
        module = import_module(name)
        gc.freeze()
    finally:
        if is_collecting:
            gc.enable()
    return module


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; overrides may stand before and behind options, which argparse cannot do for subcommands."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and ("overrides" not in args or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    if getattr(args, "diff", None) is not None:
        alone = vars(parser.parse_args(["plan", "--diff", *args.diff]))
        if others := [name for name, value in alone.items() if getattr(args, name) != value and name != "debug"]:
            raise UserError(f"mmfn plan --diff compares two files, {others[0]!r} has no effect beside it; remove it")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mmfn", description="Fine-tune multimodal language models as pure functions.")
    parser.add_argument("--version", action="version", version=f"mmfn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    def with_config(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("config", metavar="CONFIG", help="YAML file (docs/config.md)")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")

    sub = command("train", "train a model and evaluate it")
    with_config(sub)
    sub.add_argument("--print-config", action="store_true", help="print every setting with its origin and stop")
    sub = command("eval", "evaluate a checkpoint on the config's held-out set")
    with_config(sub)
    sub.add_argument("--out", metavar="FILE", help="write every answer to this JSON file")
    sub = command("plan", "memory, communication and time of a step on any number of ranks, worked out here")
    sub.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file (docs/config.md), or a model's config.json")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    sub.add_argument("--world", type=int, metavar="N", help="ranks; dp is set to make them (default: the layout's)")
    sub.add_argument("--device", default="910b", help="910b, a3, h100, h200 or cpu (default 910b)")
    sub.add_argument("--tokens", type=int, default=16_384, metavar="N", help="per rank and micro-batch (default 16384)")
    sub.add_argument("--sample-tokens", type=int, default=4096, metavar="N", help="of one sample (default 4096)")
    sub.add_argument(
        "--image-side", type=int, default=32, metavar="N", help="in inputs of the encoder; 0: no images (default 32)"
    )
    sub.add_argument("--micro-batches", type=int, default=1, metavar="N", help="in a step (default 1)")
    sub.add_argument("--search", action="store_true", help="plan and rank all layouts that keep the given settings")
    sub.add_argument("--all-layers", action="store_true", help="trace every layer, also where extending is exact")
    sub.add_argument("--diff", nargs=2, metavar="FILE", help="what differs between two plans of --json")
    sub.add_argument("--json", metavar="FILE", help="write the plan (of a search: the best one)")
    sub.add_argument("--html", metavar="FILE", help="write a picture of the plan, or of all plans of a search")
    sub = command("generate", "print a checkpoint's greedy answer to one prompt")
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a Hugging Face checkpoint")
    sub.add_argument("prompt", metavar="PROMPT", help="what the user says; <image>, <audio> mark where media stand")
    sub.add_argument("--image", action="append", default=[], metavar="FILE", help="an image; may be repeated")
    sub.add_argument("--audio", action="append", default=[], metavar="FILE", help="a sound file; may be repeated")
    sub.add_argument("--adapter", metavar="FOLDER", help="a LoRA adapter of that checkpoint, in peft's format")
    sub.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default 128)")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default float32")
    sub.add_argument("--device", default="cpu", help="torch device (default cpu)")
    sub.add_argument(
        "--kernels", choices=KERNELS, default="portable", help="the table of ops that computes (default portable)"
    )
    _add_data(command("data", "work on data sets"))
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    text = "write a data set of any format as messages, one line for each entry"
    sub = actions.add_parser("convert", help=text, description=text)
    sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")
    sub.add_argument("source", metavar="IN", help="JSON or JSONL file (docs/data.md)")
    sub.add_argument("out", metavar="OUT", help="JSONL file to write")
    sub.add_argument("--to", choices=("messages",), default="messages", help="format to write (default messages)")
    sub.add_argument("--format", default="auto", metavar="NAME", help="as data.format (default auto)")
    sub.add_argument("--column", action="append", default=[], metavar="NAME=KEY", help="as in data.columns; repeatable")
    sub.add_argument("--tag", action="append", default=[], metavar="NAME=VALUE", help="as in data.tags; repeatable")
    sub.add_argument("--ignore", action="append", default=[], metavar="KEY", help="as in data.ignore; repeatable")


def _sentence(error: BaseException, args: argparse.Namespace) -> str | None:
    """What is said about an error that whoever started this can mend; None for a fault of the program."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    reason = _one_line(error)
    if isinstance(error, UserError) or (isinstance(error, OSError) and _is_of_a_named_file(error, args)):
        return reason
    if _is_limit(error):
        reason = f"the machine is at its limit ({reason[:200]})"
        return f"{reason}; use smaller buckets, batches or models, fewer workers or another disk"
    if launch.is_lost(error):
        return f"another rank ended or does not answer ({reason[:200]}); see what it printed, or raise layout.timeout_s"
    return None


def _is_limit(error: BaseException) -> bool:
    is_limit = isinstance(error, RuntimeError) and any(text in str(error) for text in LIMITS)
    return is_limit or isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in FULL)


def _is_of_a_named_file(error: OSError, args: argparse.Namespace) -> bool:
    """Whether an error is about a file or folder that the command line or the config names, or one inside it."""
    from mmfn.train.commands.named_paths import named_paths

    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    places = [Path(name).resolve() for name in names]
    return any(place.is_relative_to(root) for root in named_paths(args) for place in places)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _complain(sentence: str) -> None:
    print(f"mmfn: error: {sentence}", file=sys.stderr)


def _say(*values: Any) -> None:
    print(*values, flush=True)


def _say_nothing(*values: Any) -> None:
    """What ranks but the first do with lines for the user."""
