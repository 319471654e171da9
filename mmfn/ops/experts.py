"""Experts: a gated feed-forward layer for each group of rows, as two grouped matrix products.

Rows come sorted by expert and `counts_E` says how many each has. The number of rows R is static; what lies behind the
last expert's rows is padding. A product is one call of torch's grouped kernel where that serves, which never waits for
the counts, and one matmul per expert otherwise: on a CPU the kernel is that loop and no faster.

Legend: R routed rows, E experts, D width, F feed-forward width (of `grouped_linear`: widths in and out).
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfn.ops import flops
from mmfn.ops.activation import swiglu, swiglu_reference
from mmfn.ops.custom import Context, Operator, operator
from mmfn.ops.kernel import Kernel
from mmfn.tree import Tree

Product = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_RD, weight_EFD, counts_E) -> y_RF, as `grouped_linear`


def experts(x_RD: Tensor, counts_E: Tensor, weights: Tree) -> Tensor:
    """`down_e(silu(gate_e(x)) * up_e(x))` for every row of expert e; y_RD.

    `x_RD`: floating[R, D], the first `counts_E[0]` rows expert 0's, and so on. `counts_E`: int64[E] on x's device.
    `weights`: `gate_up` [E, 2F, D] (rows 0..F-1 the gate) and `down` [E, D, F] of x's dtype, each with an adapter or
    without (`mmfn.lora`: then `scale * b_e(a_e(x))` is added). Rows behind the last expert's give zeros and add nothing
    to any gradient, whatever they hold; an expert without rows gets a gradient of exact zeros.
    Raises ValueError for shapes, dtypes or counts that do not fit. Source: experts with fused weights in transformers
    5.23; oracle `experts_reference`.
    """
    return experts_by(partial(grouped_linear, counts_E=counts_E), x_RD, weights)


def experts_by(product: Callable[[Tensor, Tensor], Tensor], x_RD: Tensor, weights: Tree) -> Tensor:
    """`experts` with another grouped product `(x_RD, weight_EFD) -> y_RF`."""
    gate_RF, up_RF = adapted(product, x_RD, weights, "gate_up").chunk(2, dim=-1)
    return adapted(product, swiglu(gate_RF, up_RF), weights, "down")


def experts_reference(x_RD: Tensor, counts_E: Tensor, weights: Tree) -> Tensor:
    """`experts` one expert after the other, adapters added to the weights."""
    parts, left_RD, adapters = [], x_RD, weights.get("lora", {})

    def weight(name: str, e: int) -> Tensor:
        own: Tensor = weights[name][e]
        return own + adapters[name].scale * adapters[name].b[e] @ adapters[name].a[e] if name in adapters else own

    for e, count in enumerate(counts_E.tolist()):
        gate_NF, up_NF = (left_RD[:count] @ weight("gate_up", e).T).chunk(2, dim=-1)
        parts.append(swiglu_reference(gate_NF, up_NF) @ weight("down", e).T)
        left_RD = left_RD[count:]
    return torch.cat([*parts, torch.zeros_like(left_RD)])


def adapted(product: Callable[[Tensor, Tensor], Tensor], x_RD: Tensor, weights: Tree, name: str) -> Tensor:
    """`product(x_RD, weight)` with one of the weights and its adapter, if it has one."""
    y_RF = product(x_RD, weights[name])
    adapter = weights.get("lora", {}).get(name)
    if adapter is None:
        return y_RF
    return y_RF + product(adapter.scale * product(x_RD, adapter.a), adapter.b)


def grouped_linear(x_RD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """`y_RF[r] = weight_EFD[e] @ x_RD[r]` where row r is expert e's, and zeros behind the last expert's rows.

    `x_RD`: floating[R, D] sorted by expert. `weight_EFD`: [E, F, D] of x's dtype. `counts_E`: int64[E], rows of each
    expert, on x's device. On an accelerator the counts are read by the host unless x is bfloat16 and D and F are
    multiples of 8 (a requirement of the kernel). Raises ValueError for shapes, dtypes or counts that do not fit.
    """
    check(x_RD, weight_EFD, counts_E)
    y_RF: Tensor = _product(x_RD, weight_EFD, counts_E)
    return y_RF


def check(x_RD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> None:
    """Raise ValueError unless rows, weights and counts fit."""
    if x_RD.ndim != 2 or weight_EFD.ndim != 3 or weight_EFD.shape[2] != x_RD.shape[1]:
        raise ValueError(
            f"x_RD {tuple(x_RD.shape)} and weight_EFD {tuple(weight_EFD.shape)} must be [R, D] and [E, F, D] with one D"
        )
    if x_RD.dtype != weight_EFD.dtype or not x_RD.is_floating_point():
        raise ValueError(f"x_RD is {x_RD.dtype} and weight_EFD {weight_EFD.dtype}; cast both to one floating dtype")
    if counts_E.shape != weight_EFD.shape[:1] or counts_E.dtype != torch.int64:
        raise ValueError(
            f"counts_E is {counts_E.dtype}{list(counts_E.shape)} but must be int64[{weight_EFD.shape[0]}]: one count "
            "per expert"
        )


def _has_kernel(x_RD: Tensor, y_RF: Tensor) -> bool:
    """True where torch's grouped kernel takes rows of these: it wants bfloat16 and rows of a multiple of 16 bytes."""
    widths = (x_RD.shape[1], y_RF.shape[1])
    return x_RD.device.type == "cuda" and x_RD.dtype == torch.bfloat16 and all(width % 8 == 0 for width in widths)


