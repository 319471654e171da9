"""`mmfn plan`: what a rank of a layout holds, computes and sends, without an accelerator; nothing is trained."""

import argparse
from collections.abc import Callable
from pathlib import Path

from mmfn.errors import UserError
from mmfn.parallel.planning import plan as plans
from mmfn.parallel.planning.devices import USUAL
from mmfn.train.build.model import find_family
from mmfn.train.config.load import Settings
from mmfn.train.config.schema import Config
from mmfn.train.planning.picture import HEAD, render
from mmfn.train.planning.request import Request, plan_config, read, with_world
from mmfn.train.planning.search import candidates, search, summary
from mmfn.train.planning.workload import Workload, largest_workload
from mmfn.train.run.folder import check_file, write_text

BARE_DEVICE = "910b"
SIZES = {"tokens": 16_384, "sample_tokens": 4096, "image_side": 32, "micro_batches": 1}


def run(args: argparse.Namespace, say: Callable[..., None]) -> None:
    """`mmfn plan`: what a rank of a layout holds, computes and sends, without an accelerator; nothing is trained."""
    if args.diff is not None:
        say(plans.diff(*map(plans.read_plan, args.diff)))
        return
    if args.config is None:
        raise UserError("mmfn plan needs CONFIG, a run's YAML file or a model's config.json; see mmfn plan --help")
    if args.search and args.world is None:
        raise UserError("mmfn plan --search needs --world N, the number of ranks")
    settings = read(args.config, args.overrides)
    for name, target, beginning in (("--json", args.json, plans.BEGINNING), ("--html", args.html, HEAD)):
        if target is not None:
            check_file(name, target, beginning)
    if args.json is not None and args.html is not None and Path(args.json).resolve() == Path(args.html).resolve():
        raise UserError(f"--json and --html are both {args.json!r}; choose two files")

    def request(config: Config, workload: Workload) -> Request:
        return Request(
            config=config,
            device=_device(args, config),
            workload=workload,
            title=args.config,
            all_layers=args.all_layers,
        )

    if args.search:
        same = _workload(args)
        ranked = search([request(config, same) for config in candidates(settings, args.world, say)], say=say)
        say(summary(ranked))
    else:
        config = _checked(settings, args.world, say)
        is_run = not args.config.endswith(".json") and all(getattr(args, name) is None for name in SIZES)
        workload = largest_workload(config, *find_family(config.model)) if is_run else _workload(args)
        ranked = [plan_config(request(config, workload))]
        say(ranked[0])
    if args.json is not None:
        write_text(Path(args.json), ranked[0].to_json())
    if args.html is not None:
        write_text(Path(args.html), render(ranked))


def _device(args: argparse.Namespace, config: Config) -> str:
    """The device to plan for: of a model alone, whose settings say none, the first of those that are known."""
    kind = config.model.device.partition(":")[0]
    device: str | None = args.device or (BARE_DEVICE if args.config.endswith(".json") else USUAL.get(kind))
    if device is None:
        raise UserError(f"no plan knows {config.model.device!r}; name one by --device")
    return device


def _checked(settings: Settings, world: int | None, say: Callable[..., None]) -> Config:
    loaded = with_world(settings, world)
    for note in loaded.notes:
        say(f"note: {note}")
    return loaded.config


def _workload(args: argparse.Namespace) -> Workload:
    """What the options say, or else the usual sizes."""
    sizes = {name: usual if (n := getattr(args, name)) is None else n for name, usual in SIZES.items()}
    return Workload(
        tokens=sizes["tokens"],
        sample_tokens=sizes["sample_tokens"],
        image_side=sizes["image_side"],
        micro_batches=sizes["micro_batches"],
    )
