"""The command line: `mmfn train CONFIG [key=value ...]`, `mmfn eval ...`, `mmfn generate ...`; also `python -m mmfn`.

Whatever a user can get wrong ends in one sentence on standard error and exit code 2, with nothing half-written. Of
several ranks (`torchrun --nproc-per-node N -m mmfn ...`) the first that fails says it, and the others end as well.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mmfn import __version__
from mmfn.parallel.mesh import launch

if TYPE_CHECKING:
    from mmfn.train.run.evaluate import Evaluation
    from mmfn.train.run.loop import Result

USAGE_ERROR, INTERRUPTED = 2, 130
# What torch and Python say in a RuntimeError when the machine, not the program, is at its limit.
LIMITS = ("can't allocate memory", "out of memory", "can't start new thread")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence instead of the usage block."""
        raise ValueError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. With `--debug` errors keep their traceback."""
    ranks, is_debug = launch.Ranks(), False
    try:
        ranks = launch.join()
        args = _parse(argv)
        args.ranks, is_debug = ranks, args.debug
        if ranks.size > 1 and args.run not in (train, evaluate):
            raise ValueError(f"mmfn {args.command} runs in one process; start it without torchrun")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # odd but readable images, one line for each
            args.run(args)
    except (KeyboardInterrupt, Exception) as error:
        code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else USAGE_ERROR
        if not ranks.fail():  # a consequence of what happened on another rank, which says it
            return code
        sentence = _sentence(error, is_debug)
        if sentence is None:
            raise
        _complain(sentence)
        return code
    return 0


def train(args: argparse.Namespace) -> None:
    """`mmfn train`: a run folder with checkpoint, metrics, evaluation and report."""
    from mmfn.train.config.load import describe, load_config

    loaded, say = load_config(args.config, args.overrides), _speaker(args.ranks)
    if args.print_config:
        say(describe(loaded).rstrip("\n"))
        return
    from mmfn.train.build.model import find_device
    from mmfn.train.build.program import layout_of
    from mmfn.train.build.run import prepare
    from mmfn.train.run import loop, progress
    from mmfn.train.run.allocator import retain_freed_memory

    config = loaded.config
    layout = layout_of(config.layout)
    launch.check_layout(layout, args.ranks, f"mmfn train {args.config}")
    if config.train.allocator == "retained":
        retain_freed_memory()
    device = find_device(config.model.device, args.ranks)
    with launch.placed(args.ranks, layout, device, config.layout.timeout_s) as place:
        run = prepare(loaded, say, place)
        result = loop.run_training(run, progress.standard(config.train.steps, config.train.log_every))
    if place.is_first:
        _conclude(result, config.train.steps)


def _conclude(result: "Result", num_steps: int) -> None:
    """The last lines of a training run."""
    from mmfn.train.run.progress import format_duration

    tokens = sum(record["tokens"] for record in result.records)
    rate = f"{tokens / result.train_s:,.0f} tokens/s"
    _say(f"trained {num_steps} steps in {format_duration(result.train_s)}, {rate}")
    for name, path in result.saved.items():
        _say(f"{name}: {path}")
    if result.evaluation is not None:
        _say(_summary(result.evaluation))
    _say(f"report: {result.folder / 'report.html'}")


def evaluate(args: argparse.Namespace) -> None:
    """`mmfn eval`: answer the held-out set of a config with the weights of `model.path`.

    Of several ranks each holds the whole model and answers its part, whatever the config's layout.
    """
    from mmfn.parallel.mesh.layout import Layout
    from mmfn.train.build.data import check_match, eos_token_ids, load_model_processor, open_dataset
    from mmfn.train.build.model import find_device, load_model
    from mmfn.train.config.load import load_config
    from mmfn.train.run import evaluate as evaluation
    from mmfn.train.run import folder as run_folder
    from mmfn.train.run import loop

    loaded = load_config(args.config, args.overrides)
    config = loaded.config
    if config.data.eval is None:
        raise ValueError("mmfn eval needs data.eval, the held-out set; set it in the file or as data.eval=FILE")
    if args.out is not None:
        run_folder.check_file("--out", args.out, loaded)
    processor = load_model_processor(config.model.path, config.data.template)
    held_out = open_dataset(config, config.data.eval, processor)
    device = find_device(config.model.device, args.ranks)
    with launch.placed(args.ranks, Layout(dp=args.ranks.size), device, config.layout.timeout_s) as place:
        model = load_model(config.model, config.train.seed, device)
        check_match(model, processor)
        found = evaluation.evaluate(
            model,
            held_out,
            batch_samples=config.eval.batch_samples,
            max_new_tokens=config.eval.max_new_tokens,
            eos_token_ids=eos_token_ids(Path(config.model.path), processor, model.cfg.vocab_size),
            axis=place.host["world"],
        )
    if args.out is not None and place.is_first:
        loop.write_text(Path(args.out), evaluation.to_json(found))
    _speaker(args.ranks)(_summary(found))
    found.check_finite()


def generate(args: argparse.Namespace) -> None:
    """`mmfn generate`: one greedy answer."""
    from mmfn.train.build.data import check_match, eos_token_ids, load_model_processor
    from mmfn.train.build.model import load_model
    from mmfn.train.config.schema import ModelSection
    from mmfn.train.run.evaluate import answer

    processor = load_model_processor(args.checkpoint)
    section = ModelSection(path=args.checkpoint, dtype=args.dtype, device=args.device, adapter=args.adapter)
    model = load_model(section, seed=0)
    check_match(model, processor)
    eos = eos_token_ids(Path(args.checkpoint), processor, model.cfg.vocab_size)
    print(answer(model, processor, args.prompt, args.image, max_new_tokens=args.max_new_tokens, eos_token_ids=eos))


def plan(args: argparse.Namespace) -> None:
    """`mmfn plan`: what a rank of a layout holds, computes and sends, without an accelerator; nothing is trained."""
    from mmfn.parallel.planning import plan as plans
    from mmfn.train.planning import search as plan_search
    from mmfn.train.planning.picture import render
    from mmfn.train.planning.step_plan import Workload
    from mmfn.train.run import folder as run_folder
    from mmfn.train.run import loop

    if args.diff is not None:
        alone = vars(_parse(["plan", "--diff", *args.diff]))
        if others := [name for name, value in alone.items() if getattr(args, name) != value and name != "debug"]:
            raise ValueError(f"mmfn plan --diff compares two files, {others[0]!r} has no effect beside it; remove it")
        _say(plans.diff(*map(plans.read_plan, args.diff)))
        return
    if args.config is None:
        raise ValueError("mmfn plan needs CONFIG, a run's YAML file or a model's config.json; see mmfn plan --help")
    if args.search and args.world is None:
        raise ValueError("mmfn plan --search needs --world N, the number of ranks")
    settings = plan_search.read(args.config, args.overrides)
    for name, target in (("--json", args.json), ("--html", args.html)):
        if target is not None:
            run_folder.check_file(name, target, settings)
    if args.json is not None and args.html is not None and Path(args.json).resolve() == Path(args.html).resolve():
        raise ValueError(f"--json and --html are both {args.json!r}; choose two files")
    workload = Workload(
        tokens=args.tokens,
        sample_tokens=args.sample_tokens,
        image_side=args.image_side,
        micro_batches=args.micro_batches,
    )
    request = partial(
        plan_search.Request, device=args.device, workload=workload, title=args.config, all_layers=args.all_layers
    )
    if args.search:
        found = plan_search.search(
            [request(config=config) for config in plan_search.candidates(settings, args.world)], say=_say
        )
        _say(plan_search.summary(found))
    else:
        found = [plan_search.plan_config(request(config=plan_search.with_world(settings, args.world)))]
        _say(found[0])
    if args.json is not None:
        loop.write_text(Path(args.json), found[0].to_json())
    if args.html is not None:
        loop.write_text(Path(args.html), render(found))


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
    sub = command("plan", plan, "memory, communication and time of a step on any number of ranks, worked out here")
    sub.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file (docs/config.md), or a model's config.json")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    sub.add_argument("--world", type=int, metavar="N", help="ranks; dp is set to make them (default: the layout's)")
    sub.add_argument("--device", default="910b", help="910b, a3, h100, h200 or cpu (default 910b)")
    sub.add_argument("--tokens", type=int, default=16_384, metavar="N", help="per rank and micro-batch (default 16384)")
    sub.add_argument("--sample-tokens", type=int, default=4096, metavar="N", help="of one sample (default 4096)")
    sub.add_argument("--image-side", type=int, default=32, metavar="N", help="patches; 0: no images (default 32)")
    sub.add_argument("--micro-batches", type=int, default=1, metavar="N", help="in a step (default 1)")
    sub.add_argument("--search", action="store_true", help="plan and rank all layouts that keep the given settings")
    sub.add_argument("--all-layers", action="store_true", help="trace every layer, also where extending is exact")
    sub.add_argument("--diff", nargs=2, metavar="FILE", help="what differs between two plans of --json")
    sub.add_argument("--json", metavar="FILE", help="write the plan (of a search: the best one)")
    sub.add_argument("--html", metavar="FILE", help="write a picture of the plan, or of all plans of a search")
    sub = command("generate", generate, "print a checkpoint's greedy answer to one prompt")
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a Hugging Face checkpoint")
    sub.add_argument("prompt", metavar="PROMPT", help="what the user says; <image> marks where an image stands")
    sub.add_argument("--image", action="append", default=[], metavar="FILE", help="an image; may be repeated")
    sub.add_argument("--adapter", metavar="FOLDER", help="a LoRA adapter of that checkpoint, in peft's format")
    sub.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default 128)")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default float32")
    sub.add_argument("--device", default="cpu", help="torch device (default cpu)")
    return parser


def _summary(evaluation: "Evaluation") -> str:
    right = f"{evaluation.num_correct} of {len(evaluation.answers)}"
    return f"held-out accuracy: {evaluation.accuracy:.4f} ({right}), loss {evaluation.loss:.4f}"


def _sentence(error: BaseException, is_debug: bool) -> str | None:
    """What is said about an error; None for a bug, and in debugging: then its traceback says more."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    reason = _one_line(error)
    if is_debug:
        return None
    if isinstance(error, ValueError | OSError):
        return reason
    if _is_limit(error):
        reason = f"the machine is at its limit ({reason[:200]})"
        return f"{reason}; use smaller buckets, batches or models, or fewer workers"
    if launch.is_lost(error):
        return f"another rank ended or does not answer ({reason[:200]}); see what it printed, or raise layout.timeout_s"
    return None


def _is_limit(error: BaseException) -> bool:
    is_limit = isinstance(error, RuntimeError) and any(text in str(error) for text in LIMITS)
    return is_limit or isinstance(error, MemoryError)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _complain(sentence: str) -> None:
    print(f"mmfn: error: {sentence}", file=sys.stderr)


def _speaker(ranks: launch.Ranks) -> Callable[..., None]:
    """Where lines for the user go: to standard output, of the first rank only."""
    return _say if ranks.index == 0 else lambda *values: None


def _say(*values: Any) -> None:
    print(*values, flush=True)
