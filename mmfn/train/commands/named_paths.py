"""Which files and folders a user has named, on the command line or in the config it names."""

import argparse
from pathlib import Path

from mmfn.errors import UserError
from mmfn.train.planning.request import read
from mmfn.train.run.folder import input_paths

DATA_FILES = ("data.train", "data.eval")
COMMAND = ("command", "action")  # what a command line begins with


def named_paths(args: argparse.Namespace) -> list[Path]:
    """Files and folders, resolved; of a data file its folder, in which its media lie.

    Every word behind the command is taken for one: those that are none name nothing that is there.
    """
    values = [value for name, value in vars(args).items() if name not in COMMAND]
    words = [word for value in values for word in (value if isinstance(value, list) else [value])]
    names = [word for word in words if isinstance(word, str) and word]
    if isinstance(getattr(args, "config", None), str):
        try:
            settings = read(args.config, args.overrides)
        except UserError:  # it is broken, which is another error
            return [Path(name).resolve() for name in names]
        names += [*input_paths(settings).values()]
        names += [str(Path(path).parent) for name, path in input_paths(settings).items() if name.startswith(DATA_FILES)]
        output = settings.values.get("output", {}).get("path")
        names += [output] if isinstance(output, str) else []
    return [Path(name).resolve() for name in names]
