"""A choice for the whole process that only a command line may make: whether glibc keeps freed memory.

By default every large block is returned to the system when freed, and each new one is faulted in again, page by page.
Kept, the steps of a CPU run are faster and the process stays at its peak size.
"""

import ctypes

from mmfn.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # numbers of mallopt(3)


def retain_freed_memory() -> None:
    """Keep freed memory in this process from now on. Raises ValueError where the C library has no such choice."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError) as error:
        raise UserError("train.allocator 'retained' needs glibc; set train.allocator=default") from error
    if not (mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1)):
        raise UserError("train.allocator 'retained' was refused by this glibc; set train.allocator=default")
