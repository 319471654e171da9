"""The arguments of every command of the command line, and what each is for."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from mmfn import __version__
from mmfn.errors import UserError

BENCHMARKS = ("ai2d", "chartqa", "docvqa", "mmmu", "choice", "exact")
DEVICE = "910b, a3, a100, h100, h200, b200, gb200, cpu, or a file of mmfn calibrate"
KERNELS = ("portable", "reference", "cuda", "npu")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence instead of the usage block."""
        raise UserError(f"{message}; see {self.prog} --help")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
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
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.text, description=command.text)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.add_arguments(sub)
    return parser


def _add_config(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("config", metavar="CONFIG", help="YAML file (docs/config.md)")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")


def _add_train(sub: argparse.ArgumentParser) -> None:
    _add_config(sub)
    sub.add_argument("--print-config", action="store_true", help="print every setting with its origin and stop")


def _add_eval(sub: argparse.ArgumentParser) -> None:
    _add_config(sub)
    sub.add_argument("--out", metavar="FILE", help="write every answer to this JSON file; with --tsv, a folder")
    sub.add_argument("--tsv", metavar="FILE", help="answer this benchmark; CONFIG may be a checkpoint's folder then")
    sub.add_argument("--benchmark", choices=BENCHMARKS, help="how its questions are asked and scored")
    sub.add_argument("--instruction", metavar="TEXT", help="asked behind every question, in place of the benchmark's")
    sub.add_argument("--max-samples", type=int, metavar="N", help="its first N questions alone")


def _add_plan(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file (docs/config.md), or a model's config.json")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    sub.add_argument("--world", type=int, metavar="N", help="ranks; dp is set to make them (default: the layout's)")
    sub.add_argument("--device", help=f"{DEVICE} (default: by model.device; of a config.json, 910b)")
    own = "of a run's file those of its largest buckets, else"
    sub.add_argument("--tokens", type=int, metavar="N", help=f"per rank and micro-batch ({own} 16384)")
    sub.add_argument("--sample-tokens", type=int, metavar="N", help="of one sample (4096)")
    sub.add_argument("--image-side", type=int, metavar="N", help=f"in inputs of the encoder; 0: no images ({own} 32)")
    sub.add_argument("--micro-batches", type=int, metavar="N", help=f"in a step ({own} 1)")
    sub.add_argument("--search", action="store_true", help="plan and rank all layouts that keep the given settings")
    sub.add_argument("--all-layers", action="store_true", help="trace every layer, also where extending is exact")
    sub.add_argument("--diff", nargs=2, metavar="FILE", help="what differs between two plans of --json")
    sub.add_argument("--json", metavar="FILE", help="write the plan (of a search: the best one)")
    sub.add_argument("--html", metavar="FILE", help="write a picture of the plan, or of all plans of a search")


def _add_check(sub: argparse.ArgumentParser) -> None:
    _add_config(sub)
    sub.add_argument("--world", type=int, metavar="N", help="ranks that will be started (default: the layout's)")
    sub.add_argument("--device", help="as of mmfn plan (default: by model.device, npu is 910b, cuda h100)")
    sub.add_argument("--no-files", action="store_true", help="of all files read the model's config.json alone")


def _add_suggest(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL", help="folder of a Hugging Face checkpoint; its weights are not read")
    sub.add_argument("data", metavar="DATA", help="file, pattern of files, or folder (docs/data.md)")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings that are kept (docs/config.md)")
    sub.add_argument("--device", default="910b", help=f"{DEVICE} (default 910b)")
    sub.add_argument("--world", type=int, required=True, metavar="N", help="ranks")
    sub.add_argument("--lora", action="store_true", help="train adapters, in place of all parameters")
    sub.add_argument("--out", metavar="FILE", help="write the config to this file (default: print it)")
    sub.add_argument("--rows", type=int, default=20_000, metavar="N", help="of the data measured (default 20000)")
    sub.add_argument("--jobs", type=int, metavar="N", help="processes that plan (default: one per core)")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    action = _actions(parser)
    _add_config(action("show", "print every setting with its origin: default, file and line, or command line"))
    sub = action("schema", "print the JSON schema by which editors know the settings")
    sub.add_argument("--out", metavar="FILE", help="write it to this file")


def _add_replay(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run", metavar="RUN", help="folder of a run (output.path)")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the other program")
    sub.add_argument("--step", type=int, required=True, metavar="N", help="the step, from 1")
    sub.add_argument("--layout", metavar="SIZES", help="as another layout takes it: dp=2,cp=2 (sizes left out are 1)")
    sub.add_argument(
        "--dtype", choices=("float64", "float32", "bfloat16"), help="and in this dtype, op by op on the run's inputs"
    )
    sub.add_argument("--ops", choices=KERNELS, help="and by this table, op by op on the run's inputs (in float64)")
    sub.add_argument("--against", metavar="RUN2", help="put the same step of another run beside it")
    sub.add_argument("--json", metavar="FILE", help="write all that was found")


def _add_generate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a Hugging Face checkpoint")
    sub.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="what the user says; <image>, <video>, <audio> mark where media stand",
    )
    sub.add_argument("--prompts", metavar="FILE", help="conversations to answer, in any format of data (docs/data.md)")
    sub.add_argument("--image", action="append", default=[], metavar="FILE", help="an image; may be repeated")
    sub.add_argument("--video", action="append", default=[], metavar="FILE", help="a video; may be repeated")
    sub.add_argument("--audio", action="append", default=[], metavar="FILE", help="a sound file; may be repeated")
    sub.add_argument("--adapter", metavar="FOLDER", help="a LoRA adapter of that checkpoint, in peft's format")
    sub.add_argument("--template", metavar="FILE", help="chat template, a jinja file or a name, as data.template")
    sub.add_argument("--thinking", choices=("on", "off"), help="as data.enable_thinking (default: the template's own)")
    sub.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default 128)")
    sub.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="an answer ends ahead of it; repeatable"
    )
    sub.add_argument("--stream", action="store_true", help="print the answer as it comes")
    sub.add_argument(
        "--sampling",
        choices=("greedy", "checkpoint"),
        default="greedy",
        help="checkpoint: as its generation_config.json says (default greedy); what follows wins over both",
    )
    sub.add_argument("--temperature", type=float, metavar="X", help="draw tokens; 0: the most likely ones")
    sub.add_argument("--top-k", type=int, metavar="N", help="of the N most likely tokens; 0: of all")
    sub.add_argument("--top-p", type=float, metavar="X", help="of the fewest whose probabilities add up to X")
    sub.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1: less of what is there already")
    sub.add_argument("--seed", type=int, metavar="N", help="of what is drawn (default 0)")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default float32")
    sub.add_argument("--device", default="cpu", help="torch device (default cpu)")
    sub.add_argument(
        "--kernels", choices=("auto", *KERNELS), default="auto", help="the table of ops (default: the device's)"
    )
    _add_set(sub)


