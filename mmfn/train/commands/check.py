"""`mmfn check`: what can be checked of a run before a weight is read, on a machine without weights or accelerator."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mmfn.errors import UserError
from mmfn.models import Family
from mmfn.parallel.planning.alike import recording_mesh
from mmfn.parallel.planning.devices import USUAL
from mmfn.parallel.planning.plan import Plan, size
from mmfn.spec import num_params
from mmfn.train.build.checks import check_training, check_weights, measure_first, read_processor
from mmfn.train.build.data import open_dataset
from mmfn.train.build.kernels import planned_ops
from mmfn.train.build.model import find_family, trained_note
from mmfn.train.build.program import build_program
from mmfn.train.config.load import Loaded, known_keys, load_config
from mmfn.train.config.schema import Config
from mmfn.train.data import Processor
from mmfn.train.planning.request import check_fits
from mmfn.train.run.folder import check_output
from mmfn.train.run.resume import is_finished
from mmfn.train.run.resume_check import check_origin, find_origin, known_order
from mmfn.train.run.stored import ALONE
from mmfn.tree import Tree


def run(args: argparse.Namespace, say: Callable[..., None]) -> None:
    """`mmfn check CONFIG`: a line for each thing that was checked. Raises ValueError where one is wrong."""
    checks = _Checks(say)
    loaded = checks.make("settings", lambda: load_config(args.config, args.overrides), _settings_text)
    if loaded is None:
        raise UserError(checks.summary)
    for note in loaded.notes:
        say(f"note   settings: {note}")
    config = loaded.config
    checks.make("output", lambda: _check_output(loaded), str)
    found = checks.make(
        "model",
        lambda: find_family(config.model),
        lambda x: f"{x[0].name}, {num_params(x[0].specs(x[1])):,} parameters",
    )
    if found is None:
        raise UserError(checks.summary)
    family, cfg = found
    specs = checks.make("training", lambda: check_training(config, family, cfg), lambda x: _training_text(config, x))
    specs = family.specs(cfg) if specs is None else specs
    if config.model.init == "load":
        checks.make("weights", lambda: check_weights(config, family, cfg), str)
    if args.no_files:
        say("left   tokenizer, data and resume: --no-files")
    else:
        _check_files(checks, loaded, specs)
    checks.make("layout", lambda: _check_layout(config, family, cfg, specs, args.world), str)
    device = args.device or USUAL.get(config.model.device.partition(":")[0])
    if device is None:
        say(f"left   memory: no plan knows {config.model.device!r}; name one by --device")
    elif not checks.wrong:
        checks.make("memory", lambda: check_fits(config, device), _memory_text)
    if checks.wrong:
        raise UserError(checks.summary)
    say(f"{checks.num} checks, nothing is wrong")


@dataclass
class _Checks:
    """What was checked so far; `wrong`: a sentence of each check that failed, with its name."""

    say: Callable[..., None]
    num: int = 0
    wrong: list[str] = field(default_factory=list)

    def make(self, name: str, work: Callable[[], Any], describe: Callable[[Any], str]) -> Any:
        """The result of a check, None where it failed; its line is said."""
        self.num += 1
        try:
            result = work()
        except UserError as error:
            self.wrong.append(f"{name}: {' '.join(str(error).split())}")
            self.say(f"WRONG  {self.wrong[-1]}")
            return None
        self.say(f"ok     {name}: {describe(result)}")
        return result

    @property
    def summary(self) -> str:
        """What is said of all that is wrong, at the end."""
        return f"{len(self.wrong)} of {self.num} checks failed, the first: {self.wrong[0]}"


def _check_output(loaded: Loaded) -> str:
    path = repr(loaded.config.output.path)
    if is_finished(loaded, ALONE):
        return f"{path} holds this run, finished"
    check_output(loaded)
    return f"{path} can be written"


def _settings_text(loaded: Loaded) -> str:
    return f"{len(loaded.origins)} of {len(known_keys())} are set, all are known and go together"


def _check_files(checks: _Checks, loaded: Loaded, specs: Tree) -> None:
    """The tokenizer and media settings, by them the first entries of the data, and what the run goes on from."""
    config, is_readable = loaded.config, {"train": False, "eval": False}
    processor = checks.make(
        "tokenizer",
        lambda: read_processor(config),
        lambda x: f"{len(x.chat.tokenizer.get_vocab()):,} tokens, and media as the model reads them",
    )
    for name in ("train", "eval"):
        if processor is not None and getattr(config.data, name) is not None:
            first = checks.make(f"data.{name}", partial(measure_first, config, name, processor), str)
            is_readable[name] = first is not None
    checks.make("resume", lambda: _check_resume(loaded, processor if is_readable["train"] else None, specs), str)


def _check_resume(loaded: Loaded, processor: Processor | None, specs: Tree) -> str:
    """Where the run begins. `processor`: None where the data cannot be read. `specs`: of the model's parameters."""
    origin, config = find_origin(loaded), loaded.config
    if isinstance(origin, str):
        return origin
    data = config.data
    dataset = None if processor is None else open_dataset(data, data.train, processor, data.max_samples)
    return check_origin(*origin, loaded, known_order(config, dataset), specs)


def _memory_text(plan: Plan) -> str:
    peak, seconds = size(plan.peak_bytes), plan.time.total_s
    return f"{peak} a rank at most, it fits {plan.device}; a step of {seconds:.3g} s, {plan.assumptions[0]}"


def _training_text(config: Config, specs: Tree) -> str:
    (note,) = trained_note(specs) or ("all parameters are trained",)
    return f"{note}, by {config.optimizer.kind} and {config.objective.name}"


def _check_layout(config: Config, family: Family, cfg: Any, specs: Tree, world: int | None) -> str:
    """The program of the layout, and that it has the ranks that will be started."""
    layout = config.layout.sizes
    if world is not None:
        layout.check_world(world)
    mesh = recording_mesh(layout, 0)
    program = build_program(config, family, cfg, mesh, specs, planned_ops(config))
    ranks = f", {layout.world} ranks" if layout.world > 1 else ""
    return "; ".join((f"{layout}{ranks}", *program.notes))
