"""What operators that a plan counts whole hold beside arguments and results, against the allocator's own events."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfn import ops
from mmfn.ops import causal_conv1d, flops, gated_delta_rule
from mmfn.ops.cuda import attention as cuda_attention
from mmfn.ops.custom import Operator, operator, turns
from mmfn.ops.kernel import Kernel, Whole, declaration
from mmfn.ops.packages import flash_attn
from mmfn.parallel.planning.fake_tensors import freeze
from mmfn.parallel.planning.trace import Recorder, workspace
from mmfn.torch_private import FLASH_CPU, FLASH_CPU_GRAD
from tests.parallel.allocated import peak_of

RULES = (gated_delta_rule.RULE, gated_delta_rule.RULE_GRAD, gated_delta_rule.ENTRY_GRAD, gated_delta_rule.STATE)
CONVS = (causal_conv1d.CONV, causal_conv1d.CONV_GRAD)
ROWS = {
    "short": ((0, 5), 2, 2, 8, 4),
    "one segment": ((0, 700), 2, 4, 32, 32),
    "many turns": ((0, 100, 101, 1000), 4, 16, 256, 128),
    "many chunks": ((0, 1500, 1564), 1, 1, 16, 64),
    "a last block of fewer heads": ((0, 300), 5, 10, 128, 64),
}
"""Offsets; heads of keys and of values; their channels."""


@pytest.fixture(autouse=True)
def undefined_memory() -> Any:
    """Deterministic mode fills new memory with another operator, which is no part of a body."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before


def allocated_workspace(fn: Callable[..., Any], args: list[Any]) -> int:
    results: list[Any] = []
    fn(*args)  # what is made once
    peak = peak_of(lambda: results.append(fn(*args)))
    outs = results[0] if isinstance(results[0], tuple) else results
    return peak - sum(x.untyped_storage().nbytes() for x in outs)


def arguments_of_rule(op: Operator, row: str, dtype: torch.dtype, has_state: bool) -> list[Any]:
    offsets, K, H, C, V = ROWS[row]
    T, offsets_N = offsets[-1] + 3, torch.tensor(offsets, dtype=torch.int32)
    k_TKC, v_THV, g_TH = (torch.zeros(T, *shape, dtype=dtype) for shape in ((K, C), (H, V), (H,)))
    N = len(offsets) - 1
    state = torch.zeros(*((N,) if op is gated_delta_rule.STATE else ()), H, C, V) if has_state else None
    inputs = [k_TKC, k_TKC, v_THV, g_TH, g_TH, offsets_N]
    return {
        gated_delta_rule.RULE: [*inputs, state],
        gated_delta_rule.RULE_GRAD: [v_THV, *inputs, state, state],
        gated_delta_rule.ENTRY_GRAD: [v_THV, k_TKC, k_TKC, g_TH, g_TH, offsets_N],
        gated_delta_rule.STATE: [*inputs[1:], state],
    }[op]


@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("op", RULES, ids=lambda op: op.name)
def test_the_workspace_of_the_delta_rule(op: Operator, row: str, dtype: torch.dtype, has_state: bool) -> None:
    args = arguments_of_rule(op, row, dtype, has_state)
    assert workspace(op.direct, freeze(args)) == pytest.approx(allocated_workspace(op.direct, args), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offsets", [(0, 5), (0, 700), (0, 100, 101, 3000)])
@pytest.mark.parametrize("op", CONVS, ids=lambda op: op.name)
def test_the_workspace_of_the_convolution(op: Operator, offsets: tuple[int, ...], dtype: torch.dtype) -> None:
    x_TD, weight_DK = torch.zeros(offsets[-1] + 3, 512, dtype=dtype), torch.zeros(512, 4, dtype=dtype)
    args = [x_TD, weight_DK, torch.tensor(offsets, dtype=torch.int32)]
    args = [x_TD, *args, True] if op is causal_conv1d.CONV_GRAD else args
    assert workspace(op.direct, freeze(args)) == pytest.approx(allocated_workspace(op.direct, args), rel=0.01)


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("L", "S"), [(1, 1), (31, 40), (191, 191), (192, 600), (767, 100), (768, 768)])
@pytest.mark.parametrize("op", [FLASH_CPU, FLASH_CPU_GRAD], ids=["forward", "backward"])
def test_the_workspace_of_torchs_attention(op: Any, L: int, S: int, dtype: torch.dtype, is_packed: bool) -> None:
    """`is_packed`: heads lie inside of tokens, as they come from packed rows, and no gradient is copied."""

    def rows(num: int, heads: int) -> Tensor:
        shape = (2, num, heads, 8) if is_packed else (2, heads, num, 8)
        return torch.zeros(shape, dtype=dtype).transpose(1, 2) if is_packed else torch.zeros(shape, dtype=dtype)

    qkv = [rows(L, 4), rows(S, 2), rows(S, 2)]
    args = [*qkv, 0.0, False]
    if op is FLASH_CPU_GRAD:
        args = [rows(L, 4), *qkv, *FLASH_CPU(*args), 0.0, False]
    formula = flops.OWN[op.overloadpacket]
    assert isinstance(formula, Whole)
    counted, allocated = workspace(formula.body, freeze(args)), allocated_workspace(op, args)
    if dtype is torch.bfloat16:  # products of a library have a scratch of their own, by the machine's vector units
        assert 0 < counted <= allocated
    else:
        assert counted == allocated


