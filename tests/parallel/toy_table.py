"""A table with kernels of other names, as another device's would be: attention and experts are operators `toy::*`.

They run in eager execution, too, and their numbers are those of the reference, gradients by autograd's own rules.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmfn import ops as tables
from mmfn.batch import Segments
from mmfn.ops import Ops
from mmfn.ops.kernel import Kernel
from mmfn.parallel.program import Program
from mmfn.tree import Tree

calls: Counter[str] = Counter()  # of the functions below, by name


@torch.library.custom_op("toy::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, keys: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor]:
    calls["attention"] += 1
    segments, of_keys = Segments.of(offsets), Segments.of(keys)
    o, lse = tables.attention_block.attention_block_reference(q, k, v, segments, of_keys, is_causal=is_causal)
    return o.contiguous(), lse.contiguous()


@torch.library.custom_op("toy::attention_grad", mutates_args=())
def _attention_grad(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, offsets: Tensor, keys: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    calls["attention_grad"] += 1
    segments, of_keys = Segments.of(offsets), Segments.of(keys)
    grad = tables.attention_block.attention_block_grad_reference
    dq, dk, dv = grad(do, q, k, v, o, lse, segments, of_keys, is_causal=is_causal)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@torch.library.custom_op("toy::product", mutates_args=())
def _product(x: Tensor, weight: Tensor, counts: Tensor, is_turned: bool) -> Tensor:
    calls["product"] += 1
    return torch.cat(
        [
            *(
                part @ (w if is_turned else w.T)
                for part, w in zip(x[: int(counts.sum())].split(counts.tolist()), weight, strict=True)
            ),
            x.new_zeros(x.shape[0] - int(counts.sum()), weight.shape[2 if is_turned else 1]),
        ]
    )


@torch.library.custom_op("toy::product_grad", mutates_args=())
def _product_grad(dy: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    calls["product_grad"] += 1
    used = int(counts.sum())
    parts = zip(dy[:used].split(counts.tolist()), x[:used].split(counts.tolist()), strict=True)
    return torch.stack([dy_part.T @ x_part for dy_part, x_part in parts])


_attention.register_fake(
    lambda q, k, v, *_: (torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:2]))
)
_attention_grad.register_fake(lambda do, q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)))
_product.register_fake(lambda x, w, counts, is_turned: x.new_empty(x.shape[0], w.shape[2 if is_turned else 1]))
_product_grad.register_fake(lambda dy, x, counts: x.new_empty(counts.shape[0], dy.shape[1], x.shape[1]))


def _of_attention(ctx: Any, do: Tensor, _: Any) -> tuple[Any, ...]:
    return *_attention_grad(do, *ctx.saved_tensors, ctx.is_causal), None, None, None


def _keep_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *qkv, offsets, keys, ctx.is_causal = inputs
    ctx.save_for_backward(*qkv, *output, offsets, keys)


def _of_product(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, counts = ctx.saved_tensors
    return _product(dy, weight, counts, True), _product_grad(dy, x, counts), None, None


_attention.register_autograd(_of_attention, setup_context=_keep_attention)
_product.register_autograd(_of_product, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:3]))


def attention(q_THC: Tensor, k_SKC: Tensor, v_SKC: Tensor, segments: Segments, *, is_causal: bool) -> Tensor:
    return _attention(q_THC, k_SKC, v_SKC, segments.offsets_N, segments.offsets_N.clone(), is_causal)[0]


def attention_block(q: Tensor, k: Tensor, v: Tensor, segments: Segments, keys: Any = None, *, is_causal: bool) -> Any:
    return _attention(q.detach(), k.detach(), v.detach(), segments.offsets_N, _keys(segments, keys), is_causal)


def attention_block_grad(*tensors: Any, is_causal: bool) -> Any:
    *saved, segments, keys = tensors if not isinstance(tensors[-2], Tensor) else (*tensors, None)
    return _attention_grad(*saved, segments.offsets_N, _keys(segments, keys), is_causal)


def _keys(segments: Segments, keys: Segments | None) -> Tensor:
    return (segments if keys is None else keys).offsets_N.clone()  # an operator's inputs are different tensors


def experts(x_RD: Tensor, counts_E: Tensor, weights: Tree) -> Tensor:
    gate_RF, up_RF = _product(x_RD, weights["gate_up"], counts_E, False).chunk(2, -1)
    return _product(tables.activation.swiglu_reference(gate_RF, up_RF), weights["down"], counts_E, False)


def attention_flops(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return 10**6 * q.shape[0]  # unmistakable


def product_flops(x: Tensor, *_: Any, **__: Any) -> int:
    return 10**9 * x.shape[0]


def table() -> Ops:
    """The portable one with these, declared."""
    attending = {"toy::attention": attention_flops, "toy::attention_grad": None}
    multiplying = {"toy::product": product_flops, "toy::product_grad": None}
    return replace(
        tables.portable(),
        attention=Kernel(attention, operators=attending, results=("toy::attention",)),
        attention_block=Kernel(attention_block, operators=attending, results=("toy::attention",)),
        attention_block_grad=Kernel(attention_block_grad, operators=attending),
        experts=Kernel(experts, operators=multiplying, results=("toy::product",)),
    )


def bare(name: str) -> Ops:
    """The same, but one op is a function that declares nothing."""
    fns: dict[str, Callable[..., Any]] = {"attention": attention, "experts": experts}
    return replace(table(), **{name: fns[name]})


def toy(program: Program) -> Program:
    """As a transform, which comes first."""
    return replace(program, ops=table())
