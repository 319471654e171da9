"""The text side of a model, from tokens to hidden states: embedding, features in their places, blocks, head.

Legend: T tokens, D width, N features, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from mmfn.batch import Batch
from mmfn.models.layers import cache as layer_cache
from mmfn.models.layers import decoder
from mmfn.models.layers.decoder import DecoderConfig, FeedForward, Mixer
from mmfn.ops import Between, Ops
from mmfn.tree import Tree


def embed(params: Tree, tokens_T: Tensor, ops: Ops, *, pad_token_id: int | None) -> Tensor:
    """`x_TD`, in the table's dtype. The row of `pad_token_id` gets no gradient as an input, as in transformers."""
    return embedding(tokens_T, ops.gather(params)["weight"], padding_idx=pad_token_id)


def replace_by_features(x_TD: Tensor, features_ND: Tensor, index_T: Tensor, ops: Ops) -> Tensor:
    """`x_TD` with the feature `index_T[t]` in place of token t, where that is not -1."""
    placed_TD = ops.place_features(features_ND.to(x_TD.dtype), index_T)
    return torch.where((index_T >= 0)[:, None], placed_TD, x_TD)


def add_features(x_TD: Tensor, features_ND: Tensor, index_T: Tensor, ops: Ops) -> tuple[Tensor, None]:
    """`x_TD` plus the feature `index_T[t]` of token t, where that is not -1; a `Between` of `ops.stack`."""
    return x_TD + ops.place_features(features_ND.to(x_TD.dtype), index_T), None


def decode(
    layers: Sequence[Tree],
    x_TD: Tensor,
    angles: tuple[Tensor, Tensor],
    batch: Batch,
    cfg: DecoderConfig,
    ops: Ops,
    *,
    mixer: Mixer,
    feed_forward: FeedForward,
    between: Mapping[int, Between] | None = None,
    cache: layer_cache.Cache | None = None,
    name: str = "text",
) -> tuple[Tensor, list[Tree], layer_cache.Cache | None]:
    """`(x_TD, router statistics of every block, cache)`: all blocks, and the new cache where there is one.

    `angles`: cosines and sines of `rope`. `between`: see `ops.stack`. `mixer`, `feed_forward`: of all blocks; what they
    do is decided by a block's parameters. `name`: that of the stack.
    """
    block = partial(decoder.decoder_block, cfg=cfg, ops=ops, mixer=mixer, feed_forward=feed_forward)
    is_real_T = batch.segment_T < batch.num_segments
    xs: tuple[Any, ...] = (*(x.to(x_TD.dtype) for x in angles), batch.segments, is_real_T)
    stack = partial(ops.stack, ops.layer, block, layers, x_TD, name=name, between=between)
    if cache is None:
        x_TD, outs, _ = stack(*xs)
        return x_TD, [out["router"] for out in outs], None
    x_TD, outs, _ = stack(*xs, cache.slots, each=cache.layers)
    layers = [out["cached"] for out in outs]
    return x_TD, [out["router"] for out in outs], layer_cache.Cache(layers=layers, slots=cache.slots)
