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

from mmfn.dtypes import wide
from mmfn.ops.attention_block import merge_blocks

QUERIES = 2048  # tokens that meet the head at once; more are no faster
HEAD_VALUES = 2**23  # of the head that they meet at once: the kernel copies it twice
PAIRS = 2**22  # of a row of the head and a token that have a value of their own in a mask, at most
MASKED = -1e30  # -inf would make a mean over no row NaN

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
            dx_ND[part] = (mean_ND * (factor * rest_N)[:, None]).addcmul_(row_ND, pull[:, None])
    pairs = min(rows * weight_VD.shape[0], PAIRS)
    dw_VD = _head_grad(x_ND, weight_VD, labels_N, factor_N, pull_N, bias_N, pairs) if needs[1] else None
    return Attended(losses_N, ce_N, dx_ND, dw_VD)


def _others(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Of all rows of the head but the label's: their mean under the softmax of their logits, and its logsumexp."""
    N, D = x_ND.shape
    rows_L, place_N = torch.unique(labels_N, return_inverse=True)  # only rows that are labels need a mask of pairs
    label_rows_LD, mask_NL = weight_VD[rows_L], x_ND.new_zeros(N, rows_L.shape[0], dtype=wide(x_ND.dtype))
    mask_NL[torch.arange(N), place_N] = MASKED
    mean_ND, lse_N = _attention(x_ND, label_rows_LD, label_rows_LD, mask_NL)
    hidden_V = mask_NL.new_zeros(weight_VD.shape[0]).index_fill_(0, rows_L, MASKED)
    for part in _slices(weight_VD.shape[0], HEAD_VALUES // D):
        rows_BD = weight_VD[part]
        more_ND, more_lse_N = _attention(x_ND, rows_BD, rows_BD, hidden_V[part].expand(N, -1))
        mean_N1D, lse_N1 = merge_blocks(mean_ND[:, None], lse_N[:, None], more_ND[:, None], more_lse_N[:, None])
        mean_ND, lse_N = mean_N1D[:, 0], lse_N1[:, 0]
    return mean_ND, lse_N


def _head_grad(
    x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, factor_N: Tensor, pull_N: Tensor, bias_N: Tensor, pairs: int
) -> Tensor:
    """`sum_n x_n (factor_n p_nv if v is not label_n else pull_n)` for each row v of the head."""
    values_ND = x_ND if bool((factor_N > 0).all()) else x_ND * factor_N.sign()[:, None].to(x_ND.dtype)
    pulled_ND = x_ND.to(pull_N.dtype) * pull_N[:, None]
    dw_VD = torch.zeros_like(weight_VD)
    parts = list(_slices(weight_VD.shape[0], pairs // x_ND.shape[0])) if x_ND.shape[0] else []
    bias_BN = bias_N.repeat(parts[0].stop, 1) if parts else bias_N[None]
    for part in parts:
        rows_BD, (where_N, label_N) = weight_VD[part], _labels_in(part, labels_N)
        bias_BN[label_N, where_N] = MASKED
        mean_BD, lse_B = _attention(rows_BD, x_ND, values_ND, bias_BN[: rows_BD.shape[0]])
        bias_BN[label_N, where_N] = bias_N[where_N]
        dw_VD[part] = (mean_BD * lse_B.exp()[:, None]).index_add_(0, label_N, pulled_ND[where_N])
    return dw_VD


def _attention(q_ND: Tensor, k_SD: Tensor, v_SD: Tensor, mask_NS: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of scores `q @ k.T + mask`: the output, [N, D], and the logsumexp of the scores, wide[N]."""
    q, k, v, mask = (x[None, None] for x in (q_ND, k_SD, v_SD, mask_NS))
    out, lse = _flash(q, k, v, 0.0, False, attn_mask=mask, scale=1.0)
    return out[0, 0], lse[0, 0]


def _labels_in(part: slice, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the tokens whose label is a row in a part of the head, and which of its rows that is."""
    where_N = ((labels_N >= part.start) & (labels_N < part.stop)).nonzero()[:, 0]
    return where_N, labels_N[where_N] - part.start


def _slices(length: int, most: int) -> Iterator[slice]:
    """Slices of almost even size, the first of them the largest, that make up `length`."""
    size = -(-length // -(-length // max(1, most))) if length else 1
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
