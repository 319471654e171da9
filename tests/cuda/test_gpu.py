"""The table of GPUs on one: numbers of real kernels, what they leave unwritten, and that nothing waits for it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfn import ops as tables
from mmfn.batch import Segments
from mmfn.ops import Ops, table
from mmfn.ops.cuda.attention import KERNELS
from mmfn.parallel.planning.fake_tensors import freeze
from mmfn.parallel.planning.trace import workspace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
REFERENCE = tables.reference()
TAIL, TOLERANCE = 37, 2e-2


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("default")
    yield
    torch.cuda.set_sync_debug_mode("default")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g).bfloat16().cuda()


def segments_of(*lengths: int) -> Segments:
    segments = Segments.of(torch.tensor([0, *lengths]).cumsum(0).int())
    return replace(segments, offsets_N=segments.offsets_N.cuda())


def dirty() -> None:
    """Freed memory holds NaN, so that a row left unwritten shows."""
    blocks = [torch.full((2**20,), torch.nan, device="cuda") for _ in range(64)]
    del blocks


def gradients(run: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    torch.cuda.set_sync_debug_mode("error")
    out = run(*leaves)
    found = torch.autograd.grad(out, leaves, torch.ones_like(out).cumsum(0) / max(1, out.shape[0]))
    torch.cuda.set_sync_debug_mode("default")
    return [out.detach(), *found]


def check_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.isfinite(a).all()
        assert (a.double() - b.double()).abs().max() <= TOLERANCE * b.double().abs().max()


@pytest.mark.parametrize("channels", [64, 72, 80, 128, 256])
@pytest.mark.parametrize("is_causal", [True, False])
def test_attention(channels: int, is_causal: bool) -> None:
    lengths = (300, 1, 0, 513, 64, 64, 0)
    T, segments = sum(lengths) + TAIL, segments_of(*lengths)
    qkv = drawn(T, 8, channels), drawn(T, 2, channels), drawn(T, 2, channels, seed=1)
    dirty()
    found = gradients(lambda *x: table("cuda").attention(*x, segments, is_causal=is_causal), *qkv)
    wide = [x.double() for x in qkv]
    with torch.no_grad():
        expected = REFERENCE.attention(*wide, segments, is_causal=is_causal)
    leaves = [x.requires_grad_() for x in wide]
    out = REFERENCE.attention(*leaves, segments, is_causal=is_causal)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out).cumsum(0) / T)
    check_close(found, [expected, *grads])
    assert all(not x[-TAIL:].any() for x in found)


def test_blocks() -> None:
    segments, keys = segments_of(100, 0, 64, 7), segments_of(0, 33, 128, 5)
    q, k, v = drawn(171 + TAIL, 4, 64), drawn(166 + TAIL, 2, 64), drawn(166 + TAIL, 2, 64, seed=1)
    dirty()
    torch.cuda.set_sync_debug_mode("error")
    o, lse = table("cuda").attention_block(q, k, v, segments, keys, is_causal=False)
    found = table("cuda").attention_block_grad(q, q, k, v, o, lse, segments, keys, is_causal=False)
    torch.cuda.set_sync_debug_mode("default")
    wide = [x.double() for x in (q, k, v)]
    o_wide, lse_wide = REFERENCE.attention_block(*wide, segments, keys, is_causal=False)
    has_keys = lse_wide > -torch.inf
    assert torch.equal(lse > -torch.inf, has_keys)
    check_close([o, lse[has_keys]], [o_wide, lse_wide[has_keys]])
    expected = REFERENCE.attention_block_grad(wide[0], *wide, o_wide, lse_wide, segments, keys, is_causal=False)
    check_close(list(found), list(expected))


@pytest.mark.parametrize("channels", [64, 80, 128])
def test_what_a_plan_counts_of_the_gradient(channels: int) -> None:
    """The memory of the kernel beside arguments and results, which a plan has from its workspace."""
    segments = segments_of(3000, 1, 1095)
    q, k = drawn(4096, 8, channels), drawn(4096, 2, channels)
    o, lse = table("cuda").attention_block(q, k, k, segments, is_causal=True)
    args = [q, q, k, k, o, lse, segments.offsets_N, segments.host_N, True, None, None]
    (formula,) = (x for name, x in KERNELS["attention_block_grad"].operators.items() if name.endswith("_grad"))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = formula.body(*args)
    held = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in found)
    assert workspace(formula.body, freeze(args)) == pytest.approx(held, rel=0.02)


@pytest.mark.parametrize("counts", [[130, 0, 64, 1], [0, 0, 0, 7], [1, 1, 1, 1]], ids=str)
def test_experts(counts: list[int]) -> None:
    R, counts_E = sum(counts) + TAIL, torch.tensor(counts).cuda()
    inputs = drawn(R, 64), drawn(4, 96, 64), drawn(4, 64, 48)

    def run(ops: Ops, x: Tensor, gate_up: Tensor, down: Tensor) -> Any:
        return ops.experts(x, counts_E, {"gate_up": gate_up, "down": down})

    dirty()
    found = gradients(lambda *x: run(table("cuda"), *x), *inputs)
    leaves = [x.double().requires_grad_() for x in inputs]
    out = run(REFERENCE, *leaves)
    expected = [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out).cumsum(0) / R)]
    check_close(found, expected)
    assert not found[0][-TAIL:].any()
    assert not found[1][-TAIL:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(333, 1024), (57, 8, 72), (0, 64)], ids=str)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """With weights of the rows' dtype and wider ones."""
    inputs = drawn(*shape), drawn(shape[-1]).to(dtype)
    dirty()
    found = gradients(lambda *x: table("cuda").rms_norm(*x, 1e-6), *inputs)
    leaves = [x.double().requires_grad_() for x in inputs]
    out = REFERENCE.rms_norm(*leaves, 1e-6)
    expected = torch.autograd.grad(out, leaves, torch.ones_like(out).cumsum(0) / max(1, out.shape[0]))
    assert [x.dtype for x in found] == [torch.bfloat16, torch.bfloat16, dtype]
    if shape[0]:
        check_close(found, [out.detach(), *expected])
