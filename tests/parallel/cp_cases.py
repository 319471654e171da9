"""Random packed attention spread over cp ranks, and the same on one device by torch's own attention under a mask."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmfn import ops as tables
from mmfn.batch import Segments
from mmfn.ops import Attention, Ops
from mmfn.parallel.context.token_order import segment_multiple, token_multiple, token_order
from mmfn.parallel.mesh.layout import Layout, Mesh, distributed_mesh
from mmfn.parallel.program import Program, pipe
from mmfn.parallel.transforms.context_parallel import context_parallel

RTOL = 1e-11  # of the largest value of output and gradients, in float64


def ulysses(cp: int) -> Layout:
    return Layout(cp=cp, ulysses=cp)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Segments of `lengths` tokens in a row of `num_tokens`, H query and K kv heads; one kind on one layout."""

    kind: str
    layout: Layout
    lengths: tuple[int, ...]
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    ops: Ops = field(default_factory=tables.portable, repr=False)

    def offsets(self) -> Tensor:
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)

    def draw(self) -> tuple[list[Tensor], Tensor]:
        """q, k, v of the whole row as leaves, and the gradient of the output."""
        g = torch.Generator().manual_seed(self.num_tokens)
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads, self.num_heads)
        q, k, v, do = (torch.randn(self.num_tokens, n, 4, dtype=torch.float64, generator=g) for n in heads)
        return [x.requires_grad_() for x in (q, k, v)], do

    def expected(self) -> list[Tensor]:
        """The output and the gradients of q, k and v on one device."""
        (q, k, v), do = self.draw()
        segment_T = torch.searchsorted(self.offsets(), torch.arange(self.num_tokens), right=True)
        mask_TT = (segment_T[:, None] == segment_T) & (segment_T <= len(self.lengths))
        heads = (x.repeat_interleave(self.num_heads // x.shape[1], 1).transpose(0, 1)[None] for x in (q, k, v))
        o_THC = F.scaled_dot_product_attention(*heads, attn_mask=mask_TT.tril())[0].transpose(0, 1)
        o_THC = torch.where(mask_TT.any(1)[:, None, None], o_THC, 0.0)  # padding sees nothing
        return [o_THC.detach(), *torch.autograd.grad(o_THC, (q, k, v), do)]

    def on_rank(self, mesh: Mesh, wrap: Callable[[Attention], Attention] = lambda attend: attend) -> list[Tensor]:
        """This rank's tokens, and their rows of `expected`."""
        transform = context_parallel(self.kind, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, towers={})
        attend = wrap(pipe(Program.of(None, self.ops, mesh), transform).ops.attention)
        order = token_order(self.offsets(), self.num_tokens, self.kind, mesh)
        row, do = self.draw()
        leaves = [x.detach()[order].requires_grad_() for x in row]
        o_THC = attend(*leaves, Segments.of(self.offsets(), spread="cp"), is_causal=True)
        return [order, o_THC.detach(), *torch.autograd.grad(o_THC, leaves, do[order])]

    def check(self, ranks: list[list[Tensor]]) -> None:
        """Assert that the ranks hold every token once and computed what one device does."""
        assert sorted(torch.cat([order for order, *_ in ranks]).tolist()) == list(range(self.num_tokens))
        expected = dict(zip(("o", "dq", "dk", "dv"), self.expected(), strict=True))
        scale = max(want.abs().max() for want in expected.values())  # dq is 0 where every segment has one token
        for order, *found in ranks:
            for (name, want), got in zip(expected.items(), found, strict=True):
                error = (got - want[order]).abs().max()
                assert error <= RTOL * scale, f"{self}: {name} is off by {error:.1e}"


def compiled(attend: Attention) -> Attention:
    """One graph."""
    torch._dynamo.reset()
    return torch.compile(attend, fullgraph=True, dynamic=False, backend="aot_eager")


def recomputed(attend: Attention) -> Attention:
    """Computed again in the backward."""
    return partial(checkpoint, attend, use_reentrant=False)


REAL_CASES = {
    "ulysses": Case(kind="ulysses", layout=ulysses(2), lengths=(7, 1, 20), num_tokens=36, num_heads=4, num_kv_heads=1),
    "ring": Case(kind="ring", layout=Layout(cp=2), lengths=(4, 0, 28), num_tokens=36, num_heads=4, num_kv_heads=2),
    "gather": Case(kind="gather", layout=Layout(cp=2), lengths=(1, 30, 2), num_tokens=36, num_heads=4, num_kv_heads=2),
    "usp": Case(
        kind="usp", layout=Layout(cp=4, ulysses=2), lengths=(4, 24), num_tokens=32, num_heads=4, num_kv_heads=2
    ),
}
MODES: dict[str, Callable[[Attention], Attention]] = {
    "eager": lambda attend: attend,
    "remat": recomputed,
    "compiled": compiled,
    "compiled, remat": lambda attend: compiled(recomputed(attend)),
}


def on_real_rank(kinds: list[str], modes: list[str]) -> list[list[Tensor]]:
    """What one process of several finds, for every kind and mode."""
    cases = [REAL_CASES[kind] for kind in kinds]
    return [case.on_rank(distributed_mesh(case.layout), MODES[mode]) for case in cases for mode in modes]


def random_case(kind: str, layout: Layout, seed: int) -> Case:
    """Any number of segments of any length, empty, of one token and spanning all ranks among them."""
    r = random.Random(f"{kind} {layout} {seed}")
    multiple, least = segment_multiple(kind, layout), token_multiple(kind, layout)
    longest = r.choice([1, 3, 4 * layout.cp])
    lengths = [multiple * r.choice([0, 1, r.randint(1, longest)]) for _ in range(r.randint(0, 8))]
    used = sum(lengths) + r.choice([0, r.randint(0, 2 * least)])
    num_kv_heads = r.choice([1, 2, 3])
    num_heads = num_kv_heads * r.randint(1, 3)
    while num_heads % layout.ulysses:
        num_heads += num_kv_heads
    return Case(
        kind=kind,
        layout=layout,
        lengths=tuple(lengths),
        num_tokens=max(1, -(-used // least)) * least,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
    )
