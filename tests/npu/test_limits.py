"""What the table for NPUs refuses before a call, each in one sentence."""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfn.batch import Segments
from mmfn.ops import Ops
from mmfn.ops.npu import PORTABLE, load, npu
from mmfn.ops.npu.exchange import hccl_name
from mmfn.ops.npu.limits import LIMITS
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.layout import Layout, Mesh
from mmfn.parallel.mesh.virtual import run_virtual
from mmfn.parallel.program import Program
from mmfn.parallel.transforms.expert_parallel import dropless, expert_parallel
from mmfn.spec import ZEROS, spec
from tests.npu.table import emulated, on_emulated
from tests.parallel.test_expert_parallel import Silent

EP2 = Layout(dp=2, ep=2)
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


def test_a_capacity_is_refused() -> None:
    with pytest.raises(
        ValueError, match="fused needs the rows of each expert on the host, which kind 'capacity' never"
    ):
        expert_parallel("capacity", fused=True)


def refusal(
    layout: Layout = EP2, shape: tuple[int, ...] = (8, 4, 4), *, dtype: Any = torch.float64, **given: Any
) -> str:
    """What one call says on virtual ranks. `shape`: of `gate_up`; `given`: choices of the table, or `num_chosen`."""
    num_experts, d_ff2, d_model = shape
    shapes = {"gate_up": shape, "down": (num_experts, d_model, d_ff2 // 2)}
    specs = {name: spec(shape, "experts mlp embed", ZEROS) for name, shape in shapes.items()}
    spread = expert_parallel(fused=True, num_chosen=given.pop("num_chosen", 2))

    def run(mesh: Mesh) -> None:
        program = spread(replace(on_emulated(Program.of(specs, mesh=mesh)), ops=emulated(**given)))
        own = {name: torch.zeros(num_experts // layout.ep, *shape[1:], dtype=dtype) for name, shape in shapes.items()}
        program.ops.experts(torch.zeros(num_experts, d_model, dtype=dtype), torch.ones(num_experts).long(), own)

    with pytest.raises(ValueError, match=r"^layout.fused_exchange .*, or set layout.fused_exchange=false$") as error:
        run_virtual(layout, run)
    return str(error.value)


def test_what_the_operators_do_not_take() -> None:
    """One sentence each."""
    without = "or set layout.fused_exchange=false"
    of_device = replace(LIMITS, exchange_dtypes=(torch.float64,))
    few = replace(of_device, exchange_ranks=(("", (2, 4)),), exchange_rows=7)
    assert refusal(dtype=torch.float32) == (
        "layout.fused_exchange takes float16, bfloat16, float64 but got torch.float32; set "
        f"layout.compute_dtype=bfloat16, {without}"
    )
    assert refusal(limits=of_device) == (
        f"layout.fused_exchange is for devices Ascend910_93, Ascend950 but got cpu; use one of them, {without}"
    )
    assert refusal(Layout(dp=8, ep=8)) == (
        f"layout.fused_exchange takes ep of 2, 4 on cpu but got 8; use one of them, {without}"
    )
    assert refusal(shape=(66, 2, 2)) == (
        f"layout.fused_exchange takes at most 32 experts of a rank but got 33; use more ep ranks, {without}"
    )
    many = replace(few, exchange_experts=256)
    assert refusal(Layout(dp=4, ep=4), (260, 2, 2), limits=many) == (
        f"layout.fused_exchange takes at most 256 experts of all ranks but got 260; use a smaller model, {without}"
    )
    for number in (1, 9):
        assert refusal(num_chosen=number) == (
            f"layout.fused_exchange takes 2 to 8 experts of a token but got {number}; use another model, {without}"
        )
    assert refusal(shape=(2, 65536, 1)).startswith("layout.fused_exchange takes at most 65535 channels but got 65536;")
    assert refusal(limits=few) == (
        f"layout.fused_exchange takes at most 7 rows of a rank but got 8; use smaller batches, {without}"
    )
    assert refusal(name_of=hccl_name) == (f"layout.fused_exchange needs ranks that meet over HCCL; use NPUs, {without}")


def test_it_is_refused_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that fails leaves its process in another state: so none is run."""
    axis = Axis(name="ep", size=2, transport=Silent())
    x_RD, counts_E, weights = torch.zeros(2, 4), torch.ones(2).long(), {}
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    with pytest.raises(ValueError, match=r"takes counts of the host, as no graph has; use train.compile=none, or set"):
        dropless(x_RD, counts_E, weights, base=torch.add, axis=axis, over_ranks=emulated().experts_over_ranks)


def test_the_name_that_hccl_has_for_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of what carries the group on NPUs, with this process' rank among all."""
    backend = SimpleNamespace(get_hccl_comm_name=lambda rank: f"comm of {rank}")
    monkeypatch.setattr("mmfn.ops.npu.exchange.group_backend", lambda *asked: {("7", "npu"): backend}[asked])
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 5)
    assert hccl_name("7") == "comm of 5"
