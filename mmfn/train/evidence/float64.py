"""transformers in float64: a context in which casts to float32 that are written into modules widen instead.

The library computes norms, angles, softmaxes and the delta rule in float32 whatever a model's dtype, so a model that is
merely `.double()` agrees with exact arithmetic to 1e-4 at best. In this context it agrees to the last digits.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

WIDENED = ("transformers", "mmfn.models")  # mmfn's tables of angles are float32 for the same reason as the library's


class _Torch:
    """The module `torch` to whoever reads a name of it, with another float32."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name in ("float32", "float") else getattr(torch, name)


@contextlib.contextmanager
def float64(packages: tuple[str, ...] = WIDENED) -> Iterator[None]:
    """`torch.float32` means float64 in modules of `packages`, as do `Tensor.float` and the default dtype everywhere.

    Models built inside have float64 tables of frequencies and sinusoids too. Modules must be loaded before. Batches of
    mmfn are packed outside: what is made once and shared by later calls has the dtype it was made in.
    """
    wide = _Torch()
    modules = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith(tuple(f"{package}." for package in packages)) and vars(module).get("torch") is torch
    ]
    narrow_float, default = torch.Tensor.float, torch.get_default_dtype()
    setattr(torch.Tensor, "float", lambda tensor, *args, **kwargs: tensor.double())  # noqa: B010, no assignment to a method
    torch.set_default_dtype(torch.float64)
    for module in modules:
        vars(module)["torch"] = wide
    try:
        yield
    finally:
        for module in modules:
            vars(module)["torch"] = torch
        torch.set_default_dtype(default)
        setattr(torch.Tensor, "float", narrow_float)  # noqa: B010
