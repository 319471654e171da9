"""Ulysses attention: heads are exchanged for tokens, so that each rank has whole rows of some heads.

Legend: T this rank's tokens, S tokens of all ranks, U ranks, H query heads, K kv heads, C channels.
"""

from math import gcd

import torch
from torch import Tensor

from mmfn.batch import Segments
from mmfn.ops import Attention
from mmfn.parallel.mesh.axis import Axis, exchange

SITE = "heads"


def ulysses_attention(
    q_THC: Tensor,
    k_TKC: Tensor,
    v_TKC: Tensor,
    segments: Segments,
    *,
    is_causal: bool,
    axis: Axis,
    inner: Attention,
) -> Tensor:
    """`inner` on H / U heads of the tokens of all ranks, which lie end to end in the order of ranks; o_THC.

    `segments`: those of the tokens of all ranks. U divides H. One all-to-all for queries, keys and values, one for the
    output, and one each on the way back. Kv heads are repeated `kv_repeats` times first, so that every rank gets those
    its queries use; autograd adds their gradients.
    Source: Jacobs et al. 2023 (arXiv:2309.14509).
    """
    T, U, C = q_THC.shape[0], axis.size, q_THC.shape[2]
    repeats = kv_repeats(k_TKC.shape[1], U)
    k_TKC, v_TKC = (x.repeat_interleave(repeats, 1) for x in (k_TKC, v_TKC))
    num_heads = [x.shape[1] // U for x in (q_THC, k_TKC, v_TKC)]
    groups = [x.reshape(T, U, n, C) for x, n in zip((q_THC, k_TKC, v_TKC), num_heads, strict=True)]
    heads_SNC = exchange(torch.cat(groups, 2).transpose(0, 1), axis, SITE).flatten(0, 1)
    q_SHC, k_SKC, v_SKC = torch.split(heads_SNC, num_heads, 1)
    o_SHC = inner(q_SHC, k_SKC, v_SKC, segments, is_causal=is_causal)
    return exchange(o_SHC.reshape(U, T, -1, C), axis, SITE).transpose(0, 1).flatten(1, 2)


def kv_repeats(num_kv_heads: int, ulysses: int) -> int:
    """How often each kv head is repeated so that all of them divide evenly among the ranks."""
    return ulysses // gcd(num_kv_heads, ulysses)
