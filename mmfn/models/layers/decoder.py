"""The text decoder: blocks of a mixer and a feed-forward layer, here grouped-query attention and a dense layer.

A block has these two holes. What fills them is a function of the block's own parameters, so one stack may hold blocks
of several kinds (experts or none, attention or another mixer).

Legend: T tokens, D width, H query heads, K kv heads, C channels of a head, R = C / 2, F feed-forward width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmfn.batch import Segments
from mmfn.errors import UserError
from mmfn.models.hf_config import ConfigReader
from mmfn.models.layers import cache, linear, norm
from mmfn.ops import Ops
from mmfn.tree import Tree

Mixer = Callable[..., tuple[Tensor, Tree]]
"""(a block's parameters, x_TD, cos_TR, sin_TR, segments, slots, the layer's cache) -> (y_TD, new cache or None)"""
FeedForward = Callable[[Tree, Tensor, Tensor], tuple[Tensor, Tree]]
"""(a block's parameters, x_TD, is_real_T) -> (y_TD, router statistics or None)"""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of one decoder block. `has_bias`: the four attention projections carry a bias."""

    d_model: int
    d_ff: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    init_std: float
    has_bias: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_attention_heads is {self.num_heads} but must be a multiple of num_key_value_heads "
                f"{self.num_kv_heads}; correct one of them"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim} but rope turns pairs of channels; make it even")