def multiply_at_once(x_RD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """y_RF of `grouped_linear` by torch's grouped kernel, which leaves the rows behind the last expert's unwritten."""
    ends_E = _ends(counts_E)
    y_RF = F.grouped_mm(x_RD.contiguous(), weight_EFD.transpose(1, 2), offs=ends_E)
    is_padding_R = torch.arange(x_RD.shape[0], device=x_RD.device) >= ends_E[-1]
    return y_RF.masked_fill_(is_padding_R[:, None], 0)


def weight_grad_at_once(dy_RF: Tensor, x_RD: Tensor, counts_E: Tensor) -> Tensor:
    """The gradient [E, F, D] of the weight by torch's grouped kernel."""
    return F.grouped_mm(dy_RF.contiguous().t(), x_RD.contiguous(), offs=_ends(counts_E))


def _ends(counts_E: Tensor) -> Tensor:
    return counts_E.cumsum(0).to(torch.int32)


def _read(counts_E: Tensor, num_rows: int) -> list[int]:
    counts: list[int] = counts_E.tolist()
    if min(counts) < 0 or sum(counts) > num_rows:
        raise ValueError(f"counts_E add up to {sum(counts)} but there are {num_rows} rows; count the rows given")
    return counts


def _multiply(x_RD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """y_RF of `grouped_linear`."""
    R = x_RD.shape[0]
    y_RF = x_RD.new_empty(R, weight_EFD.shape[1])
    if _has_kernel(x_RD, y_RF):
        return multiply_at_once(x_RD, weight_EFD, counts_E)
    counts = _read(counts_E, R)
    used = sum(counts)
    x_parts, y_parts = (torch.split(part, counts) for part in (x_RD[:used], y_RF[:used]))
    for x_ND, weight_FD, y_NF in zip(x_parts, weight_EFD.unbind(0), y_parts, strict=True):
        torch.mm(x_ND, weight_FD.t(), out=y_NF)
    y_RF[used:] = 0
    return y_RF


def _weight_grad(dy_RF: Tensor, x_RD: Tensor, counts_E: Tensor) -> Tensor:
    """The gradient [E, F, D] of the weight: `dy.T @ x` over each expert's rows."""
    if _has_kernel(x_RD, dy_RF):
        return weight_grad_at_once(dy_RF, x_RD, counts_E)
    counts = _read(counts_E, x_RD.shape[0])
    used = sum(counts)
    dw_EFD = x_RD.new_empty(len(counts), dy_RF.shape[1], x_RD.shape[1])
    dy_parts, x_parts = (torch.split(part, counts) for part in (dy_RF[:used], x_RD[:used]))
    for dy_NF, x_ND, dw_FD in zip(dy_parts, x_parts, dw_EFD.unbind(0), strict=True):
        torch.mm(dy_NF.t(), x_ND, out=dw_FD)  # zeros where there is no row
    return dw_EFD


def _fake(x_RD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    return x_RD.new_empty(x_RD.shape[0], weight_EFD.shape[1])


def _fake_grad(dy_RF: Tensor, x_RD: Tensor, counts_E: Tensor) -> Tensor:
    return x_RD.new_empty(counts_E.shape[0], dy_RF.shape[1], x_RD.shape[1])


def _save(ctx: Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def product_operators(
    name: str, multiply: Product, weight_grad: Product, *, is_whole: bool = False
) -> tuple[Product, Operator, Operator]:
    """`multiply(x_RD, weight_EFD, counts_E)` with gradients, as the operators `name` and `name` + "_grad".

    `weight_grad(dy_RF, x_RD, counts_E)` is the gradient of the weight; that of x is a product, too. `is_whole`: what
    they run is no product to a plan.
    """

    def gradient(ctx: Context, dy_RF: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_RD, weight_EFD, counts_E = ctx.saved_tensors
        needs_dx, needs_dw, _ = ctx.needs_input_grad
        dx_RD = forward(dy_RF, weight_EFD.transpose(1, 2), counts_E) if needs_dx else None
        dw_EFD = backward(dy_RF, x_RD, counts_E) if needs_dw else None
        return dx_RD, dw_EFD, None

    forward = operator(name, multiply, _fake, is_whole=is_whole)
    backward = operator(f"{name}_grad", weight_grad, _fake_grad, is_whole=is_whole)
    return forward.with_gradient(_save, gradient), forward, backward


_product, PRODUCT, WEIGHT_GRAD = product_operators("mmfn::grouped_linear", _multiply, _weight_grad)

OPERATORS = flops.register({"mmfn::grouped_linear": flops.grouped, "mmfn::grouped_linear_grad": flops.grouped_grad})
KERNEL = Kernel(experts, operators=OPERATORS, results=("mmfn::grouped_linear",))
