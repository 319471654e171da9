"""NPUs whose memory is the host's and whose kernels are the CPU's: whole steps run on "npu" tensors, with values.

torch_npu has been imported by `stub.load`: its dispatch, its autograd and its host checks are the released ones. Below
them `OnHost` computes: torch's operators by their CPU kernels, and `torch.ops.npu` by the emulated ones, after the real
call has gone through its host checks to the kernel it would start. What it sees on the way it keeps:

    with OnHost(device) as seen:
        step(...)
    seen.kernels     {"npu_rms_norm": {"aclnnRmsNorm"}, ...}
    seen.missing     torch's operators without a kernel for NPUs, which torch_npu would run on the CPU
    seen.reads       operators that copy from the device to the host, and so wait for it
"""

import ctypes
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from threading import RLock
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map

from tests.npu.operators import KERNELS, MEETING, bound

COMPOSITE = ("CompositeExplicitAutograd", "CompositeImplicitAutograd", "CompositeExplicitAutogradNonFunctional")
REACHED = (
    r"call (aclnn\w+) failed, error code is 207004",
    r"(aclnn\w+) or \w+GetWorkspaceSize not in libopapi",
    r"OPS function error: (\w+), error code is 207004",
)
NATIVE = {
    "aten::empty.memory_format",
    "aten::empty_strided",
    "aten::detach",
    "aten::lift_fresh",
    "aten::set_.source_Storage",
}
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select"}
LOCK = RLock()
"""Held while something is computed: ranks are threads, and torch_npu was not made for several in one process."""


def kernel_reached(call: Callable[[], Any]) -> str | None:
    """The kernel at which a real call ends, None where it needs none. Its host checks raise as they are."""
    try:
        call()
    except RuntimeError as error:
        for pattern in REACHED:
            if match := re.search(pattern, str(error)):
                return match.group(1)
        raise
    return None


def has_kernel(name: str, key: str) -> bool:
    """Whether an operator is registered for a dispatch key."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, key))


def matmul_backward(grad: Tensor, a: Tensor, b: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    """Gradients of `a @ b`, which is one operator on an NPU."""
    rows, columns = a[None] if a.ndim == 1 else a, b[:, None] if b.ndim == 1 else b
    grad = grad.unsqueeze(-1) if b.ndim == 1 else grad
    grad = grad.unsqueeze(-2) if a.ndim == 1 else grad
    da, db = (grad @ columns.mT).sum_to_size(rows.shape), (rows.mT @ grad).sum_to_size(columns.shape)
    return da.view(a.shape), db.view(b.shape)


def gather_backward(grad: Tensor, self_size: Any, dim: int, index: Tensor, sparse_grad: bool) -> Tensor:
    """The gradient of torch's gather."""
    return grad.new_zeros(self_size).scatter_add(dim, index, grad)


def repeat_interleave_backward(grad: Tensor, input: Tensor, repeats: int, dim: int) -> Tensor:
    """The gradient of torch's repeat_interleave along a dim."""
    return grad.unflatten(dim, (-1, repeats)).sum(dim % input.ndim + 1)


HERE: dict[str, Callable[..., Any]] = {
    "aten::matmul_backward": matmul_backward,
    "npu::npu_gather_backward": gather_backward,
    "npu::repeat_interleave_backward_int": repeat_interleave_backward,
}
"""What torch_npu makes of torch's own operators, and no CPU has."""


def on_npu(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type == "npu"


def alias(x: Tensor) -> Tensor:
    """A CPU tensor of the same memory; to be let go before x is."""
    if not x.numel():
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    length = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    memory = (ctypes.c_byte * (length * x.dtype.itemsize)).from_address(x.data_ptr())
    return torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, x.stride())


def place() -> str:
    """The function of mmfn that runs."""
    frame = sys._getframe()
    while frame is not None and "/mmfn/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return "" if frame is None else f"{frame.f_code.co_filename.rpartition('/mmfn/')[2]}:{frame.f_code.co_name}"