def config_from_hf(text: ConfigReader) -> DecoderConfig:
    """The `text_config` of a `config.json`, a family's defaults filled in.

    Null or absent with no default, the number of kv heads is that of query heads and a head's size what divides the
    width among them.
    """
    text.only("hidden_act", "silu", "the feed-forward layer is SwiGLU")
    text.only("attention_dropout", 0.0, "there is no dropout")
    num_heads, d_model = text.integer("num_attention_heads"), text.integer("hidden_size")
    return DecoderConfig(
        d_model=d_model,
        d_ff=text.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=text.integer("num_key_value_heads", num_heads),
        head_dim=text.integer("head_dim", d_model // num_heads),
        norm_eps=text.number("rms_norm_eps", 1e-6),
        init_std=text.number("initializer_range", 0.02),
        has_bias=text.boolean("attention_bias", False),
    )


def specs(cfg: DecoderConfig, **feed_forward: Tree) -> Tree:
    """Parameters of one block: `specs(cfg, mlp=mlp_specs(cfg))`."""
    return {
        "attention": attention_specs(cfg),
        "attention_norm": norm.rms_specs(cfg.d_model, "embed"),
        "mlp_norm": norm.rms_specs(cfg.d_model, "embed"),
        **feed_forward,
    }


def decoder_block(
    params: Tree,
    x_TD: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    segments: Segments,
    is_real_T: Tensor,
    slots: cache.Slots | None = None,
    cached: Tree = None,
    *,
    cfg: DecoderConfig,
    ops: Ops,
    mixer: Mixer,
    feed_forward: FeedForward,
) -> tuple[Tensor, dict[str, Tree]]:
    """`(x_TD, {"cached", "router"})`: one pre-norm block, its new cache and router statistics, or None for each.

    `is_real_T`: bool[T], false for padding tokens. With `slots` and `cached`, a mixer works through the cache.
    """
    params = ops.gather(params)
    normed_TD = norm.rms(params["attention_norm"], x_TD, cfg.norm_eps, ops)
    out_TD, cached = mixer(params, normed_TD, cos_TR, sin_TR, segments, slots, cached)
    x_TD = x_TD + out_TD
    out_TD, router = feed_forward(params, norm.rms(params["mlp_norm"], x_TD, cfg.norm_eps, ops), is_real_T)
    return x_TD + out_TD, {"cached": cached, "router": router}


def attention_specs(cfg: DecoderConfig) -> Tree:
    """Projections [out, in] and the per-head norms of queries and keys."""
    q, kv, D = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim, cfg.d_model
    std, bias = cfg.init_std, cfg.has_bias
    return {
        "q": linear.specs(q, D, "q_heads embed", std=std, bias=bias),
        "k": linear.specs(kv, D, "kv_heads embed", std=std, bias=bias),
        "v": linear.specs(kv, D, "kv_heads embed", std=std, bias=bias),
        "o": linear.specs(D, q, "embed q_heads", std=std, bias=bias),
        "q_norm": norm.rms_specs(cfg.head_dim, "head_dim"),
        "k_norm": norm.rms_specs(cfg.head_dim, "head_dim"),
    }


def attention(
    params: Tree,
    x_TD: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    segments: Segments,
    slots: cache.Slots | None,
    cached: Tree,
    *,
    cfg: DecoderConfig,
    ops: Ops,
) -> tuple[Tensor, Any]:
    """Causal self-attention within segments, or of each token against its cached row. Rotation in x's dtype."""
    T, C = x_TD.shape[0], cfg.head_dim
    q_THC = linear.apply(params["q"], x_TD, ops).view(T, cfg.num_heads, C)
    k_TKC = linear.apply(params["k"], x_TD, ops).view(T, cfg.num_kv_heads, C)
    v_TKC = linear.apply(params["v"], x_TD, ops).view(T, cfg.num_kv_heads, C)
    q_THC = ops.rotary(norm.rms(params["q_norm"], q_THC, cfg.norm_eps, ops), cos_TR, sin_TR)
    k_TKC = ops.rotary(norm.rms(params["k_norm"], k_TKC, cfg.norm_eps, ops), cos_TR, sin_TR)
    if slots is not None:
        cached = cache.write(cached, slots, k_TKC, v_TKC)
    if slots is None or slots.is_prefill:
        out_THC = ops.attention(q_THC, k_TKC, v_TKC, segments, is_causal=True)
    else:
        out_THC = ops.attention_cached(q_THC, cached["k"], cached["v"], slots.lengths_B)
    return linear.apply(params["o"], out_THC.flatten(1), ops), cached


def attend(params: Tree, *xs: Any, cfg: DecoderConfig, ops: Ops) -> tuple[Tensor, Tree]:
    """The `attention` of a block as its `Mixer`."""
    return attention(params["attention"], *xs, cfg=cfg, ops=ops)


def mlp_specs(cfg: DecoderConfig) -> Tree:
    """Gate, up and down projections."""
    D, F, std = cfg.d_model, cfg.d_ff, cfg.init_std
    return {
        "gate": linear.specs(F, D, "mlp embed", std=std),
        "up": linear.specs(F, D, "mlp embed", std=std),
        "down": linear.specs(D, F, "embed mlp", std=std),
    }


def mlp(params: Tree, x_TD: Tensor, ops: Ops) -> Tensor:
    """`down(silu(gate(x)) * up(x))`."""
    gate_TF, up_TF = linear.apply(params["gate"], x_TD, ops), linear.apply(params["up"], x_TD, ops)
    return linear.apply(params["down"], ops.swiglu(gate_TF, up_TF), ops)


def dense(params: Tree, x_TD: Tensor, is_real_T: Tensor, *, ops: Ops) -> tuple[Tensor, None]:
    """The `mlp` of a block as its `FeedForward`."""
    return mlp(params["mlp"], x_TD, ops), None


_LAYER = "model.language_model.layers.{i}"
NAMES = (
    ("text/layers/{i}/attention_norm/weight", f"{_LAYER}.input_layernorm.weight"),
    ("text/layers/{i}/attention/q_norm/weight", f"{_LAYER}.self_attn.q_norm.weight"),
    ("text/layers/{i}/attention/k_norm/weight", f"{_LAYER}.self_attn.k_norm.weight"),
    ("text/layers/{i}/attention/{proj}/{leaf}", f"{_LAYER}.self_attn.{{proj}}_proj.{{leaf}}"),
    ("text/layers/{i}/mlp_norm/weight", f"{_LAYER}.post_attention_layernorm.weight"),
    ("text/layers/{i}/mlp/{proj}/{leaf}", f"{_LAYER}.mlp.{{proj}}_proj.{{leaf}}"),
)
