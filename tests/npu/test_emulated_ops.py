"""Every entry of the table for NPUs, on emulated operators, against its reference: results and gradients in float64."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfn import ops as tables
from mmfn.batch import Segments
from mmfn.lora import Adapter
from tests.npu.table import emulated

RTOL = 1e-12  # of the largest value, in float64
REFERENCE = tables.reference()
OFFSETS = {  # tokens -> boundaries
    "one": (7, (0, 7)),
    "packed": (23, (0, 5, 6, 6, 20, 20)),
    "empty first": (9, (0, 0, 3, 9, 9, 9)),
    "equal": (13, (0, 4, 8, 12)),
    "none": (5, (0, 0, 0)),
}
CHOICES: list[dict[str, Any]] = [{}, {"lengths": "tensor"}, {"layout": "BSND"}, {"layout": "BNSD"}]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def check(
    fn: Callable[..., Any], reference: Callable[..., Any], leaves: Sequence[Tensor], *rest: Any, **kw: Any
) -> None:
    """Assert that results and the gradients of leaves are the same."""
    found, wanted = [], []
    for op, into in ((fn, found), (reference, wanted)):
        own = [x.clone().requires_grad_() for x in leaves]
        out = op(*own, *rest, **kw)
        out = out[0] if isinstance(out, tuple) else out
        grads = torch.autograd.grad(out, own, draw(*out.shape, seed=9), materialize_grads=True)
        into += [out.detach(), *grads]
    for i, (got, want) in enumerate(zip(found, wanted, strict=True)):
        assert got.dtype == want.dtype, i
        scale = want.abs().max() if want.numel() else 1.0
        torch.testing.assert_close(got, want, rtol=0, atol=RTOL * max(float(scale), 1.0))


def segments(name: str) -> tuple[int, Segments]:
    num_tokens, offsets = OFFSETS[name]
    return num_tokens, Segments.of(torch.tensor(offsets, dtype=torch.int32))


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("name", OFFSETS)
def test_attention(name: str, is_causal: bool, choice: dict[str, Any]) -> None:
    num_tokens, where = segments(name)
    qkv = [draw(num_tokens, heads, 4, seed=heads) for heads in (6, 3, 3)]
    check(emulated(**choice).attention, REFERENCE.attention, qkv, where, is_causal=is_causal)


def test_more_segments_than_one_call_takes() -> None:
    num_tokens, where = segments("packed")
    qkv = [draw(num_tokens, 2, 4, seed=seed) for seed in range(3)]
    check(emulated(segments=1).attention, REFERENCE.attention, qkv, where, is_causal=True)


@pytest.mark.parametrize(
    ("queries", "keys", "is_causal"),
    [
        ((0, 5, 9, 9), None, True),
        ((0, 5, 9, 9), None, False),
        ((0, 5, 9), (0, 2, 12), False),
        ((0, 0, 9), (0, 5, 12), False),  # keys that no query attends to
        ((0, 5, 9), (0, 5, 5), False),  # queries without a key
        ((0, 0, 0), (0, 5, 9), False),
    ],
)
def test_blocks(queries: tuple[int, ...], keys: tuple[int, ...] | None, is_causal: bool) -> None:
    own, others = (None if x is None else Segments.of(torch.tensor(x, dtype=torch.int32)) for x in (queries, keys))
    q, k, v, do = (draw(*shape, 4, seed=i) for i, shape in enumerate([(9, 6), (12, 3), (12, 3), (9, 6)]))
    k, v = (x[:9] if keys is None else x for x in (k, v))
    table = emulated()
    o, lse = REFERENCE.attention_block(q, k, v, own, others, is_causal=is_causal)
    for got, want in zip(table.attention_block(q, k, v, own, others, is_causal=is_causal), (o, lse), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    lse = torch.logaddexp(lse, draw(9, 6, seed=7))  # as if there were other keys
    found = table.attention_block_grad(do, q, k, v, o, lse, own, others, is_causal=is_causal)
    wanted = REFERENCE.attention_block_grad(do, q, k, v, o, lse, own, others, is_causal=is_causal)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_norms() -> None:
    x, gate, weight = draw(5, 3, 8), draw(5, 3, 8, seed=1), draw(8, seed=2)
    table = emulated()
    check(table.rms_norm, REFERENCE.rms_norm, [x, weight], 1e-6)
    check(table.rms_norm_gated, REFERENCE.rms_norm_gated, [x, gate, weight], 1e-6)


@pytest.mark.parametrize("channels", [8, 11])
def test_rotary(channels: int) -> None:
    angles = draw(5, 4, seed=1)
    check(emulated().rotary, REFERENCE.rotary, [draw(5, 3, channels)], angles.cos(), angles.sin())


def test_activations() -> None:
    table = emulated()
    check(table.swiglu, REFERENCE.swiglu, [draw(4, 6), draw(4, 6, seed=1)])
    check(table.gelu, REFERENCE.gelu, [draw(4, 6)])
    check(table.gelu_tanh, REFERENCE.gelu_tanh, [draw(4, 6)])


@pytest.mark.parametrize("chosen", [1, 3])
def test_dispatch_and_combine(chosen: int) -> None:
    table, experts_TX = emulated(), draw(7, 6, seed=3).argsort(-1)[:, :chosen]
    experts_TX[2] = 5  # of no expert
    check(lambda x: table.dispatch(x, experts_TX, 5), lambda x: REFERENCE.dispatch(x, experts_TX, 5), [draw(7, 4)])
    found, wanted = (ops.dispatch(draw(7, 4), experts_TX, 5) for ops in (table, REFERENCE))
    for got, want in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    y_RD, place_TX, weights_TX = draw(7 * chosen, 4), wanted[2], draw(7, chosen, seed=4)
    for fn in (table.combine, REFERENCE.combine):
        assert fn(y_RD, place_TX, weights_TX).shape == (7, 4)
    check(
        lambda y, w: table.combine(y, place_TX, w), lambda y, w: REFERENCE.combine(y, place_TX, w), [y_RD, weights_TX]
    )


@pytest.mark.parametrize("has_adapters", [False, True])
@pytest.mark.parametrize("counts", [(3, 0, 4, 2), (0, 0, 0, 0), (0, 0, 11, 0), (9,)])
def test_experts(counts: tuple[int, ...], has_adapters: bool) -> None:
    """Padding, two rows of it, enters as infinity."""
    E, counts_E = len(counts), torch.tensor(counts)
    x = draw(11, 6)
    leaves = [x, draw(E, 10, 6, seed=1), draw(E, 6, 5, seed=2)]
    low = [draw(E, 2, 6, seed=3), draw(E, 10, 2, seed=4), draw(E, 2, 5, seed=5), draw(E, 6, 2, seed=6)]

    def run(fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(x_RD: Tensor, gate_up: Tensor, down: Tensor, *ab: Tensor) -> Tensor:
            weights: dict[str, Any] = {"gate_up": gate_up, "down": down}
            if ab:
                own = (Adapter(a=a, b=b, alpha=1.0, is_rs=False) for a, b in (ab[:2], ab[2:]))
                weights["lora"] = dict(zip(("gate_up", "down"), own, strict=True))
            is_real_R1 = (torch.arange(11) < counts_E.sum())[:, None]
            return fn(torch.where(is_real_R1, x_RD, torch.inf), counts_E, weights)

        return call

    check(run(emulated().experts), run(REFERENCE.experts), [*leaves, *(low if has_adapters else [])])
