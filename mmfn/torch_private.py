"""What this package uses of torch that torch keeps private: one function or name each, with what it was checked on.

Each has a test in `tests/test_torch_private.py`, which tells on a new torch what to replace. Checked on torch 2.13.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter, methodcaller
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten

FLASH_CPU = _aten._scaled_dot_product_flash_attention_for_cpu.default
"""(q_BHLC, k_BKSC, v_BKSC, dropout, is_causal, *, attn_mask, scale) -> (o_BHLC, lse_BHL); kv heads may be fewer."""
FLASH_CPU_GRAD = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default
"""(do, q, k, v, o, lse, dropout, is_causal, *, attn_mask, scale) -> (dq, dk, dv)."""
READ_ONE = _aten._local_scalar_dense
"""What `.item()` and `.tolist()` of one value appear as to a dispatch mode."""
UNSAFE_VIEW = _aten._unsafe_view
"""A view whose schema does not say that it is one."""


def dispatch_modes() -> Sequence[Any]:
    """The dispatch modes that are active, outermost first."""
    number = torch._C._len_torch_dispatch_stack()
    return [torch._C._get_dispatch_stack_at(i) for i in range(number)] if number else ()


class EagerMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode for eager programs: at every operator torch spares it the wrapper that keeps compilers out."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


# ---- called at every operator of a plan, and so without a function around them

autograd_node: Callable[[], Any] = torch._C._current_autograd_node
"""The node whose backward is running on this thread, or None outside of a backward."""
node_number: Callable[[Any], int] = methodcaller("_sequence_nr")
"""The number a node was made with."""
storage_key: Callable[[torch.UntypedStorage], int] = attrgetter("_cdata")
"""The address of a storage's record, the same for all tensors that share it, while it lives."""


def next_node_number() -> int:
    """The number that the next node of autograd's graph will get on this thread."""
    number: int = torch._C._autograd._get_sequence_nr()
    return number


def saving_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """The innermost pair of `saved_tensors_hooks` on this thread, of several the only one that is called, or None."""
    pair: tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None
    pair = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return pair


def local_tensor(x: Any) -> Tensor:
    """This rank's part of a DTensor, without a node in autograd's graph."""
    local: Tensor = x._local_tensor
    return local


def schema(operator: Any) -> Any:
    """What an overload of an operator declares of its arguments and returns."""
    return operator._schema


def assert_on_device(condition: Tensor, message: str) -> None:
    """Stop the program where a 0-D bool on the device is false; the host does not wait for it.

    A device without a kernel for that does not look: it would wait for the CPU, which looks in its place.
    """
    if _has_kernel("aten::_assert_async.msg", condition.device):
        torch._assert_async(condition, message)


def _has_kernel(operator: str, device: torch.device) -> bool:
    """Whether a device has a kernel of its own; one that torch does not bring itself may lack it, and then copies all
    there is to the CPU and back."""
    key = torch._C._dispatch_key_for_device(device.type)
    return key != "PrivateUse1" or torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)


def tell_compiler(is_true: bool) -> None:
    """A fact about sizes that a graph does not know; a program in which it is false stops."""
    torch._check(is_true)  # type: ignore[no-untyped-call]


# ---- DTensor, process groups and collectives


def set_local_tensor_(x: Any, local: Tensor) -> None:
    """Let a DTensor hold `local`, wherever that lies: torch's own constructor moves it to the mesh's device."""
    x._local_tensor = local


def mesh_settings(*, rank: int, has_groups: bool) -> dict[str, Any]:
    """Arguments of a DeviceMesh as `rank` sees it; without `has_groups` it makes no process groups, and needs none."""
    return {"_init_backend": has_groups, "_rank": None if has_groups else rank}


def rename_group(name: str, other: str) -> None:
    """Give the process group of a name one more."""
    from torch._C._distributed_c10d import _register_process_group, _resolve_process_group

    _register_process_group(other, _resolve_process_group(name))  # type: ignore[arg-type]


