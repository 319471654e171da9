"""`mmfn plan`: what a rank of a layout holds, computes and sends, without an accelerator; nothing is trained."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mmfn.errors import UserError
from mmfn.parallel.planning import plan as plans
from mmfn.train.planning.picture import render
from mmfn.train.planning.request import Request, plan_config, read, with_world
from mmfn.train.planning.search import candidates, search, summary
from mmfn.train.planning.workload import Workload
from mmfn.train.run.folder import check_file, write_text


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
    for name, target in (("--json", args.json), ("--html", args.html)):
        if target is not None:
            check_file(name, target, settings)
    if args.json is not None and args.html is not None and Path(args.json).resolve() == Path(args.html).resolve():
        raise UserError(f"--json and --html are both {args.json!r}; choose two files")
    workload = Workload(
        tokens=args.tokens,
        sample_tokens=args.sample_tokens,
        image_side=args.image_side,
        micro_batches=args.micro_batches,
    )
    request = partial(Request, device=args.device, workload=workload, title=args.config, all_layers=args.all_layers)
    if args.search:
        ranked = search([request(config=config) for config in candidates(settings, args.world, say)], say=say)
        say(summary(ranked))
    else:
        loaded = with_world(settings, args.world)
        for note in loaded.notes:
            say(f"note: {note}")
        ranked = [plan_config(request(config=loaded.config))]
        say(ranked[0])
    if args.json is not None:
        write_text(Path(args.json), ranked[0].to_json())
    if args.html is not None:
        write_text(Path(args.html), render(ranked))
