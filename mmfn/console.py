"""`print_line`: what a user reads, at once."""

import os
import sys
from typing import TextIO


def print_line(*values: object, end: str = "\n", stream: TextIO | None = None) -> None:
    """Print values to a stream (default: standard output) and flush it.

    Where nobody reads any more, as behind `| head`, this and all that follows goes nowhere, and the work goes on.
    """
    stream = sys.stdout if stream is None else stream
    try:
        print(*values, end=end, file=stream, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
