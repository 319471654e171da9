"""The exception of a mistake that whoever calls can correct."""


class UserError(ValueError):
    """What a user got wrong, in one sentence: what was received, what is expected, and the fix.

    A command line shows the sentence alone. Any other exception is a fault of the program and keeps its traceback: so
    kernels, which only the program calls, raise plain ValueErrors.
    """
