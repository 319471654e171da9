"""`mmfn report`: runs, finished or still going, on one page that needs no network."""

import argparse
from collections.abc import Callable
from pathlib import Path

from mmfn.train.report.log import read_log
from mmfn.train.report.runs import HEAD, render_runs
from mmfn.train.run.folder import check_file, write_text


def run(args: argparse.Namespace, say: Callable[..., None]) -> None:
    """`mmfn report RUN...`: nothing in the folders of the runs is changed."""
    folders, out = [Path(path) for path in args.runs], Path(args.out)
    check_file("--out", args.out, HEAD)
    write_text(out, render_runs([read_log(folder) for folder in folders]))
    say(f"report: {out}")
