"""`mmfn config`: every value of a config with its origin, and the schema by which editors know the settings."""

import argparse
from collections.abc import Callable
from pathlib import Path

from mmfn.train.config.json_schema import schema_text
from mmfn.train.config.load import describe, load_config
from mmfn.train.run.folder import check_file, write_text


def run(args: argparse.Namespace, say: Callable[..., None]) -> None:
    """`mmfn config show CONFIG` or `mmfn config schema`."""
    if args.action == "show":
        loaded = load_config(args.config, args.overrides)
        say(describe(loaded).rstrip("\n"))
        for note in loaded.notes:
            say(f"# note: {note}")
    elif args.out is None:
        say(schema_text().rstrip("\n"))
    else:
        text = schema_text()
        check_file("--out", args.out, "".join(text.splitlines(keepends=True)[:3]))  # as far as the title
        write_text(Path(args.out), text)
        say(f"wrote {args.out}")
