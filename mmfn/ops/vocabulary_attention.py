"""Cross entropy of a linear head as attention over the vocabulary, for bfloat16 on a CPU.

A row x_n of the input is a query, the rows of the head are keys and values: attention returns lse_n = logsumexp(l_n)
and `sum_v p_nv weight_v`, the gradient of x_n but for its label. Turned around, a row of the head is the query, the
tokens are keys and values, and the bias log(c_n) - lse_n turns scores into c_n p_nv, where c_n weighs token n:
attention, times the sum it divides by, is the gradient of the head but for the labels. Products of bfloat16 matrices
come out rounded on a CPU, but this kernel keeps scores in float32, and in the cache: no logits in memory, and four
products for three (more where the labels are a large part of the vocabulary).

The label is hidden and takes part by itself, in float32: p_ny - 1 out of a rounded sum would leave nothing of the
gradient of a token that is predicted well. What is rounded: probabilities, to bfloat16, where they meet values; every
mean that the kernel returns; exp, to 5e-5 of itself (the kernel's own). So it is not for weights of both signs, whose
gradients may cancel.

Legend: N tokens (all have a label), S keys, D width, V vocabulary, B rows of the head in a block, U rows of the head
that are labels.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmfn.torch_private import FLASH_CPU

QUERIES = 2048  # at once; the kernel works on 256 of them per thread
KEYS = 4096  # rows of the head that are keys at once: the kernel copies them
GROUP = 512  # tokens that are keys at once: the mean over them is rounded, sums of such means are not


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

    `rows`: tokens that meet the head at once, at most `QUERIES`.
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
        ce_N[part] = torch.logaddexp(others_N - label_N, torch.zeros_like(label_N))  # lse - label, uncancelled
        losses_N[part] = ce_N[part] + z_loss * lse_N.square()
        factor = weights * (1 + 2 * z_loss * lse_N)
        pull = weights * (2 * z_loss * lse_N) - factor * rest_N  # the gradient of the label's logit
        factor_N[part], pull_N[part], bias_N[part] = factor, pull, factor.abs().log() - lse_N
        if dx_ND is not None:
            dx_ND[part] = mean_ND.mul_((factor * rest_N)[:, None]).addcmul_(row_ND, pull[:, None])
    dw_VD = _head_grad(x_ND, weight_VD, labels_N, factor_N, pull_N, bias_N) if needs[1] else None
    return Attended(losses_N, ce_N, dx_ND, dw_VD)


def _others(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Of all rows of the head but the label's: their mean under the softmax of their logits, and its logsumexp."""
    N, V = x_ND.shape[0], weight_VD.shape[0]
    rows_U, place_N = torch.unique(labels_N, return_inverse=True)  # only rows that are labels need a mask of pairs
    label_rows_UD, mask_NU = weight_VD[rows_U], x_ND.new_zeros(N, rows_U.shape[0])
    mask_NU[torch.arange(N), place_N] = _hidden(mask_NU)
    out_ND, lse_N = _attention(x_ND, label_rows_UD, label_rows_UD, mask_NU)
    del mask_NU
    mean_ND = out_ND.to(lse_N.dtype)
    hidden_V = x_ND.new_zeros(V).index_fill_(0, rows_U, _hidden(x_ND))
    for part in _slices(V, KEYS):
        rows_BD = weight_VD[part]
        out_ND, more_N = _attention(x_ND, rows_BD, rows_BD, hidden_V[part].expand(N, -1))
        total_N = torch.logaddexp(lse_N, more_N)
        old_N1, new_N1 = ((x - total_N).exp()[:, None] for x in (lse_N, more_N))
        mean_ND, lse_N = mean_ND.mul_(old_N1).addcmul_(out_ND.to(mean_ND.dtype), new_N1), total_N
    return mean_ND, lse_N


def _head_grad(
    x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, factor_N: Tensor, pull_N: Tensor, bias_N: Tensor
) -> Tensor:
    """`sum_n x_n (factor_n p_nv if v is not label_n else pull_n)` for each row v of the head."""
    values_ND = x_ND if bool((factor_N > 0).all()) else x_ND * factor_N.sign()[:, None].to(x_ND.dtype)
    dw_VD = torch.empty_like(weight_VD)
    for part in _slices(weight_VD.shape[0], QUERIES):
        rows_BD = weight_VD[part]
        sum_BD = torch.zeros_like(rows_BD, dtype=bias_N.dtype)
        own_N = ((labels_N >= part.start) & (labels_N < part.stop)).nonzero()[:, 0]  # tokens whose labels are here
        row_N = labels_N[own_N] - part.start
        others_N = bias_N.index_fill(0, own_N, _hidden(bias_N))
        for group in _slices(x_ND.shape[0], GROUP):
            _add_(sum_BD, rows_BD, x_ND[group], values_ND[group], others_N[group].expand(rows_BD.shape[0], -1))
        for group in _slices(own_N.shape[0], GROUP):
            tokens_N = own_N[group]
            bias_BN = bias_N[tokens_N].repeat(rows_BD.shape[0], 1)
            bias_BN[row_N[group], torch.arange(tokens_N.shape[0])] = _hidden(bias_BN)
            _add_(sum_BD, rows_BD, x_ND[tokens_N], values_ND[tokens_N], bias_BN)
        own_ND = x_ND[own_N].to(pull_N.dtype) * pull_N[own_N, None]
        dw_VD[part] = sum_BD.index_add_(0, row_N, own_ND)
    return dw_VD


def _add_(sum_BD: Tensor, rows_BD: Tensor, x_ND: Tensor, values_ND: Tensor, bias_BN: Tensor) -> None:
    """`sum_b += sum_n exp(rows_b x_n + bias_bn) values_n`."""
    mean_BD, lse_B = _attention(rows_BD, x_ND, values_ND, bias_BN)
    sum_BD.addcmul_(mean_BD.to(sum_BD.dtype), lse_B.exp()[:, None])


def _attention(q_ND: Tensor, k_SD: Tensor, v_SD: Tensor, mask_NS: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of scores `q @ k.T + mask`: the output, [N, D], and the logsumexp of the scores, wide[N]."""
    q, k, v = (x.contiguous()[None, None] for x in (q_ND, k_SD, v_SD))  # the kernel takes it for granted
    out, lse = FLASH_CPU(q, k, v, 0.0, False, attn_mask=mask_NS[None, None], scale=1.0)
    return out[0, 0], lse[0, 0]


def _hidden(mask: Tensor) -> float:
    """What hides a pair in such a mask; -inf would make a mean over nothing NaN."""
    return torch.finfo(mask.dtype).min / 2


def _slices(length: int, most: int) -> Iterator[slice]:
    """As few slices as make up `length`, of one size but for the last, which may be shorter."""
    size = -(-length // -(-length // max(1, most))) if length else 1
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
