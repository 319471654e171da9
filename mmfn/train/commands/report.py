"""`mmfn report`: runs, finished or still going, on one page that needs no network."""

import argparse
from collections.abc import Callable
from pathlib import Path

from mmfn.errors import UserError
from mmfn.train.report.log import read_log
from mmfn.train.report.runs import render_runs
from mmfn.train.run.folder import RUN_FILES, write_text


def run(args: argparse.Namespace, say: Callable[..., None]) -> None:
    """`mmfn report RUN...`: nothing in the folders of the runs is changed."""
    folders, out = [Path(path) for path in args.runs], Path(args.out)
    for folder in folders:
        if out.name in RUN_FILES and out.resolve().parent == folder.resolve():
            raise UserError(f"--out {args.out!r} is a file of the run {str(folder)!r} itself; choose another")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"--out {args.out!r} is a folder or lies in none; give the path of a file")
    write_text(out, render_runs([read_log(folder) for folder in folders]))
    say(f"report: {out}")
