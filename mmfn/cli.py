"""The command line: `mmfn train CONFIG [key=value ...]`, `mmfn eval ...`, `mmfn data ...`; also `python -m mmfn`.

Whatever a user can get wrong ends in one sentence on standard error and exit code 2, with nothing half-written; a fault
of the program keeps its traceback and exits with 1. Of several ranks (`torchrun --nproc-per-node N -m mmfn ...`) the
first that fails says it, and the others end as well, with its code. All codes: docs/running.md.
"""

import argparse
import errno
import gc
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from mmfn.arguments import COMMANDS, parse
from mmfn.console import print_line
from mmfn.errors import FAULT, INTERRUPTED, LOST, USAGE_ERROR, Stop, UserError
from mmfn.parallel.mesh import launch

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)  # disks and tables of open files
# What torch and Python say in a RuntimeError when the machine, not the program, is at its limit.
LIMITS = ("can't allocate memory", "out of memory", "can't start new thread")
AUTOLOAD = "Failed to load the backend extension"  # what torch says of a package of a device while it is imported


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. With `--debug` errors keep their traceback."""
    ranks, args = launch.Ranks(), argparse.Namespace(debug=False)
    try:
        ranks = launch.join()
        args = parse(argv)
        args.ranks = ranks
        if ranks.size > 1 and not COMMANDS[args.command].is_on_ranks:
            raise UserError(f"mmfn {args.command} runs in one process; start it without torchrun")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # odd but readable images, one line for each
            _load(args.command).run(args, _say if ranks.index == 0 else _say_nothing)
    except Stop as stop:  # all ranks do
        if ranks.index == 0:
            _complain(str(stop), "stopped")
        return stop.code if ranks.size == 1 else launch.end_process(stop.code)
    except (KeyboardInterrupt, Exception) as error:
        return _fail(error, args, ranks)
    return 0


def entry() -> int:
    """The installed command: `main`, and an end of the process that waits for no thread whose file never answers."""
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = FAULT
    if any(thread.name.startswith("mmfn-") for thread in threading.enumerate()):
        launch.end_process(code)
    return code


def _fail(error: BaseException, args: argparse.Namespace, ranks: launch.Ranks) -> int:
    """Say what is wrong, once for all ranks, and end; returns the exit code of one process."""
    if launch.is_lost(error):
        ranks.wait_for_failure()  # of the one that knows more
    sentence = None if args.debug and isinstance(error, Exception) else _sentence(error, args)
    code = FAULT if sentence is None else _code(error)
    first = ranks.fail(code)
    if first is not None:  # a consequence of what happened on another rank, which says it
        return ranks.leave(first)
    if sentence is not None:
        _complain(sentence)
    elif ranks.size == 1:
        raise error
    else:
        traceback.print_exception(error)
    return ranks.leave(code)


def _code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return LOST if launch.is_lost(error) else USAGE_ERROR


def _load(command: str) -> Any:
    """The module of a command.

    What it imports stays until the process ends, so Python's collector of cycles need not look at it, now or later.
    """
    name, is_collecting = f"mmfn.train.commands.{COMMANDS[command].module}", gc.isenabled()
    if name in sys.modules:
        return sys.modules[name]
    gc.disable()
    try:
        module = import_module(name)
        gc.freeze()
    finally:
        if is_collecting:
            gc.enable()
    return module


def _sentence(error: BaseException, args: argparse.Namespace) -> str | None:
    """What is said about an error that whoever started this can mend; None for a fault of the program."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    reason = _one_line(error)
    if isinstance(error, UserError) or (isinstance(error, OSError) and _is_of_a_named_file(error, args)):
        return reason
    if _is_limit(error):
        reason = f"the machine is at its limit ({reason[:200]})"
        return f"{reason}; use smaller buckets, batches or models, fewer workers or another disk"
    if AUTOLOAD in reason:
        return (
            f"{reason[:200]}; a device package of torch is installed that cannot be loaded here: set up its device, or "
            "set TORCH_DEVICE_BACKEND_AUTOLOAD=0 where it is not wanted"
        )
    if launch.is_lost(error):
        return f"another rank ended or does not answer ({reason[:200]}); see what it printed, or raise layout.timeout_s"
    return None


def _is_limit(error: BaseException) -> bool:
    is_limit = isinstance(error, RuntimeError) and any(text in str(error) for text in LIMITS)
    return is_limit or isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in FULL)


def _is_of_a_named_file(error: OSError, args: argparse.Namespace) -> bool:
    """Whether an error is about a file or folder that the command line or the config names, or one inside it."""
    from mmfn.train.commands.named_paths import named_paths

    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    places = [Path(name).resolve() for name in names]
    return any(place.is_relative_to(root) for root in named_paths(args) for place in places)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _complain(sentence: str, what: str = "error") -> None:
    print(f"mmfn: {what}: {sentence}", file=sys.stderr)


def _say(*values: Any, end: str = "\n") -> None:
    print_line(*values, end=end)


def _say_nothing(*values: Any, end: str = "\n") -> None:
    """What ranks but the first do with lines for the user."""
