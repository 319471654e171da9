"""What a step reads of its device, found on the CPU: every tensor that is not the host's own counts as the device's."""

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from mmfn import tree
from mmfn.batch import Batch, is_on_host

READS = {
    "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__", "cpu", "nonzero",
    "masked_select", "unique", "unique_consecutive", "equal", "bincount", "argwhere",
}  # fmt: skip
"""Functions of a tensor that wait for its device: its values, or a shape that depends on them."""


class HostReads(TorchFunctionMode):
    """Counts them by the place in the program. `found`: (file:line of mmfn, function) -> how often."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()
        self.device: dict[int, torch.UntypedStorage] = {}  # kept, so that no address comes twice

    def on_device(self, *tensors: Tensor) -> None:
        """Take tensors to be the device's."""
        for x in tensors:
            storage = x.untyped_storage()
            self.device[storage._cdata] = storage

    def is_of_device(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.untyped_storage()._cdata in self.device

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_iter((list(args), dict(kwargs))) if isinstance(x, Tensor)]
        is_of_device = any(map(self.is_of_device, given))
        name = getattr(func, "__name__", "")
        if is_of_device and (name in READS or _is_masked(name, args, kwargs)):
            self.found[_place(), name] += 1
        out = func(*args, **kwargs)
        if is_of_device and name not in ("cpu", "numpy"):
            self.on_device(*(x for x in tree_iter(out) if isinstance(x, Tensor)))
        return out


def _is_masked(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Indexing by a mask, and repeats whose sum is not given."""
    if name == "__getitem__":
        return any(isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_iter(args[1]))
    repeats = [x for x in args[1:2] if isinstance(x, Tensor)]
    return name == "repeat_interleave" and bool(repeats) and kwargs.get("output_size") is None


def _place() -> str:
    """Where in mmfn this is."""
    frame: Any = sys._getframe(2)
    while frame is not None and "/mmfn/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return "" if frame is None else f"{frame.f_code.co_filename.rpartition('/mmfn/')[2]}:{frame.f_code.co_name}"


@contextmanager
def reads_of(state: Any, batches: Sequence[Batch]) -> Iterator[tuple[Counter[tuple[str, str]], list[Batch]]]:
    """What is read for the time of the block, and the batches to take: what is the host's of them shares no memory."""
    own = [tree.map_with_path(lambda path, x: x.clone() if is_on_host(path) else x, batch) for batch in batches]
    mode = HostReads()
    mode.on_device(*(x for x in tree.leaves(state) if isinstance(x, Tensor)))
    for batch in own:
        mode.on_device(*(x for path, x in tree.items(batch) if not is_on_host(path)))
    _current.mode = mode
    try:
        with mode:
            yield mode.found, own
    finally:
        del _current.mode


_current = threading.local()
_run_backward = torch.autograd._engine_run_backward


def _watched_backward(*args: Any, **kwargs: Any) -> Any:
    """A mode is off inside of the functions it sees, and `torch.autograd.grad` is one."""
    with getattr(_current, "mode", nullcontext()):
        return _run_backward(*args, **kwargs)


torch.autograd._engine_run_backward = _watched_backward  # for all threads, of which those that count have a mode