def group_backend(name: str, device_type: str) -> Any:
    """What carries the collectives of a process group on a type of device. RuntimeError where nothing does."""
    from torch._C._distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)._get_backend(torch.device(device_type))  # type: ignore[arg-type]


def all_gather(x: Tensor, size: int, group: str) -> Tensor:
    """Parts of all ranks of a process group end to end, under way until `wait`. It and those below enter graphs.

    Outside of graphs into a tensor made here. What the other form calls has gloo's two threads write down its name, 19
    letters on the heap, without a lock: with two under way a process soon ends by the allocator's word, or wrongly.
    """
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops._c10d_functional.all_gather_into_tensor(x, size, group)
        return out
    out = x.new_empty(size * x.shape[0], *x.shape[1:])
    torch.ops._c10d_functional.all_gather_into_tensor_out(x, size, group, out=out)
    return out


def reduce_scatter(x: Tensor, size: int, group: str) -> Tensor:
    """This rank's part of the sum, under way."""
    out: Tensor = torch.ops._c10d_functional.reduce_scatter_tensor(x, "sum", size, group)
    return out


def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum, under way."""
    out: Tensor = torch.ops._c10d_functional.all_reduce(x, "sum", group)
    return out


def all_to_all(x: Tensor, out_sizes: Sequence[int], in_sizes: Sequence[int], group: str) -> Tensor:
    """Rows to and from every rank, under way."""
    out: Tensor = torch.ops._c10d_functional.all_to_all_single(x, list(out_sizes), list(in_sizes), group)
    return out


def wait(x: Tensor) -> Tensor:
    """What a collective above gives, complete."""
    out: Tensor = torch.ops._c10d_functional.wait_tensor(x)
    return out


# ---- the compiler


@contextmanager
def compiler_settings(dynamo: Mapping[str, Any], functorch: Mapping[str, Any]) -> Iterator[None]:
    """Settings of the tracer and of what splits a graph in forward and backward, for the time of the context."""
    from torch._functorch import config

    with torch._dynamo.config.patch(dict(dynamo)), config.patch(dict(functorch)):
        yield


def compiler_backend(name: str) -> Callable[..., Any]:
    """`(graph, example inputs) -> callable` by the name torch.compile takes."""
    backend: Callable[..., Any] = torch._dynamo.lookup_backend(name)
    return backend


def traces_autograd() -> bool:
    """Whether the compiler can take `torch.autograd.grad` into a graph."""
    return hasattr(torch._dynamo.config, "trace_autograd_ops")


# ---- fused kernels of optimizers


def fused_adamw_(*lists: list[Tensor], **settings: Any) -> None:
    """`(params, grads, m, v, max_v, counts)`, in place: gradients are divided by `grad_scale`, and nothing is written
    where `found_inf` is 1."""
    torch._fused_adamw_(*lists, **settings)


def has_fused_adamw(device: torch.device) -> bool:
    """Whether a device has that kernel for a rate that is a tensor."""
    return _has_kernel("aten::_fused_adamw_.tensor_lr", device)


def fused_sgd_(*lists: list[Tensor], **settings: Any) -> None:
    """`(params, grads, buffers)`, in place; nothing is written where `found_inf` is 1."""
    torch._fused_sgd_(*lists, **settings)


def foreach_mul_(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply each tensor by a 0-D one, in place."""
    torch._foreach_mul_(tensors, factor)


def foreach_norm(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The Euclidean norm of each tensor, summed in `dtype`."""
    return list(torch._foreach_norm(tensors, 2, dtype=dtype))


# ---- what a device's memory held


def record_memory(device: torch.device, *, is_on: bool) -> None:
    """Begin or end the history of a device's memory, where torch keeps one."""
    if record := _memory(device, "_record_memory_history"):
        record("all" if is_on else None)


def write_memory(device: torch.device, path: str) -> None:
    """Write that history, for pytorch.org/memory_viz, where torch keeps one."""
    if dump := _memory(device, "_dump_snapshot"):
        dump(path)


def _memory(device: torch.device, name: str) -> Callable[..., None] | None:
    return getattr(getattr(torch.get_device_module(device), "memory", None), name, None)
