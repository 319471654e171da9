"""Blocks of attention: some queries against some of their keys, with what is needed to merge blocks exactly.

Attention over all keys is made of blocks over parts of them: outputs merge by their log-sum-exp, gradients of blocks
add. That is how attention is computed when keys lie on several ranks.

Legend: T queries, S keys, H query heads, K kv heads, C channels, N segments.
"""

import torch
from torch import Tensor

from mmfn.batch import Segments
from mmfn.ops import attention
from mmfn.ops.kernel import Kernel


def attention_block(
    q_THC: Tensor,
    k_SKC: Tensor,
    v_SKC: Tensor,
    segments: Segments,
    keys: Segments | None = None,
    *,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of the queries of segment n in `segments` to its keys in `keys`, and the log-sum-exp of the scores.

    Shapes as in `attention`; without `keys` they lie where the queries do, and only then may a block be causal. Returns
    `(o_THC, lse_TH)`, `lse_TH` float32 (float64 for float64). A query without keys has output 0 and lse -inf. Not
    differentiable by autograd. CPU and meta tensors only. Raises ValueError for shapes, dtypes or offsets that do not
    fit and for tensors of another device.
    """
    _check_device(q_THC)
    check_block(q_THC, k_SKC, v_SKC, segments, keys, is_causal)
    qkv, key_offsets_N = (q_THC.detach(), k_SKC.detach(), v_SKC.detach()), None if keys is None else keys.host_N
    o_THC, lse_TH = attention.ATTENTION(*qkv, segments.host_N, is_causal, key_offsets_N)
    return o_THC, lse_TH


def attention_block_grad(
    do_THC: Tensor,
    q_THC: Tensor,
    k_SKC: Tensor,
    v_SKC: Tensor,
    o_THC: Tensor,
    lse_TH: Tensor,
    segments: Segments,
    keys: Segments | None = None,
    *,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients `(dq_THC, dk_SKC, dv_SKC)` of `attention_block`'s output.

    With the `o_THC` and `lse_TH` of all keys (not of this block alone) the gradients of blocks add up to those of the
    whole. Raises ValueError as `attention_block` does.
    """
    _check_device(q_THC)
    check_block(q_THC, k_SKC, v_SKC, segments, keys, is_causal)
    key_offsets_N = None if keys is None else keys.host_N
    dq_THC, dk_SKC, dv_SKC = attention.ATTENTION_GRAD(
        do_THC, q_THC, k_SKC, v_SKC, o_THC, lse_TH, segments.host_N, is_causal, key_offsets_N
    )
    return dq_THC, dk_SKC, dv_SKC


def merge_blocks(o_THC: Tensor, lse_TH: Tensor, more_THC: Tensor, more_lse_TH: Tensor) -> tuple[Tensor, Tensor]:
    """Two blocks of the same queries over different keys as one; the output is in the dtype of the lse."""
    total_TH = torch.logaddexp(lse_TH, more_lse_TH)
    base_TH = total_TH.clamp(min=torch.finfo(total_TH.dtype).min)  # -inf where there is no key in either
    weight_TH1, more_weight_TH1 = ((x - base_TH).exp()[..., None] for x in (lse_TH, more_lse_TH))
    return o_THC * weight_TH1 + more_THC * more_weight_TH1, total_TH


def attention_block_reference(
    q_THC: Tensor,
    k_SKC: Tensor,
    v_SKC: Tensor,
    segments: Segments,
    keys: Segments | None = None,
    *,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """`attention_block` as a masked softmax over all pairs of tokens."""
    return attention.dense(q_THC, k_SKC, v_SKC, segments.offsets_N, (keys or segments).offsets_N, is_causal)


def attention_block_grad_reference(
    do_THC: Tensor,
    q_THC: Tensor,
    k_SKC: Tensor,
    v_SKC: Tensor,
    o_THC: Tensor,
    lse_TH: Tensor,
    segments: Segments,
    keys: Segments | None = None,
    *,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_block_grad` written out over all pairs of tokens. Source: Dao 2023 (arXiv:2307.08691), section 2.3."""
    H, C = q_THC.shape[1:]
    K, wide = k_SKC.shape[1], lse_TH.dtype
    mask_TS = attention.dense_mask(q_THC, k_SKC, segments.offsets_N, (keys or segments).offsets_N, is_causal)
    q, k, v, o, do = (x.to(wide) for x in (q_THC, k_SKC, v_SKC, o_THC, do_THC))
    k, v = (x.repeat_interleave(H // K, 1) for x in (k, v))
    scores_HTS = torch.einsum("thc,shc->hts", q, k) * C**-0.5
    probs_HTS = torch.where(mask_TS, scores_HTS - lse_TH.T[..., None], -torch.inf).exp()
    slope_HTS = torch.einsum("thc,shc->hts", do, v) - (do * o).sum(-1).T[..., None]
    ds_HTS = probs_HTS * slope_HTS * C**-0.5
    dq_THC = torch.einsum("hts,shc->thc", ds_HTS, k).to(q_THC.dtype)
    dk_SHC, dv_SHC = torch.einsum("hts,thc->shc", ds_HTS, q), torch.einsum("hts,thc->shc", probs_HTS, do)
    dk_SKC, dv_SKC = (x.view(-1, K, H // K, C).sum(2).to(k_SKC.dtype) for x in (dk_SHC, dv_SHC))
    return dq_THC, dk_SKC, dv_SKC


def _check_device(q_THC: Tensor) -> None:
    if q_THC.device.type not in ("cpu", "meta"):
        raise ValueError(
            f"attention_block is made for CPU tensors but got q on {q_THC.device}; use that device's table"
        )


def check_block(
    q_THC: Tensor, k_SKC: Tensor, v_SKC: Tensor, segments: Segments, keys: Segments | None, is_causal: bool
) -> None:
    """Raise ValueError unless shapes, dtypes and offsets of a block fit."""
    attention.check_inputs(q_THC, k_SKC, v_SKC, segments, keys or segments)
    check_keys(q_THC, k_SKC, segments, keys, is_causal)


def check_keys(q_THC: Tensor, k_SKC: Tensor, segments: Segments, keys: Segments | None, is_causal: bool) -> None:
    """Raise ValueError unless keys are those of the queries, or have segments of their own and no causal mask."""
    if keys is None and q_THC.shape[0] != k_SKC.shape[0]:
        raise ValueError(f"there are {q_THC.shape[0]} queries and {k_SKC.shape[0]} keys; pass `keys`, their segments")
    if keys is not None and (is_causal or keys.offsets_N.shape != segments.offsets_N.shape):
        raise ValueError(
            f"keys of their own need the number of segments of the queries, {segments.offsets_N.numel() - 1}, and "
            f"is_causal False; got {keys.offsets_N.numel() - 1} and {is_causal}"
        )


KERNEL = Kernel(attention_block, operators=attention.OPERATORS, results=("mmfn::attention",))
GRAD_KERNEL = Kernel(attention_block_grad, operators=attention.OPERATORS)
