"""The exceptions that are no fault of the program, what their sentences count, and the codes a process ends with.

The codes are listed in docs/running.md.
"""

FAULT, USAGE_ERROR, LOST, INTERRUPTED, TERMINATED = 1, 2, 3, 130, 143


class UserError(ValueError):
    """What a user got wrong, in one sentence: what was received, what is expected, and the fix.

    A command line shows the sentence alone. Any other exception is a fault of the program and keeps its traceback: so
    kernels, which only the program calls, raise plain ValueErrors.
    """


class MissingPackageError(UserError):
    """An optional package is not installed. What a run learns must not depend on that: it is no `BadSample`."""


def spell_count(number: int, noun: str) -> str:
    """A number of things in words: `1 rank`, `2 ranks`, `0 processes`."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{ending}"


class Stop(Exception):  # noqa: N818  # it is no error
    """A run that ends before its last step because it was asked to, on all ranks. `code`: that of the process."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code