def _add_report(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run (output.path), finished or still going")
    sub.add_argument(
        "--out", default="mmfn-report.html", metavar="FILE", help="the page (default mmfn-report.html, here)"
    )


def _add_doctor(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", choices=("cpu", "cuda", "npu"), help="what a run wants, whose absence is an error")


def _add_calibrate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", choices=("cpu", "cuda", "npu"), default="cpu", help="what to measure (default cpu)")
    sub.add_argument("--out", metavar="FILE", help="write them to this .yaml file (default: print them)")
    sub.add_argument("--seconds", type=float, default=0.3, metavar="S", help="of each measurement (default 0.3)")


def _add_set(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--set", action="append", default=[], metavar="key=value", help="a setting of layout, eval or data; repeatable"
    )


def _add_verify(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("card", metavar="CARD", help="YAML file of a card (docs/evidence)")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the card's config")
    sub.add_argument("--only", action="append", default=[], metavar="STAGE", help="run this stage; may be repeated")
    sub.add_argument(
        "--out", metavar="FILE.md", help="where the filled card goes (default: card.md in its output.path)"
    )


def _actions(parser: argparse.ArgumentParser) -> Callable[[str, str], argparse.ArgumentParser]:
    """A function that adds one action of a command, by its name and what it is for."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=text, description=text)
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show an error's traceback")
        return sub

    return action


def _add_data(parser: argparse.ArgumentParser) -> None:
    action = _actions(parser)
    sub = action("convert", "write a data set of any format as messages, one line for each entry")
    sub.add_argument("source", metavar="IN", help="file, pattern of files, or folder (docs/data.md)")
    sub.add_argument("out", metavar="OUT", help="JSONL file to write")
    sub.add_argument("--to", choices=("messages",), default="messages", help="format to write (default messages)")
    sub.add_argument("--format", default="auto", metavar="NAME", help="as data.format (default auto)")
    sub.add_argument("--column", action="append", default=[], metavar="NAME=KEY", help="as in data.columns; repeatable")
    sub.add_argument("--tag", action="append", default=[], metavar="NAME=VALUE", help="as in data.tags; repeatable")
    sub.add_argument("--ignore", action="append", default=[], metavar="KEY", help="as in data.ignore; repeatable")
    sub.add_argument("--index-folder", metavar="FOLDER", help="as data.index_folder (default: beside the data)")
    sub = action("check", "count and measure a data set as a model would be trained on it, and show how it reads")
    sub.add_argument("source", metavar="FILE", help="file, pattern of files, or folder (docs/data.md)")
    sub.add_argument("overrides", nargs="*", metavar="data.key=value", help="settings as in a config (docs/config.md)")
    sub.add_argument("--model", required=True, metavar="PATH", help="folder of a Hugging Face checkpoint")
    sub.add_argument("--samples", type=int, default=3, metavar="N", help="how many are shown (default 3)")
    sub.add_argument("--colour", choices=("auto", "always", "never"), default="auto", help="of what is learned")
    sub.add_argument("--html", metavar="OUT", help="write a page with all of it, and pictures")


def _add_dtype(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: as they are stored)")
    sub.add_argument("--to-bf16", dest="dtype", action="store_const", const="bfloat16", help="--dtype bfloat16")


def _add_export(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("checkpoint", metavar="RUN|STATE", help="run folder (its newest checkpoint), or one of a step")
    sub.add_argument("out", metavar="OUT", help="folder to write, new or empty")
    _add_dtype(sub)
    sub.add_argument("--adapter", choices=("merged", "separate"), default="merged", help="of LoRA (default merged)")
    sub.add_argument("--experts", choices=("hub", "transformers"), help="as output.experts (default: the run's)")
    sub.add_argument("--weights", choices=("last", "ema"), help="as output.weights (default: the run's)")
    sub.add_argument("--model", metavar="FOLDER", help="the model that was trained (default: the run's model.path)")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=text, description=text)
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show an error's traceback")
        sub.add_argument("source", metavar="IN", help="folder to read")
        sub.add_argument("out", metavar="OUT", help="folder to write, new or empty")
        return sub

    sub = action("hf-to-dcp", "a Hugging Face checkpoint to a folder of torch.distributed.checkpoint")
    sub.add_argument(
        "--style",
        choices=("meg", "native"),
        default="meg",
        help="names and experts (docs/checkpoints.md): prefix model. and experts flat, or neither prefix nor flat",
    )
    sub.add_argument("--prefix", metavar="TEXT", help="in front of every name (default: the style's)")
    sub.add_argument("--drop", default="", metavar="TEXT", help="beginning of names that is left out, such as thinker.")
    sub.add_argument("--experts", choices=("hub", "merged", "flat"), help="form of experts (default: the style's)")
    sub.add_argument("--tied-head", action="store_true", help="store a head that is tied to the embedding, too")
    sub = action("dcp-to-hf", "a folder of torch.distributed.checkpoint to a Hugging Face checkpoint")
    sub.add_argument(
        "--model", required=True, metavar="FOLDER", help="the original checkpoint, for all but the weights"
    )
    _add_dtype(sub)
    sub.add_argument("--experts", choices=("hub", "transformers"), default="hub", help="layout to write (default hub)")
    sub.add_argument("--cut", metavar="TEXT", help="beginning of names that is cut off (default: found out)")
    sub.add_argument("--put", default="", metavar="TEXT", help="with --cut: what is put there instead")


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command: its module in `mmfn.train.commands`, what it is for, its arguments, whether several ranks run it."""

    module: str
    text: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    is_on_ranks: bool = False


COMMANDS = {
    "train": Command(module="train", text="train a model and evaluate it", add_arguments=_add_train, is_on_ranks=True),
    "eval": Command(
        module="evaluate",
        text="evaluate a checkpoint on the config's held-out set",
        add_arguments=_add_eval,
        is_on_ranks=True,
    ),
    "plan": Command(
        module="plan",
        text="memory, communication and time of a step on any number of ranks, worked out here",
        add_arguments=_add_plan,
    ),
    "check": Command(
        module="check",
        text="check what can be checked of a run before weights are read, each thing by name",
        add_arguments=_add_check,
    ),
    "suggest": Command(
        module="suggest",
        text="choose batches, layout and memory savings for a model, a data set and so many ranks",
        add_arguments=_add_suggest,
    ),
    "config": Command(
        module="config", text="show a config's values, or what settings there are", add_arguments=_add_settings
    ),
    "replay": Command(
        module="replay", text="take a step of a run again and name what differs first", add_arguments=_add_replay
    ),
    "generate": Command(
        module="generate",
        text="print a checkpoint's answers to a prompt or a file of them",
        add_arguments=_add_generate,
        is_on_ranks=True,
    ),
    "verify": Command(
        module="verify",
        text="measure what a card states of a model and layout, and compare",
        add_arguments=_add_verify,
        is_on_ranks=True,
    ),
    "export": Command(
        module="export", text="write a training checkpoint as a Hugging Face one", add_arguments=_add_export
    ),
    "convert": Command(
        module="convert",
        text="convert checkpoints to and from torch.distributed.checkpoint",
        add_arguments=_add_convert,
    ),
    "report": Command(
        module="report", text="compare runs, finished or still going, on one page", add_arguments=_add_report
    ),
    "doctor": Command(
        module="doctor", text="show what this machine has and whether it goes together", add_arguments=_add_doctor
    ),
    "calibrate": Command(
        module="calibrate",
        text="measure this machine's figures, by which mmfn plan predicts",
        add_arguments=_add_calibrate,
        is_on_ranks=True,
    ),
    "data": Command(module="data", text="work on data sets", add_arguments=_add_data),
}
