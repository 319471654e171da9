"""`Collective`: which one a thread of this process is in, for another thread that says where its rank waits.

The call itself says so. Nobody else can: the frames of a thread that runs may not be walked. Each step on the way makes
an object, which may collect garbage, whose finalizers let the thread go on; what is walked is gone then, and the
process ends with SIGSEGV (Python 3.11).
"""

import threading

import torch


class Collective:
    """A call of one by this thread, for the time of a `with` block. Each call is an object of its own."""

    def __init__(self, method: str, axis: str, site: str = "") -> None:
        self.method, self.axis, self.site = method, axis, site

    def __enter__(self) -> None:
        if not torch.compiler.is_compiling():  # a graph is in none while it is made
            _under_way.setdefault(threading.get_ident(), self)  # the outermost one: `shift` may send by others

    def __exit__(self, *error: object) -> None:
        if not torch.compiler.is_compiling() and _under_way.get(threading.get_ident()) is self:
            del _under_way[threading.get_ident()]

    def __str__(self) -> str:
        return f"{self.method}{f' {self.site!r}' if self.site else ''} over {self.axis}"


_under_way: dict[int, Collective] = {}  # by thread


def find_collective() -> Collective | None:
    """The collective that this process is in, its main thread or one of autograd."""
    under_way, main = _under_way.copy(), threading.main_thread().ident
    others = {thread.ident for thread in threading.enumerate()} - {main}  # Python's own; those of autograd are not
    threads = sorted(under_way.keys() - others, key=lambda thread: thread != main)
    return under_way[threads[0]] if threads else None
