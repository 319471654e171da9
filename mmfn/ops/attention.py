"""Packed self-attention within segments. Legend: T queries, S keys (S == T), H heads, K kv heads, C channels, B rows."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfn.batch import Segments


def attention(q_THC: Tensor, k_SKC: Tensor, v_SKC: Tensor, segments: Segments, *, is_causal: bool) -> Tensor:
    """Softmax attention of every token within its segment."""
    outs = []
    offsets = segments.offsets_N.tolist()
    for a, b in zip(offsets, offsets[1:], strict=False):
        if a == b:
            continue
        q, k, v = (x[a:b].transpose(0, 1)[None] for x in (q_THC, k_SKC, v_SKC))
        outs.append(F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)[0].transpose(0, 1))
    outs.append(torch.zeros_like(q_THC[offsets[-1] :]))
    return torch.cat(outs)


def attention_reference(q_THC: Tensor, k_SKC: Tensor, v_SKC: Tensor, segments: Segments, *, is_causal: bool) -> Tensor:
    """`attention` as a dense masked softmax over all pairs of tokens."""
    T, H, C = q_THC.shape
    G = H // k_SKC.shape[1]
    index_T = torch.arange(T, device=q_THC.device)
    segment_T = torch.searchsorted(segments.offsets_N, index_T, right=True)
    mask_TS = (segment_T[:, None] == segment_T) & (index_T < segments.offsets_N[-1])
    if is_causal:
        mask_TS = mask_TS & (index_T[:, None] >= index_T)
    k_SHC, v_SHC = k_SKC.repeat_interleave(G, 1), v_SKC.repeat_interleave(G, 1)
    scores_HTS = torch.einsum("thc,shc->hts", q_THC, k_SHC) * C**-0.5
    scores_HTS = scores_HTS.masked_fill(~mask_TS, torch.finfo(scores_HTS.dtype).min)
    probs_HTS = scores_HTS.softmax(-1) * mask_TS
    return torch.einsum("hts,shc->thc", probs_HTS, v_SHC)


def attention_cached(q_BHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, lengths_B: Tensor) -> Tensor:
    """One query per row against its first `lengths_B[b]` cached keys."""
    return attention_cached_reference(q_BHC, k_BSKC, v_BSKC, lengths_B)


def attention_cached_reference(q_BHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, lengths_B: Tensor) -> Tensor:
    """`attention_cached` as a masked softmax."""
    B, H, C = q_BHC.shape
    q_BKGC = q_BHC.unflatten(1, (k_BSKC.shape[2], -1))
    scores_BKGS = torch.einsum("bkgc,bskc->bkgs", q_BKGC, k_BSKC) * C**-0.5
    mask_BS = torch.arange(k_BSKC.shape[1], device=q_BHC.device) < lengths_B[:, None]
    scores_BKGS = scores_BKGS.masked_fill(~mask_BS[:, None, None], -torch.inf)
    return torch.einsum("bkgs,bskc->bkgc", scores_BKGS.softmax(-1), v_BSKC).reshape(B, H, C)
