"""What one chunk of logits goes through on its way to a loss and gradients: shared by heads that are whole and sliced.

A row's loss is `lse - l_y + z * lse^2 + s * (l_y - mean_v l_v)`: cross entropy, z-loss and label smoothing, with lse =
logsumexp(l) and y the label. Its gradient by l_v is `f p_v - (1 - s) [v = y] - s / V`, where p = softmax(l) and f =
1 + 2 z lse. All but the last term is `scale * (exp(l_v - max) - pull * [v = y])` with two numbers per row, so neither
z-loss nor smoothing costs a pass over the logits; the last term is the same for all tokens of the vocabulary, and its
share of loss and gradients is worked out from sums over rows of x and of the head (`smoothing`).

Logits are float32 also where x and the head are narrower: rounded, they would cost the head's gradient as much again
as rounding it.

Legend: T tokens, N supervised tokens (or those of one chunk), D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmfn.batch import IGNORE
from mmfn.ops.custom import Context, function
from mmfn.torch_private import assert_on_device

ALIGN = 16  # a chunk of more rows gets zero rows to a multiple: logits of 511 rows take 1.4 times as long as of 512
STAGE_VALUES = 2**20  # logits become gradients in pieces of this many values, which stay in the cache

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of x, head and bias; None where not asked for


def supervised(labels_T: Tensor, weights_T: Tensor, num_vocabulary: int, num_labels: Tensor | None = None) -> Tensor:
    """Places of the supervised tokens: int64[N]. The host reads their number unless it has it, in `num_labels`.

    Raises ValueError for a label of one that is no token id, and for another number of them; on an accelerator the
    device raises, and nobody waits.
    """
    is_label_T = (labels_T != IGNORE) & (weights_T != 0)
    index_N = is_label_T.nonzero()[:, 0] if num_labels is None else _first(is_label_T, int(num_labels))
    labels_N = labels_T[index_N]
    if labels_T.device.type not in ("cpu", "meta"):
        is_token = ((labels_N >= 0) & (labels_N < num_vocabulary)).all()
        assert_on_device(is_token, f"a label lies outside of the head's {num_vocabulary} rows; fix the labels")
    elif index_N.numel() and not 0 <= int(labels_N.min()) <= int(labels_N.max()) < num_vocabulary:
        raise ValueError(
            f"labels span {int(labels_N.min())} to {int(labels_N.max())} but the head has {num_vocabulary} rows; fix "
            "them"
        )
    return index_N


def _first(is_label_T: Tensor, num: int) -> Tensor:
    """Places of what is true, `num` of them, in order; each goes to its slot, all that is false to one behind."""
    T, device = is_label_T.shape[0], is_label_T.device
    message = f"num_labels is {num} but another number of tokens has a label and a weight; weigh the batch again"
    place_T = is_label_T.cumsum(0)
    if device.type != "cpu":
        assert_on_device(is_label_T.sum() == num, message)
    elif T and int(place_T[-1]) != num:
        raise ValueError(message)
    slot_T = torch.where(is_label_T, place_T - 1, num)
    return torch.zeros(num + 1, dtype=torch.int64, device=device).scatter(0, slot_T, torch.arange(T, device=device))[
        :num
    ]


def aligned(rows: int) -> int:
    """Rows of a chunk, zero rows included."""
    return rows if rows < ALIGN else -(-rows // ALIGN) * ALIGN


def logits_(out_VN: Tensor, weight_VD: Tensor, x_ND: Tensor, bias_V: Tensor | None) -> None:
    """Write logits, V x N: all three products of a chunk are faster in this layout. `out_VN` is wide."""
    if out_VN.dtype != weight_VD.dtype:
        out_VN.zero_()
        for out, weight in zip(_pieces(out_VN, out_VN), _pieces(weight_VD, out_VN), strict=True):
            _add_product_(out, weight, x_ND.t())
        if bias_V is not None:
            out_VN += bias_V[:, None]
    elif bias_V is None:
        torch.mm(weight_VD, x_ND.t(), out=out_VN)
    else:
        torch.addmm(bias_V[:, None], weight_VD, x_ND.t(), out=out_VN)


def exponentiate_(logits_VN: Tensor, max_N: Tensor) -> Tensor:
    """Overwrite logits with exp(logits - max); returns the sums over V."""
    sums_N = torch.zeros_like(max_N)
    for block_VN in torch.split(logits_VN, max(1, STAGE_VALUES // max_N.numel())):
        sums_N += block_VN.sub_(max_N).exp_().sum(0)
    return sums_N


class Rows(NamedTuple):
    """Figures of rows of logits: `ce_N`, the cross entropies; `losses_N`, what is minimised but for the mean logit of
    smoothing; `scale_N` and `pull_N`, of the gradient (see above)."""

    ce_N: Tensor
    losses_N: Tensor
    scale_N: Tensor
    pull_N: Tensor


def rows_of(max_N: Tensor, sums_N: Tensor, label_N: Tensor, z_loss: float, label_smoothing: float) -> Rows:
    """From the largest logit, the sum of exp(logits - max) and the label's logit - max; all float32 or wider."""
    log_sums_N = sums_N.log()
    ce_N = losses_N = log_sums_N - label_N
    scale_N, pull_N = 1 / sums_N, (1 - label_smoothing) * sums_N
    if z_loss:
        lse_N = log_sums_N + max_N
        losses_N = losses_N + z_loss * lse_N.square()
        factor_N = 1 + 2 * z_loss * lse_N
        factor_N = torch.where(factor_N == 0, torch.finfo(factor_N.dtype).eps, factor_N)  # it is divided by
        scale_N, pull_N = scale_N * factor_N, pull_N / factor_N
    if label_smoothing:
        losses_N = losses_N + label_smoothing * (label_N + max_N)
    return Rows(ce_N, losses_N, scale_N, pull_N)


