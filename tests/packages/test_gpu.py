"""Kernels of packages on a GPU, where they are installed: numbers, unwritten rows, and that nothing waits."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmfn.batch import Segments
from mmfn.ops import Ops, portable, reference
from mmfn.ops.packages import PACKAGES, machine_of, overlay
from mmfn.ops.packages.package import why_not
from tests.ops.delta_cases import draw, pack

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")]
REFERENCE, TOLERANCE = reference(), 3e-2
LENGTHS, TAIL = [300, 1, 0, 513, 64, 7], 37


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def table(name: str) -> Ops:
    """With one package, or not at all where this machine cannot use it."""
    reason = why_not(PACKAGES[name], machine_of("cuda"))
    if reason is not None:
        pytest.skip(reason)
    return overlay(portable(), [name], machine_of("cuda"))


def on_gpu(segments: Segments) -> Segments:
    return replace(segments, offsets_N=segments.offsets_N.cuda())


def check(run: Callable[..., Tensor], expected: Callable[..., Tensor], rows: list[Tensor], do: Tensor) -> None:
    """Outputs and gradients in bfloat16 against float64 on the CPU; the first call compiles kernels, the second one
    must not wait."""
    with torch.no_grad():
        leaves = [x.detach().cuda().requires_grad_() for x in rows]
    for mode in ("default", "error"):
        blocks = [torch.full((2**20,), torch.nan, device="cuda") for _ in range(64)]
        del blocks
        gradient = do.cuda()
        torch.cuda.set_sync_debug_mode(mode)
        out = run(*leaves)
        found = [out.detach(), *torch.autograd.grad(out, leaves, gradient)]
        torch.cuda.set_sync_debug_mode("default")
        wide = [x.detach().double().requires_grad_() for x in rows]
        wanted = expected(*wide)
        for a, b in zip(found, [wanted, *torch.autograd.grad(wanted, wide, do.double())], strict=True):
            assert torch.isfinite(a).all()
            assert (a.cpu().double() - b).abs().max() <= TOLERANCE * b.abs().max()


@pytest.mark.parametrize("heads", [(2, 4, 128, 128), (4, 4, 64, 32)], ids=str)
def test_gated_delta_rule(heads: tuple[int, int, int, int]) -> None:
    ops, segments = table("fla"), pack(LENGTHS)
    leaves, do = draw(sum(LENGTHS) + TAIL, heads)
    rows = [x.detach().bfloat16() if i != 3 else x.detach().float() for i, x in enumerate(leaves)]
    check(
        lambda *x: ops.gated_delta_rule(*x, on_gpu(segments)),
        lambda *x: REFERENCE.gated_delta_rule(*x, segments),
        rows,
        do.bfloat16(),
    )


def test_causal_conv1d() -> None:
    ops, segments = table("fla"), pack(LENGTHS)
    (x, *_), do = draw(sum(LENGTHS) + TAIL, (1, 1, 96, 96))
    rows = [x[:, 0].detach().bfloat16(), torch.linspace(-1, 1, 96 * 4).view(96, 4)]
    check(
        lambda *x: ops.causal_conv1d(*x, on_gpu(segments)),
        lambda *x: REFERENCE.causal_conv1d(*x, segments),
        rows,
        do[:, 0].bfloat16(),
    )


@pytest.mark.parametrize("is_causal", [True, False])
def test_attention(is_causal: bool) -> None:
    ops, segments = table("flash-attn"), pack(LENGTHS)
    (q, *_), do = draw(sum(LENGTHS) + TAIL, (8, 8, 72, 72))
    rows = [x.detach().bfloat16() for x in (q, q[:, :2].flip(0), q[:, 2:4])]
    check(
        lambda *x: ops.attention(*x, on_gpu(segments), is_causal=is_causal),
        lambda *x: REFERENCE.attention(*x, segments, is_causal=is_causal),
        rows,
        do.bfloat16(),
    )
