"""Random rows of the gated delta rule, and packings that meet every edge of its chunks of 64 tokens."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfn.batch import Segments

PACKINGS = {  # lengths of segments, tokens of padding behind them
    "one segment over chunks": ([150], 0),
    "mixed with empty and of one": ([1, 2, 63, 0, 64, 65, 5, 1, 0], 9),
    "several in a chunk": ([7] * 20, 3),
    "shorter than a chunk": ([11], 5),
    "ends at chunks": ([64, 128], 64),
    "one token": ([1], 0),
    "no segment": ([], 5),
    "all empty": ([0, 0], 4),
    "no token": ([0], 0),
}
HEADS = [(2, 6, 8, 6), (3, 3, 5, 7), (1, 2, 1, 1)]  # K, H, C, V


def pack(lengths: Sequence[int]) -> Segments:
    return Segments.of(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32))


def draw(
    num_tokens: int, heads: tuple[int, int, int, int], *, dtype: torch.dtype = torch.float64, decay: float = 0.3
) -> tuple[list[Tensor], Tensor]:
    """q, k, v, g and beta as leaves, and the gradient of the output. `decay`: -g of a token, about."""
    draws, (K, H, C, V) = torch.Generator().manual_seed(num_tokens), heads
    shapes = ((K, C), (K, C), (H, V), (H,), (H,), (H, V))
    xs = [torch.randn(num_tokens, *shape, dtype=torch.float64, generator=draws) for shape in shapes]
    xs[3], xs[4] = -decay * F.softplus(xs[3]), xs[4].sigmoid()
    xs = [x.to(dtype) for x in xs]
    return [x.requires_grad_() for x in xs[:5]], xs[5]


def outcome(fn: Callable[..., Tensor], leaves: list[Tensor], dout: Tensor, *more: Any) -> list[Tensor]:
    """The output and all gradients, zeros where nothing is connected."""
    out = fn(*leaves, *more)
    if not out.requires_grad:
        return [out, *(torch.zeros_like(x) for x in leaves)]
    grads = torch.autograd.grad(out, leaves, dout, allow_unused=True, materialize_grads=True)
    return [out.detach(), *grads]


def check_close(found: Sequence[Tensor], want: Sequence[Tensor], tolerance: float) -> None:
    """Equal to `tolerance` of the largest value of all: a gradient may cancel to nothing."""
    scale = max([x.abs().max().item() for x in want if x.numel()], default=0.0)
    for i, (a, b) in enumerate(zip(found, want, strict=True)):
        assert a.shape == b.shape
        assert a.isfinite().all(), i
        error = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
        assert error <= tolerance * scale, f"tensor {i} is off by {error:.1e} where values reach {scale:.1e}"