class OnHost(TorchDispatchMode):
    """See above. `device`: where results are. `is_eager`: to mmfn it is plain eager execution."""

    is_eager = True

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.kernels: dict[str, set[str | None]] = {}
        self.calls: Counter[str] = Counter()
        self.missing: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self._known: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it is made of comes by again
        kwargs, name = kwargs or {}, func.name()
        if any(issubclass(kind, FakeTensor) for kind in types):  # by which a DTensor learns of shapes
            return func(*args, **kwargs)
        if func.namespace == "mmfn":  # under another mode mmfn enters its operators: what they are made of counts
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        target = kwargs.get("device")
        is_ours = any(map(on_npu, tree_iter((args, kwargs)))) or (
            target is not None and torch.device(target).type == "npu"
        )
        if not is_ours:
            return func(*args, **kwargs)
        if has_kernel(name, "CompositeImplicitAutograd") and not has_kernel(name, "PrivateUse1"):
            with self:  # where autograd is off, it comes by whole
                return func.decompose(*args, **kwargs)
        may_copy = name == "aten::contiguous" and not kwargs  # torch_npu refuses another memory format by itself
        if name in NATIVE or (func.is_view and not may_copy):
            return func(*args, **kwargs)
        self.calls[name] += 1
        if func.namespace == "npu" and name not in HERE:
            return self._fused(func, args, kwargs)
        if not any(has_kernel(name, key) for key in ("PrivateUse1", *COMPOSITE)):
            self.missing[f"{name} in {place()}"] += 1
        return self._plain(func, args, kwargs)

    def _plain(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One of torch's operators by its CPU kernel."""
        name, target = func.name(), kwargs.get("device")
        where = self.device if target is None else torch.device(target)
        if where.type == "cpu" or (name == "aten::copy_" and not on_npu(args[0])) or name in READS:
            self.reads[f"{name} in {place()}"] += 1
        with LOCK, _disable_current_modes():
            given: dict[int, Tensor] = {}

            def host(x: Any) -> Any:
                if not on_npu(x):
                    return x
                own = alias(x)
                given[id(own)] = x
                held.append(own)
                return own

            held: list[Tensor] = []
            own_args, own_kwargs = tree_map(host, args), tree_map(host, kwargs)
            if target is not None:
                own_kwargs = {**own_kwargs, "device": torch.device("cpu")}
            out = HERE.get(name, func)(*own_args, **own_kwargs)

            def device(x: Any) -> Any:
                if not isinstance(x, Tensor):
                    return x
                return given[id(x)] if id(x) in given else self._moved(x, where)

            return tree_map(device, out)

    def _moved(self, x: Tensor, where: torch.device) -> Tensor:
        """A result, as new memory of the device; strides of it too."""
        if where.type == "cpu":
            return x.clone()
        new = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=self.device)
        if x.numel():
            alias(new).copy_(x)
        return new

    def _fused(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One of torch_npu's: the real call as far as it goes, then the emulated one."""
        name = func.name().removeprefix("npu::")
        with LOCK, _disable_current_modes():
            known = repr(tree_map(_described, (name, args, kwargs)))
            if known not in self._known:
                self._known.add(known)
                with torch._C._AutoDispatchBelowAutograd():
                    self.kernels.setdefault(name, set()).add(kernel_reached(lambda: func(*args, **kwargs)))
        with nullcontext() if name in MEETING else LOCK, _disable_current_modes():
            arguments: Mapping[str, Any] = tree_map(lambda x: alias(x) if on_npu(x) else x, bound(name, args, kwargs))
            out = KERNELS[name](**arguments)
        with LOCK, _disable_current_modes():
            return tree_map(lambda x: self._moved(x, self.device) if isinstance(x, Tensor) else x, out)


def _described(x: Any) -> Any:
    return (tuple(x.shape), x.dtype, x.stride()) if isinstance(x, Tensor) else x