@pytest.mark.parametrize("heads", [2, 8])
@pytest.mark.parametrize("table", [cuda_attention.KERNELS, flash_attn.VARLEN.kernels], ids=["torch", "flash-attn"])
def test_the_workspace_of_attention_on_gpus(table: dict[str, Kernel], heads: int) -> None:
    """Of the gradient, written out: no kernel of theirs runs here. Heads of 80 channels are summed as 96."""
    T, H, C, offsets_N = 300, 8, 80, torch.tensor([0, 100, 101, 290], dtype=torch.int32)
    q_THC, k_TKC = (torch.zeros(T, n, C, dtype=torch.bfloat16) for n in (H, heads))
    args = [q_THC, q_THC, k_TKC, k_TKC, q_THC, torch.zeros(T, H), offsets_N, offsets_N, True, None, None]
    (formula,) = (whole for name, whole in table["attention_block_grad"].operators.items() if name.endswith("_grad"))
    assert isinstance(formula, Whole)
    sums, turned = (T + 3 * 128) * H * (96 + 1) * 4, T * H * 4  # the log-sum-exp, heads first
    expanded = 2 * T * H * C * 2 if heads < H else 0
    assert workspace(formula.body, freeze(args)) == pytest.approx(sums + expanded + turned, abs=16)


def _fill(x_T: Tensor) -> Tensor:
    """Half of x for five turns; from the second on the one before is alive until the next is there."""
    out_T = x_T.new_empty(x_T.shape)
    for _ in turns(range(5), x_T):
        half = x_T.new_zeros(len(x_T) // 2)
        out_T[: len(half)] = half
    return out_T


FILL = operator("test_workspace::fill", _fill, lambda x_T: x_T.new_empty(x_T.shape), is_whole=True)


@pytest.mark.parametrize("is_fake", [True, False])
def test_a_workspace_is_counted_where_its_operator_runs(is_fake: bool) -> None:
    size, recorder = 4 * 1000, Recorder(is_fake=is_fake)
    table = ops.portable()
    recorder.watch(replace(table, linear=Kernel(FILL, operators={FILL.name: Whole(FILL.direct)})))
    x_T = torch.zeros(1000, device="meta" if is_fake else "cpu")
    with recorder:
        recorder.hold("batch", [x_T])
        recorder.begin()
        with recorder.labelled("linear"):
            out_T = FILL(x_T)
        del out_T
    trace = recorder.trace()
    assert trace.peak.parts == {"batch": size, "temporaries": size + size}  # the result and two halves
    assert trace.flops == {}


def test_every_operator_of_a_table_that_is_counted_whole_says_what_it_runs() -> None:
    formulas = [declaration(name, op).operators for name, op in ops.kernels(ops.portable()).items()]
    declared = {name: formula for operators in formulas for name, formula in operators.items()}
    for op in (*RULES, *CONVS):
        formula = declared[op.name]
        assert op.is_whole
        assert isinstance(formula, Whole)
        assert formula.body is op.direct
