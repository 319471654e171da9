"""What the table for NPUs refuses before a call, each in one sentence."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfn.batch import Segments
from mmfn.ops import Ops
from mmfn.ops.npu import PORTABLE, load, npu
from tests.npu.table import emulated

WHERE = Segments.of(torch.tensor([0, 2], dtype=torch.int32))


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


def attend(ops: Ops, heads: int, channels: int) -> Tensor:
    return ops.attention(zeros(2, heads, channels), *[zeros(2, 1, channels)] * 2, WHERE, is_causal=True)


def multiply(ops: Ops, num_experts: int, width: int) -> Tensor:
    weights = {"gate_up": zeros(num_experts, 2, width), "down": zeros(num_experts, width, 1)}
    return ops.experts(zeros(1, width), torch.zeros(num_experts, dtype=torch.int64), weights)


CASES: list[tuple[Callable[[Ops], Any], str]] = [
    (
        lambda ops: attend(ops, 257, 4),
        "attention on an NPU takes at most 256 heads but got 257; split them, or use",
    ),
    (lambda ops: attend(ops, 1, 769), "attention on an NPU takes at most 768 channels of a head but got 769"),
    (lambda ops: ops.rotary(zeros(1, 1000, 2), zeros(1, 1), zeros(1, 1)), "rotary .* at most 999 heads but got 1000"),
    (lambda ops: ops.rotary(zeros(1, 1, 896), *[zeros(1, 448)] * 2), "rotary .* at most 894 channels but got 896"),
    (lambda ops: multiply(ops, 1025, 2), "experts on an NPU takes at most 1024 experts but got 1025"),
    (lambda ops: multiply(ops, 1, 65536), "experts on an NPU takes at most 65535 channels but got 65536"),
    (
        lambda ops: ops.gelu(zeros(2, dtype=torch.complex64)),
        r"gelu on an NPU takes float16, bfloat16, float32, .* but got torch.complex64; cast to one of them, or use the",
    ),
]


@pytest.mark.parametrize(("call", "message"), CASES, ids=[message[:40] for _, message in CASES])
def test_beyond_its_limits_an_operator_is_not_called(call: Callable[[Ops], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(emulated())


def test_tensors_of_lengths_are_not_split() -> None:
    where = Segments.of(torch.arange(4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"attention with a tensor of lengths .* at most 3 segments but got 4"):
        emulated(lengths="tensor", segments=3).attention(*[zeros(3, 1, 4)] * 3, where, is_causal=True)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"layout": "BSH"}, "layout is 'BSH' but must be one of TND, BSND, BNSD"),
        ({"lengths": "device"}, "lengths is 'device' but must be one of list, tensor"),
        ({"layout": "BSND", "lengths": "tensor"}, "tensors of lengths need the layout 'TND' but it is 'BSND'"),
    ],
)
def test_choices_that_there_are_not(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        npu(**choice)


def test_lists_of_lengths_are_refused_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that fails leaves its process in another state, which tests of memory see: so none is run."""
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    with pytest.raises(ValueError, match="attention with lists of lengths cannot be in a graph; use npu"):
        attend(emulated(), 1, 4)


def test_a_package_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmfn.ops.npu.find_spec", lambda name: object())
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)

    def fail(name: str) -> None:
        raise ImportError("libhccl.so: cannot open shared object file")

    monkeypatch.setattr("mmfn.ops.npu.import_module", fail)
    with pytest.raises(ValueError, match=r"cannot be imported \(libhccl.so: .*\); source CANN's set_env.sh, or use"):
        load()


def test_notes_name_every_entry_that_is_the_portable_one() -> None:
    table = emulated()
    assert [note.partition(" ")[0] for note in table.notes] == list(PORTABLE)