def input_grad(weight_VD: Tensor, grad_VN: Tensor, scale_N: Tensor) -> Tensor:
    """`(weight_VD.T @ grad_VN * scale_N).T`, [N, D]."""
    if grad_VN.dtype == weight_VD.dtype:
        return (weight_VD.t() @ grad_VN).mul_(scale_N).t()
    dx_DN = grad_VN.new_zeros(weight_VD.shape[1], grad_VN.shape[1])
    for weight, grad in zip(_pieces(weight_VD, grad_VN), _pieces(grad_VN, grad_VN), strict=True):
        _add_product_(dx_DN, weight.t(), grad)
    return dx_DN.mul_(scale_N).t()


def add_head_grad_(sum_VD: Tensor, grad_VN: Tensor, x_ND: Tensor, scale_N: Tensor) -> None:
    """`sum_VD += grad_VN @ (scale_N[:, None] * x_ND)`; x is consumed."""
    if sum_VD.dtype == x_ND.dtype:
        sum_VD.addmm_(grad_VN, x_ND.mul_(scale_N[:, None]))
        return
    for part, grad in zip(_pieces(sum_VD, grad_VN), _pieces(grad_VN, grad_VN), strict=True):
        _add_product_(part, grad * scale_N, x_ND)


def _pieces(x_V: Tensor, logits_VN: Tensor) -> tuple[Tensor, ...]:
    """Rows of the vocabulary in stages, so that what is wide for a while is small: on a CPU, stays in the cache."""
    values = STAGE_VALUES if x_V.device.type == "cpu" else 16 * STAGE_VALUES
    return torch.split(x_V, max(1, values // logits_VN.shape[1]))


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b` in float32 with nothing rounded in between; a or b is narrow, the other narrow or float32.

    A GPU multiplies narrow factors into float32 by itself; a float32 factor goes there as a sum of two narrow ones. A
    CPU takes float32 factors: its narrow products come out rounded, also those of matrix units (AMX).
    """
    if not total.is_cuda:
        total.addmm_(a.float(), b.float())
        return
    dtype = a.dtype if b.dtype == torch.float32 else b.dtype
    for left in _narrowed(a, dtype):
        for right in _narrowed(b, dtype):
            total += torch.mm(left, right, out_dtype=torch.float32)


def _narrowed(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Narrow tensors that add up to x."""
    high = x.to(dtype)
    return (high,) if x.dtype == dtype else (high, (x - high).to(dtype))


def _alone(x: Tensor) -> Tensor:
    return x


class Smoothing(NamedTuple):
    """The last term of the loss, 0-D, and its gradients: `x_D` by a row of x of weight 1, `row_D` by any row of the
    head, `bias` by any value of the bias."""

    loss: Tensor
    x_D: Tensor
    row_D: Tensor
    bias: Tensor


def smoothing(
    x_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    index_N: Tensor,
    weights_N: Tensor,
    *,
    share: float,
    total: Callable[[Tensor], Tensor] = _alone,
) -> Smoothing:
    """`-share * sum_n weights_n sum_v logits_nv` and its gradients, in the dtype of `weights_N`.

    `share`: label smoothing / V. `total`: the sum over ranks, where a head is sliced and others have other rows of x.
    """
    D, dtype = x_TD.shape[1], weights_N.dtype
    head_D = weight_VD.sum(0, dtype=dtype)
    bias = weights_N.new_zeros(1) if bias_V is None else bias_V.sum(0, dtype=dtype)[None]
    own_D, weight = weights_N @ x_TD[index_N].to(dtype), weights_N.sum()[None]
    sums = total(torch.cat([head_D, bias, own_D, weight]))
    head_D, bias, rows_D, weight_of_all = torch.split(sums, [D, 1, D, 1])
    loss = -share * (own_D @ head_D + (weight * bias)[0])
    return Smoothing(loss, -share * head_D, -share * rows_D, -share * weight_of_all)


def _gradients_in_forward(
    ctx: Context, compute: Callable[..., tuple[Tensor, Tensor, Gradients]], *leaves: Tensor | None
) -> tuple[Tensor, Tensor]:
    loss, ce, grads = compute(*leaves)
    ctx.save_for_backward(*grads)
    ctx.mark_non_differentiable(ce)
    return loss, ce


def _scaled_gradients(ctx: Context, dloss: Tensor, _dce: Tensor) -> tuple[Tensor | None, ...]:
    # autograd itself refuses a second backward: the saved tensors were modified in place
    saved: Sequence[Tensor | None] = ctx.saved_tensors
    return None, *(None if grad is None else grad.mul_(dloss) for grad in saved)


gradients_in_forward = function(_gradients_in_forward, _scaled_gradients)
"""`(loss, ce)` of `(compute, x, head, bias)`, where `compute(x, head, bias) -> (loss, ce, gradients)`; gradients of the
loss alone. The backward scales them in place: a second copy of the head's gradient is never made."""
