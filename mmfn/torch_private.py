"""What this package uses of torch that torch keeps private: one function or name each, with what it was checked on.

Each has a test in `tests/test_torch_private.py`, which tells on a new torch what to replace. Checked on torch 2.13.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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


def autograd_node() -> Any:
    """The node whose backward is running on this thread, or None outside of a backward."""
    return torch._C._current_autograd_node()


def next_node_number() -> int:
    """The number that the next node of autograd's graph will get on this thread."""
    number: int = torch._C._autograd._get_sequence_nr()
    return number


def node_number(node: Any) -> int:
    """The number a node was made with."""
    number: int = node._sequence_nr()
    return number


def storage_key(storage: torch.UntypedStorage) -> int:
    """The address of a storage's record, the same for all tensors that share it, while it lives."""
    key: int = storage._cdata
    return key


def local_tensor(x: Any) -> Tensor:
    """This rank's part of a DTensor, without a node in autograd's graph."""
    local: Tensor = x._local_tensor
    return local


def schema(operator: Any) -> Any:
    """What an overload of an operator declares of its arguments and returns."""
    return operator._schema


def assert_on_device(condition: Tensor, message: str) -> None:
    """Stop the program where a 0-D bool on the device is false; the host does not wait for it."""
    torch._assert_async(condition, message)


def tell_compiler(is_true: bool) -> None:
    """A fact about sizes that a graph does not know; a program in which it is false stops."""
    torch._check(is_true)  # type: ignore[no-untyped-call]
