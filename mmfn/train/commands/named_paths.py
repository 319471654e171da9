"""Which files and folders a user has named, on the command line or in the config it names."""

import argparse
from pathlib import Path

from mmfn.errors import UserError
from mmfn.train.planning.request import read
from mmfn.train.run.folder import input_paths

ARGUMENTS = ("config", "checkpoint", "out", "json", "html", "adapter", "source")


def named_paths(args: argparse.Namespace) -> list[Path]:
    """Files and folders, resolved; of a data file its folder, in which its media lie."""
    names = [value for name in ARGUMENTS if isinstance(value := getattr(args, name, None), str)]
    names += [*getattr(args, "image", ()), *getattr(args, "audio", ()), *(getattr(args, "diff", None) or ())]
    if isinstance(getattr(args, "config", None), str):
        try:
            settings = read(args.config, args.overrides)
        except UserError:  # it is broken, which is another error
            return [Path(name).resolve() for name in names]
        names += [*input_paths(settings).values()]
        names += [str(Path(path).parent) for name, path in input_paths(settings).items() if name in DATA_FILES]
        output = settings.values.get("output", {}).get("path")
        names += [output] if isinstance(output, str) else []
    return [Path(name).resolve() for name in names]


DATA_FILES = ("data.train", "data.eval")
