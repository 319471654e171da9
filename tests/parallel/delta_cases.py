"""A convolution and a gated delta rule over random rows that are spread over cp ranks, and the same on one device."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mmfn import ops as tables
from mmfn.batch import Segments
from mmfn.ops import Ops
from mmfn.parallel.context.token_order import token_multiple, token_order
from mmfn.parallel.mesh.layout import Layout, Mesh, distributed_mesh
from mmfn.parallel.program import Program, pipe
from mmfn.parallel.transforms.context_parallel import context_parallel
from tests.parallel.cp_cases import compiled, recomputed, ulysses

RTOL = 1e-12  # of the largest value of output and gradients, in float64


@dataclass(frozen=True, kw_only=True)
class DeltaCase:
    """Segments of `lengths` tokens in a row of `num_tokens`; `heads`: K, H, C and V."""

    kind: str
    layout: Layout
    lengths: tuple[int, ...]
    num_tokens: int
    heads: tuple[int, int, int, int] = (2, 4, 5, 3)
    taps: int = 4
    ops: Ops = field(default_factory=tables.portable, repr=False)

    def segments(self, spread: str = "") -> Segments:
        return Segments.of(torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32), spread)

    def draw(self) -> tuple[list[Tensor], Tensor]:
        """x before the convolution, its weight, g and beta, and the gradient of the output."""
        (K, H, C, V), draws = self.heads, torch.Generator().manual_seed(self.num_tokens)
        D, T = 2 * K * C + H * V, self.num_tokens
        shapes = ((T, D), (D, self.taps), (T, H), (T, H), (T, H, V))
        x, weight, g, beta, do = (torch.randn(s, dtype=torch.float64, generator=draws) for s in shapes)
        return [x, weight, -0.3 * g.exp(), beta.sigmoid()], do

    def layer(self, ops: Ops, segments: Segments, x: Tensor, weight: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        (K, H, C, V), y = self.heads, ops.causal_conv1d(x, weight, segments)
        q, k, v = y.split((K * C, K * C, H * V), 1)
        rows = q.unflatten(1, (K, C)), k.unflatten(1, (K, C)), v.unflatten(1, (H, V))
        return ops.gated_delta_rule(*rows, g, beta, segments)

    def expected(self) -> list[Tensor]:
        """The output and the gradients of x, weight, g and beta on one device, token by token."""
        leaves, do = self.draw()
        leaves = [x.requires_grad_() for x in leaves]
        o_THV = self.layer(tables.reference(), self.segments(), *leaves)
        if not o_THV.requires_grad:
            return [o_THV, *(torch.zeros_like(x) for x in leaves)]
        return [o_THV.detach(), *torch.autograd.grad(o_THV, leaves, do, allow_unused=True, materialize_grads=True)]

    def program(self, mesh: Mesh) -> Program:
        transform = context_parallel(self.kind, num_heads=24, num_kv_heads=24, towers={}, is_recurrent=True)
        return pipe(Program.of(None, self.ops, mesh), transform)

    def on_rank(self, mesh: Mesh, wrap: Callable[[Any], Any] = lambda layer: layer) -> list[Tensor]:
        """This rank's tokens, their rows of `expected`, and its share of the weight's gradient, last."""
        ops, segments = self.program(mesh).ops, self.segments("cp")
        order = token_order(segments.host_N, self.num_tokens, self.kind, mesh)
        (x, weight, g, beta), do = self.draw()
        leaves = [t.requires_grad_() for t in (x[order], weight, g[order], beta[order])]
        o_THV = wrap(lambda *leaves: self.layer(ops, segments, *leaves))(*leaves)
        dx, dweight, dg, dbeta = torch.autograd.grad(o_THV, leaves, do[order])
        return [order, o_THV.detach(), dx, dg, dbeta, dweight]

    def check(self, ranks: list[list[Tensor]]) -> None:
        """Assert that the ranks hold every token once and computed what one device does."""
        order, *rows = (torch.cat(parts) for parts in list(zip(*ranks, strict=True))[:-1])
        assert sorted(order.tolist()) == list(range(self.num_tokens))
        o, dx, dweight, dg, dbeta = self.expected()
        want = {"o": o[order], "dx": dx[order], "dg": dg[order], "dbeta": dbeta[order], "dweight": dweight}
        scale = max(x.abs().max() for x in want.values())
        for (name, x), found in zip(want.items(), [*rows, sum(rank[-1] for rank in ranks)], strict=True):
            error = (found - x).abs().max()
            assert error <= RTOL * scale, f"{self}: {name} is off by {error:.1e} of {scale:.1e}"


def layout_of(kind: str, cp: int) -> Layout:
    return ulysses(cp) if kind == "ulysses" else Layout(cp=cp)


def random_case(kind: str, cp: int, seed: int) -> DeltaCase:
    """Any number of segments of any length and heads, and padding that may fill whole ranks."""
    r, layout = random.Random(f"{kind} {cp} {seed}"), layout_of(kind, cp)
    longest, multiple = r.choice([1, 5, 40 * cp]), token_multiple(kind, layout)
    lengths = [r.choice([0, 1, r.randint(1, longest)]) for _ in range(r.randint(0, 6))]
    used = sum(lengths) + r.choice([0, r.randint(0, 4), 2 * sum(lengths)])
    K = r.choice([1, 2, 3])
    return DeltaCase(
        kind=kind,
        layout=layout,
        lengths=tuple(lengths),
        num_tokens=max(1, -(-used // multiple)) * multiple,
        heads=(K, K * r.randint(1, 3), r.randint(1, 6), r.randint(1, 6)),
        taps=r.choice([1, 2, 4]),
    )


REAL_CASES = [
    DeltaCase(kind="ulysses", layout=ulysses(2), lengths=(7, 1, 90), num_tokens=100),
    DeltaCase(kind="gather", layout=Layout(cp=2), lengths=(1, 90, 2), num_tokens=100),
]
MODES: dict[str, Callable[[Any], Any]] = {
    "eager": lambda layer: layer,
    "remat": recomputed,
    "compiled": compiled,
}


def on_real_rank(modes: list[str]) -> list[list[Tensor]]:
    """What one process of several finds, for every case and mode."""
    return [case.on_rank(distributed_mesh(case.layout), MODES[mode]) for case in REAL_CASES for mode in modes]
