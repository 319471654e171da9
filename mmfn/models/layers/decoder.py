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


PROJECTIONS = ("q", "k", "v", "o")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of one decoder block.

    `biased`: which of the `PROJECTIONS` of attention carry a bias. `has_qk_norm`: queries and keys are normalised
    by head. `has_gate`: the projection of queries gives a gate for every channel as well, head by head behind its
    queries. `has_zero_centered_norms`: norms weigh by 1 + w.
    """

    d_model: int
    d_ff: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    init_std: float
    biased: tuple[str, ...] = ()
    has_qk_norm: bool = True
    has_gate: bool = False
    has_zero_centered_norms: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_attention_heads is {self.num_heads} but must be a multiple of num_key_value_heads "
                f"{self.num_kv_heads}; correct one of them"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim} but rope turns pairs of channels; make it even")


def config_from_hf(text: ConfigReader, **facts: Any) -> DecoderConfig:
    """The `text_config` of a `config.json`, a family's defaults filled in. `facts`: what the file does not say.

    Null or absent with no default, the number of kv heads is that of query heads and a head's size what divides the
    width among them. Without a fact `biased`, `attention_bias` says whether all projections have one (default: none).
    """
    text.only("hidden_act", "silu", "the feed-forward layer is SwiGLU")
    text.only("attention_dropout", 0.0, "there is no dropout")
    num_heads, d_model = text.integer("num_attention_heads"), text.integer("hidden_size")
    if "biased" not in facts:
        facts["biased"] = PROJECTIONS if text.boolean("attention_bias", False) else ()
    return DecoderConfig(
        d_model=d_model,
        d_ff=text.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=text.integer("num_key_value_heads", num_heads),
        head_dim=text.integer("head_dim", d_model // num_heads),
        norm_eps=text.number("rms_norm_eps", 1e-6),
        init_std=text.number("initializer_range", 0.02),
        **facts,
    )


def specs(cfg: DecoderConfig, **layers: Tree) -> Tree:
    """Parameters of one block with what fills its holes: `specs(cfg, attention=attention_specs(cfg), mlp=...)`."""
    return {"attention_norm": norm_specs(cfg), "mlp_norm": norm_specs(cfg), **layers}


def norm_specs(cfg: DecoderConfig) -> Tree:
    """Parameters of a norm over the width."""
    return norm.rms_specs(cfg.d_model, "embed", is_zero_centered=cfg.has_zero_centered_norms)


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
    """Projections [out, in] and, where there are, the norms of queries and keys by head."""
    q, kv, D = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim, cfg.d_model
    shapes = {
        "q": (q * (2 if cfg.has_gate else 1), D, "q_heads embed"),
        "k": (kv, D, "kv_heads embed"),
        "v": (kv, D, "kv_heads embed"),
        "o": (D, q, "embed q_heads"),
    }
    tree = {name: linear.specs(*shape, std=cfg.init_std, bias=name in cfg.biased) for name, shape in shapes.items()}
    if cfg.has_qk_norm:
        head_norm = norm.rms_specs(cfg.head_dim, "head_dim", is_zero_centered=cfg.has_zero_centered_norms)
        tree |= {"q_norm": head_norm, "k_norm": head_norm}
    return tree


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
    q_THC = linear.apply(params["q"], x_TD, ops).view(T, cfg.num_heads, -1)
    k_TKC = linear.apply(params["k"], x_TD, ops).view(T, cfg.num_kv_heads, C)
    v_TKC = linear.apply(params["v"], x_TD, ops).view(T, cfg.num_kv_heads, C)
    q_THC, gate_THC = (q_THC[..., :C], q_THC[..., C:]) if cfg.has_gate else (q_THC, None)
    if cfg.has_qk_norm:
        q_THC = norm.rms(params["q_norm"], q_THC, cfg.norm_eps, ops)
        k_TKC = norm.rms(params["k_norm"], k_TKC, cfg.norm_eps, ops)
    q_THC, k_TKC = ops.rotary(q_THC, cos_TR, sin_TR), ops.rotary(k_TKC, cos_TR, sin_TR)
    if slots is not None:
        cached = cache.write_(cached, slots, k_TKC, v_TKC)
    if slots is None or slots.is_prefill:
        out_THC = ops.attention(q_THC, k_TKC, v_TKC, segments, is_causal=True)
    else:
        out_THC = ops.attention_cached(q_THC, cached["k"], cached["v"], slots.lengths_B)
    if gate_THC is not None:
        out_THC = out_THC * gate_THC.sigmoid()
    return linear.apply(params["o"], out_THC.flatten(1), ops), cached


def attend(params: Tree, *xs: Any, cfg: DecoderConfig, ops: Ops) -> tuple[Tensor, Tree]:
    """The `attention` of a block as its `Mixer`."""
    return attention(params["attention"], *xs, cfg=cfg, ops=ops)


def dense_specs(cfg: DecoderConfig) -> Tree:
    """Parameters of a block of attention and a dense feed-forward layer."""
    return specs(cfg, attention=attention_specs(cfg), mlp=mlp_specs(cfg.d_model, cfg.d_ff, cfg.init_std))


def mlp_specs(d_model: int, d_ff: int, std: float) -> Tree:
    """Gate, up and down projections."""
    D, F = d_model, d_ff
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


def names(path: str, name: str) -> list[tuple[str, str]]:
    """`(path, Hugging Face name)` of a block's leaves: `names("text/layers/{i}", "model.language_model.layers.{i}")`.

    The weight of a norm is `weight` there, zero-centred or not.
    """
    norms = {
        "attention_norm": "input_layernorm",
        "attention/q_norm": "self_attn.q_norm",
        "attention/k_norm": "self_attn.k_norm",
        "mlp_norm": "post_attention_layernorm",
    }
    return [
        *((f"{path}/{own}/{{weight}}", f"{name}.{their}.weight") for own, their in norms.items()),
        (f"{path}/attention/{{proj}}/{{leaf}}", f"{name}.self_attn.{{proj}}_proj.{{leaf}}"),
        (f"{path}/mlp/{{proj}}/{{leaf}}", f"{name}.mlp.{{proj}}_proj.{{leaf}}"),
    ]
