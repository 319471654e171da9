"""Cross entropy of a linear head as attention over the vocabulary, for bfloat16 on a CPU.

A row x_n of the input is a query, the rows of the head are keys and values: attention returns lse_n = logsumexp(l_n)
and `sum_v p_nv weight_v`, the gradient of x_n but for its label. Turned around, a row of the head is the query, the
tokens are keys and values, and the bias log(c_n) - lse_n turns scores into c_n p_nv, where c_n weighs token n:
attention, times the sum it divides by, is the gradient of the head but for the labels. Products of bfloat16 matrices
come out rounded on a CPU, but this kernel keeps scores in float32, and in the cache: four products for three, and no
logits in memory.

The label is masked and takes part by itself, in float32: p_ny - 1 out of a rounded sum would leave nothing of the
gradient of a token that is predicted well.

Legend: N tokens (all have a label), D width, V vocabulary, B rows of the head in a block.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

QUERIES = 2048  # at once; more are no faster
KEYS = 4096  # rows of the head that are keys at once, which the kernel copies
PAIRS = 2**21  # of a token and a row of the head that have a value of their own in a mask, at most

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class Attended(NamedTuple):
    """What is minimised and the plain cross entropy of each token, [N] and wide, and the gradients of x and the head in
    their dtype, None where not asked for."""

    losses_N: Tensor
    ce_N: Tensor
    dx_ND: Tensor | None
    dw_VD: Tensor | None


def attend(
    x_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    weights_N: Tensor,
    *,
    z_loss: float,
    rows: int,
    needs: Sequence[bool],
) -> Attended:
    """Losses, and gradients of their sum weighted with `weights_N` (wide): of x and of the head, where it `needs` them.

    `rows`: tokens that meet the head at once, at most `QUERIES`. Of the head's gradient, what a row gets from tokens
    with other labels is rounded twice; what it gets from its own tokens, which is most of it, once.
    """
    losses_N, ce_N, factor_N, pull_N, bias_N = (torch.empty_like(weights_N) for _ in range(5))
    dx_ND = torch.empty_like(x_ND) if needs[0] else None
    for part in _slices(x_ND.shape[0], min(rows, QUERIES)):
        x, labels, weights = x_ND[part], labels_N[part], weights_N[part]
        row_ND = weight_VD[labels].to(weights.dtype)  # the label's row of the head
        label_N = torch.linalg.vecdot(x.to(weights.dtype), row_ND)
        mean_ND, others_N = _others(x, weight_VD, labels)
        lse_N = torch.logaddexp(others_N, label_N)
        rest_N = (others_N - lse_N).exp()  # 1 - p of the label
        ce_N[part] = torch.logaddexp(others_N - label_N, torch.zeros_like(label_N))  # lse - label, exact near 0 too
        losses_N[part] = ce_N[part] + z_loss * lse_N.square()
        factor = weights * (1 + 2 * z_loss * lse_N)
        pull = weights * (2 * z_loss * lse_N) - factor * rest_N  # the gradient of the label's logit
        factor_N[part], pull_N[part], bias_N[part] = factor, pull, factor.abs().log() - lse_N
        if dx_ND is not None:
            dx_ND[part] = mean_ND.mul_((factor * rest_N)[:, None]).addcmul_(row_ND, pull[:, None])
    pairs = min(rows * weight_VD.shape[0], PAIRS)
    dw_VD = _head_grad(x_ND, weight_VD, labels_N, factor_N, pull_N, bias_N, pairs) if needs[1] else None
    return Attended(losses_N, ce_N, dx_ND, dw_VD)


def _others(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Of all rows of the head but the label's: their mean under the softmax of their logits, and its logsumexp."""
    N, V = x_ND.shape[0], weight_VD.shape[0]
    rows_L, place_N = torch.unique(labels_N, return_inverse=True)  # only rows that are labels need a mask of pairs
    label_rows_LD, mask_NL = weight_VD[rows_L], x_ND.new_zeros(N, rows_L.shape[0])
    mask_NL[torch.arange(N), place_N] = _hidden(mask_NL)
    out_ND, lse_N = _attention(x_ND, label_rows_LD, label_rows_LD, mask_NL)
    del mask_NL
    mean_ND = out_ND.to(lse_N.dtype)
    hidden_V = x_ND.new_zeros(V).index_fill_(0, rows_L, _hidden(x_ND))
    for part in _slices(V, KEYS):
        rows_BD = weight_VD[part]
        out_ND, more_N = _attention(x_ND, rows_BD, rows_BD, hidden_V[part].expand(N, -1))
        total_N = torch.logaddexp(lse_N, more_N)
        old_N1, new_N1 = ((x - total_N).exp()[:, None] for x in (lse_N, more_N))
        mean_ND, lse_N = mean_ND.mul_(old_N1).addcmul_(out_ND.to(mean_ND.dtype), new_N1), total_N
    return mean_ND, lse_N


def _head_grad(
    x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, factor_N: Tensor, pull_N: Tensor, bias_N: Tensor, pairs: int
) -> Tensor:
    """`sum_n x_n (factor_n p_nv if v is not label_n else pull_n)` for each row v of the head."""
    dw_VD, N = torch.zeros_like(weight_VD), x_ND.shape[0]
    if not N:
        return dw_VD
    values_ND = x_ND if bool((factor_N > 0).all()) else x_ND * factor_N.sign()[:, None].to(x_ND.dtype)

    def others(rows_BD: Tensor, bias_BN: Tensor) -> Tensor:
        mean_BD, lse_B = _attention(rows_BD, x_ND, values_ND, bias_BN)
        return mean_BD * lse_B.exp()[:, None]

    for part in _slices(weight_VD.shape[0], QUERIES):
        rows_BD = weight_VD[part]
        dw_VD[part] = others(rows_BD, bias_N.expand(rows_BD.shape[0], -1))
    rows_L, place_N = torch.unique(labels_N, return_inverse=True)  # they come again, without the tokens they belong to
    for part in _slices(rows_L.shape[0], pairs // N):
        rows_B = rows_L[part]
        where_N = ((place_N >= part.start) & (place_N < part.stop)).nonzero()[:, 0]
        row_N = place_N[where_N] - part.start
        bias_BN = bias_N.repeat(rows_B.shape[0], 1)
        bias_BN[row_N, where_N] = _hidden(bias_BN)
        own_ND = x_ND[where_N].to(pull_N.dtype) * pull_N[where_N, None]
        dw_VD[rows_B] = others(weight_VD[rows_B], bias_BN).index_add_(0, row_N, own_ND).to(dw_VD.dtype)
    return dw_VD


def _attention(q_ND: Tensor, k_SD: Tensor, v_SD: Tensor, mask_NS: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of scores `q @ k.T + mask`: the output, [N, D], and the logsumexp of the scores, wide[N]."""
    q, k, v, mask = (x[None, None] for x in (q_ND, k_SD, v_SD, mask_NS))
    out, lse = _flash(q, k, v, 0.0, False, attn_mask=mask, scale=1.0)
    return out[0, 0], lse[0, 0]


def _hidden(mask: Tensor) -> float:
    """What hides a pair in such a mask; -inf would make a mean over nothing NaN."""
    return torch.finfo(mask.dtype).min / 2


def _slices(length: int, most: int) -> Iterator[slice]:
    """Slices of almost even size, the first of them the largest, that make up `length`."""
    size = -(-length // -(-length // max(1, most))) if length else 1
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
