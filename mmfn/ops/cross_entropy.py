"""Cross entropy of a linear head whose logits are never held in full.

Supervised rows go through in chunks: a chunk's logits are written into one reused buffer, become their gradient in
place, and give their share of both gradients at once, in the forward; the backward only scales. So beside the
gradients themselves the op holds one chunk of logits, and rows without a label cost nothing.

Legend: T tokens, N supervised tokens (or those of one chunk), D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from mmfn.batch import IGNORE
from mmfn.ops.eager import is_eager

CHUNK_BYTES = 160 * 2**20  # of float32 logits; smaller chunks read and write the head's gradient more often
MAX_CHUNK = 512  # rows; larger chunks are no faster
ALIGN = 16  # a chunk of more rows gets zero rows to a multiple: logits of 511 rows take 1.4 times as long as of 512
STAGE_VALUES = 2**20  # logits become gradients in pieces of this many values, which stay in the cache


def linear_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, weights_T: Tensor, *, chunk: int | None = None
) -> Tensor:
    """`sum_t weights_T[t] * cross_entropy(x_TD[t] @ weight_VD.T, labels_T[t])` over supervised tokens.

    A token is supervised if its label is not `IGNORE` and its weight is not 0; with none the sum is 0 and so are the
    gradients. `x_TD`, `weight_VD`: one floating dtype. `labels_T`: int64[T] in [0, V) or `IGNORE`. `weights_T`:
    floating[T], a constant. `chunk`: rows of logits held at a time, by default `chunk_rows(V)`. Returns float32[]
    (float64[] for float64). The gradient of the head is accumulated in float32 (or float64) and cast once, and not
    computed for a head that needs none. On a GPU the number of supervised rows is read by the host.

    Raises ValueError for shapes, dtypes or labels that do not fit. Source: chunked gradients in the forward as in
    Hsu et al. 2024, "Liger kernel" (arXiv:2410.10989); oracle `torch.nn.functional.cross_entropy`.
    """
    _check(x_TD, weight_VD, labels_T, weights_T, chunk)
    rows = chunk or chunk_rows(weight_VD.shape[0])
    needs_dx, needs_dw = (torch.is_grad_enabled() and leaf.requires_grad for leaf in (x_TD, weight_VD))
    if is_eager(x_TD):
        loss: Tensor = _Eager.apply(  # type: ignore[no-untyped-call]
            x_TD, weight_VD, labels_T, weights_T, rows, needs_dx, needs_dw
        )
    else:
        loss, *_ = _traced(x_TD, weight_VD, labels_T, weights_T, rows, needs_dx, needs_dw)
    return loss


def linear_cross_entropy_reference(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, weights_T: Tensor) -> Tensor:
    """`linear_cross_entropy` with all logits at once, in float32 or float64 behind the head."""
    logits_TV = F.linear(x_TD, weight_VD).to(_wide(x_TD))
    losses_T = logits_TV.logsumexp(-1) - logits_TV.gather(-1, labels_T.clamp(min=0)[:, None])[:, 0]
    return torch.where((labels_T == IGNORE) | (weights_T == 0), 0.0, losses_T * weights_T).sum()


def chunk_rows(num_vocabulary: int) -> int:
    """Rows per chunk: the largest power of two whose float32 logits fit `CHUNK_BYTES`, in [1, `MAX_CHUNK`]."""
    fit = max(1, CHUNK_BYTES // (4 * num_vocabulary))
    return min(MAX_CHUNK, 1 << (fit.bit_length() - 1))


def _check(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, weights_T: Tensor, chunk: int | None) -> None:
    if x_TD.ndim != 2 or weight_VD.ndim != 2 or x_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"x_TD {tuple(x_TD.shape)} and weight_VD {tuple(weight_VD.shape)} must be [T, D] and [V, D] with one D"
        )
    if x_TD.dtype != weight_VD.dtype or not x_TD.is_floating_point():
        raise ValueError(f"x_TD is {x_TD.dtype} and weight_VD {weight_VD.dtype}; cast both to one floating dtype")
    for name, given in (("labels_T", labels_T), ("weights_T", weights_T)):
        if given.shape != x_TD.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(given.shape)} but x_TD has {x_TD.shape[0]} rows; give one each")
    if labels_T.dtype != torch.int64:
        raise ValueError(f"labels_T is {labels_T.dtype} but must be int64; cast it")
    if weights_T.requires_grad or not weights_T.is_floating_point():
        raise ValueError(f"weights_T ({weights_T.dtype}) must be floating-point and a constant; cast or detach it")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk} but must be at least 1 row; leave it out for the default")


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _compute(
    x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, weights_T: Tensor, rows: int, needs_dx: bool, needs_dw: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss and its gradients with respect to x and the head, those asked for."""
    index_N = ((labels_T != IGNORE) & (weights_T != 0)).nonzero()[:, 0]
    labels_N, weights_N = labels_T[index_N], weights_T[index_N].to(_wide(x_TD))
    N, V = index_N.numel(), weight_VD.shape[0]
    if N and not 0 <= int(labels_N.min()) <= int(labels_N.max()) < V:
        raise ValueError(
            f"labels span {int(labels_N.min())} to {int(labels_N.max())} but the head has {V} rows; fix them"
        )
    rows = -(-N // max(1, -(-N // rows)))  # chunks of even size
    logits = x_TD.new_empty(V * _aligned(rows))
    losses_N = torch.empty_like(weights_N)
    dx_TD = torch.zeros_like(x_TD) if needs_dx else None
    dw_VD = torch.zeros_like(weight_VD, dtype=_wide(weight_VD)) if needs_dw else None
    for start in range(0, N, max(1, rows)):
        part = slice(start, start + rows)
        index = index_N[part]
        n = index.numel()
        pad = _aligned(n) - n  # zero rows of weight 0, which add exactly nothing
        x_ND, grad_VN = F.pad(x_TD[index], (0, 0, 0, pad)), logits[: V * (n + pad)].view(V, -1)
        torch.mm(weight_VD, x_ND.t(), out=grad_VN)  # V x N: all three products are faster in this layout
        chunk_losses_N, sums_N = _differentiate_(grad_VN, F.pad(labels_N[part], (0, pad)))
        losses_N[part] = chunk_losses_N[:n]
        scales_N = F.pad(weights_N[part], (0, pad)) / sums_N
        if dx_TD is not None:
            dx_TD[index] = (weight_VD.t() @ grad_VN).mul_(scales_N).t()[:n]
        if dw_VD is not None:
            _add_product_(dw_VD, grad_VN, x_ND.mul_(scales_N[:, None]))
    loss = (losses_N * weights_N).sum()
    return loss, dx_TD, None if dw_VD is None else dw_VD.to(weight_VD.dtype)


def _aligned(rows: int) -> int:
    return rows if rows < ALIGN else -(-rows // ALIGN) * ALIGN


def _differentiate_(logits_VN: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrite logits with their gradient times sums_N: exp(logits - max) - sums_N * onehot.

    Returns the cross entropies and sums_N = sum(exp(logits - max)), both float32 or wider. Dividing what the gradient
    is multiplied with by sums_N, instead of the gradient, spares a pass over the logits.
    """
    wide = _wide(logits_VN)
    max_N, label_1N = logits_VN.amax(0).to(wide), labels_N[None]
    shifted_1N = logits_VN.gather(0, label_1N).to(wide) - max_N
    sums_N = torch.zeros_like(max_N)
    for block_VN in torch.split(logits_VN, max(1, STAGE_VALUES // labels_N.numel())):
        exp_VN = block_VN.to(wide).sub_(max_N).exp_()  # in place where the logits are wide themselves
        sums_N += exp_VN.sum(0)
        if logits_VN.dtype != wide:
            block_VN.copy_(exp_VN)
    logits_VN.scatter_(0, label_1N, (shifted_1N.exp() - sums_N).to(logits_VN.dtype))
    return sums_N.log() - shifted_1N[0], sums_N


def _add_product_(sum_VD: Tensor, grad_VN: Tensor, x_ND: Tensor) -> None:
    """`sum_VD += grad_VN @ x_ND`, where the sum may be wider than the factors."""
    if sum_VD.dtype == x_ND.dtype:
        sum_VD.addmm_(grad_VN, x_ND)
        return
    stage = max(1, 4 * STAGE_VALUES // x_ND.shape[1])  # so that the narrow product is small
    for sum_part_VD, grad_part_VN in zip(torch.split(sum_VD, stage), torch.split(grad_VN, stage), strict=True):
        sum_part_VD += grad_part_VN @ x_ND


class _Eager(torch.autograd.Function):
    """Gradients from the forward, scaled in place: a second copy of the head's gradient is never made."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        weights_T: Tensor,
        rows: int,
        needs_dx: bool,
        needs_dw: bool,
    ) -> Tensor:
        loss, dx_TD, dw_VD = _compute(x_TD, weight_VD, labels_T, weights_T, rows, needs_dx, needs_dw)
        ctx.save_for_backward(dx_TD, dw_VD)  # type: ignore[arg-type]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dloss: Tensor) -> tuple[Tensor | None, ...]:
        # autograd itself refuses a second backward: the saved tensors were modified in place
        saved: tuple[Tensor | None, ...] = ctx.saved_tensors  # type: ignore[attr-defined]
        dx_TD, dw_VD = (None if grad is None else grad.mul_(dloss) for grad in saved)
        return dx_TD, dw_VD, None, None, None, None, None


@torch.library.custom_op("mmfn::linear_cross_entropy", mutates_args=())
def _traced(
    x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, weights_T: Tensor, rows: int, needs_dx: bool, needs_dw: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`_compute` as one operator; a gradient that was not asked for comes back empty."""
    loss, dx_TD, dw_VD = _compute(x_TD, weight_VD, labels_T, weights_T, rows, needs_dx, needs_dw)
    none = x_TD.new_empty(0)
    return loss, none if dx_TD is None else dx_TD, none.clone() if dw_VD is None else dw_VD


@_traced.register_fake
def _(
    x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, weights_T: Tensor, rows: int, needs_dx: bool, needs_dw: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grads = (torch.empty_like(x) if needs else x.new_empty(0) for x, needs in ((x_TD, needs_dx), (weight_VD, needs_dw)))
    return x_TD.new_empty((), dtype=_wide(x_TD)), *grads  # type: ignore[return-value]


def _setup(ctx: FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.needs = inputs[-2:]  # type: ignore[attr-defined]


def _backward(ctx: FunctionCtx, dloss: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 7
    saved = zip(ctx.saved_tensors, ctx.needs, strict=True)  # type: ignore[attr-defined]
    dx_TD, dw_VD = (grad * dloss if needs else None for grad, needs in saved)
    return dx_TD, dw_VD, None, None, None, None, None


_traced.register_autograd(_backward, setup_context=_setup)
