"""Gated DeltaNet: a mixer whose memory of a segment is one matrix a head, written and read token by token.

Queries, keys and values pass a causal convolution; `ops.gated_delta_rule` says what is written, forgotten and read.
Heads of values may be more than those of keys, whole multiples.

Legend: T tokens, D width, H value heads, K key heads, C key channels, V value channels, F channels of the convolution
(q, k and v end to end), B rows of a cache, N segments.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from mmfn import tree
from mmfn.batch import Segments
from mmfn.dtypes import wide
from mmfn.errors import UserError
from mmfn.models.hf_config import ConfigReader
from mmfn.models.layers import linear, norm
from mmfn.models.layers.cache import Slots
from mmfn.models.work import TOKENS, Mixing, Stage
from mmfn.ops import Ops
from mmfn.ops.causal_conv1d import causal_conv1d_state
from mmfn.ops.gated_delta_chunks import token_flops
from mmfn.spec import ONES, ParamSpec, log_uniform, normal, spec
from mmfn.tree import Tree


@dataclass(frozen=True, kw_only=True)
class DeltaConfig:
    """Sizes of one layer. `kernel_size`: taps of the convolution."""

    d_model: int
    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    kernel_size: int
    norm_eps: float
    init_std: float

    def __post_init__(self) -> None:
        if self.num_value_heads % self.num_key_heads:
            raise UserError(
                f"linear_num_value_heads is {self.num_value_heads} but must be a multiple of linear_num_key_heads "
                f"{self.num_key_heads}; correct the model's config.json"
            )

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels of all heads of queries, keys and values."""
        keys = self.num_key_heads * self.key_dim
        return keys, keys, self.num_value_heads * self.value_dim


def config_from_hf(text: ConfigReader) -> DeltaConfig:
    """The `text_config` of a `config.json`, a family's defaults filled in."""
    text.only("hidden_act", "silu", "so are the convolution and the gate")
    return DeltaConfig(
        d_model=text.integer("hidden_size"),
        num_key_heads=text.integer("linear_num_key_heads"),
        num_value_heads=text.integer("linear_num_value_heads"),
        key_dim=text.integer("linear_key_head_dim"),
        value_dim=text.integer("linear_value_head_dim"),
        kernel_size=text.integer("linear_conv_kernel_dim"),
        norm_eps=text.number("rms_norm_eps", 1e-6),
        init_std=text.number("initializer_range", 0.02),
    )


def specs(cfg: DeltaConfig) -> Tree:
    """Projections, the kernel [F, taps] of the convolution, and what a head forgets by.

    `A_log` and the norm's weight have float32 at least, as published checkpoints do; `dt_bias` has the model's.
    """
    D, H, std, F = cfg.d_model, cfg.num_value_heads, cfg.init_std, sum(cfg.widths)

    def wide_spec(leaf: ParamSpec) -> ParamSpec:
        return replace(leaf, dtype=torch.float32)

    return {
        "qkv": linear.specs(F, D, "delta_heads embed", std=std),
        "z": linear.specs(cfg.widths[2], D, "delta_heads embed", std=std),
        "b": linear.specs(H, D, "delta_heads embed", std=std),
        "a": linear.specs(H, D, "delta_heads embed", std=std),
        "conv": {"kernel": spec((F, cfg.kernel_size), "delta_heads taps", normal(std))},
        "dt_bias": spec((H,), "delta_heads", ONES),
        "A_log": wide_spec(spec((H,), "delta_heads", log_uniform(0.01, 16.0))),
        "norm": tree.map(wide_spec, norm.rms_specs(cfg.value_dim, "head_dim")),
        "o": linear.specs(D, cfg.widths[2], "embed delta_heads", std=std),
    }


def apply(
    params: Tree,
    x_TD: Tensor,
    segments: Segments,
    slots: Slots | None,
    cached: Tree,
    *,
    cfg: DeltaConfig,
    ops: Ops,
) -> tuple[Tensor, Any]:
    """`(y_TD, new cache or None)`: every segment from an empty memory, or each token from that of its cached row.

    A row's cache is the last inputs of the convolution, `conv` [B, taps - 1, F], and the memory, `state` [B, H, C, V]
    in float32 or wider. Source: `Qwen3_5GatedDeltaNet` in transformers 5.23, which mixes the segments of a packed call.
    """
    T, H, V = x_TD.shape[0], cfg.num_value_heads, cfg.value_dim
    mixed_TF, kernel_FK = linear.apply(params["qkv"], x_TD, ops), params["conv"]["kernel"]
    beta_TH, a_TH = linear.apply(params["b"], x_TD, ops).sigmoid(), linear.apply(params["a"], x_TD, ops)
    dtype = wide(a_TH.dtype, params["A_log"].dtype)
    g_TH = -params["A_log"].to(dtype).exp() * softplus(a_TH.to(dtype) + params["dt_bias"].to(dtype))
    if slots is None or slots.is_prefill:
        q, k, v = _heads(ops.causal_conv1d(mixed_TF, kernel_FK, segments), cfg)
        out_THV = ops.gated_delta_rule(q, k, v, g_TH, beta_TH, segments)
    else:
        taps_TF, conv = ops.causal_conv1d_step(mixed_TF, kernel_FK, cached["conv"])
        out_THV, state = ops.gated_delta_step(*_heads(taps_TF, cfg), g_TH, beta_TH, cached["state"])
        cached = {"conv": conv, "state": state}
    if slots is not None and slots.is_prefill:
        rows_B = (segments.host_N.diff() > 0).nonzero()[:, 0].to(x_TD.device)  # a row of the cache for each
        conv = causal_conv1d_state(mixed_TF, segments, cfg.kernel_size - 1)[rows_B]
        cached = {"conv": conv, "state": ops.gated_delta_state(k, v, g_TH, beta_TH, segments)[rows_B]}
    z_THV = linear.apply(params["z"], x_TD, ops).view(T, H, V)
    out_THV = ops.rms_norm_gated(out_THV, z_THV, params["norm"]["weight"], cfg.norm_eps)
    return linear.apply(params["o"], out_THV.flatten(1), ops), cached


def mix(
    params: Tree, x_TD: Tensor, cos: Tensor, sin: Tensor, *xs: Any, cfg: DeltaConfig, ops: Ops
) -> tuple[Tensor, Any]:
    """The `delta` of a block as its `Mixer`; positions do not matter to it."""
    return apply(params["delta"], x_TD, *xs, cfg=cfg, ops=ops)


def flow(path: str, cfg: DeltaConfig) -> list[Stage]:
    """The stages of a mixer at a path. The convolution counts nothing: it multiplies channel by channel."""
    rule = Mixing(count=TOKENS, **token_flops(cfg.num_value_heads, cfg.key_dim, cfg.value_dim))
    return [
        Stage(parameters=tuple(f"{path}/{name}" for name in ("qkv", "z", "b", "a"))),
        Stage(parameters=tuple(f"{path}/{name}" for name in ("conv", "dt_bias", "A_log")), share=0, mixing=rule),
        Stage(parameters=(f"{path}/norm",)),
        Stage(parameters=(f"{path}/o",)),
    ]


def empty(cfg: DeltaConfig, num_rows: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The cache of a layer before the first token."""
    conv = torch.zeros(num_rows, cfg.kernel_size - 1, sum(cfg.widths), dtype=dtype, device=device)
    state = (num_rows, cfg.num_value_heads, cfg.key_dim, cfg.value_dim)
    return {"conv": conv, "state": torch.zeros(state, dtype=wide(dtype), device=device)}


def _heads(mixed_TF: Tensor, cfg: DeltaConfig) -> tuple[Tensor, Tensor, Tensor]:
    """q_TKC, k_TKC, v_THV."""
    q, k, v = torch.split(mixed_TF, list(cfg.widths), 1)
    C, V = cfg.key_dim, cfg.value_dim
    return q.view(len(q), -1, C), k.view(len(k), -1, C), v.view(len(v), -1, V)


def names(path: str, name: str) -> list[tuple[str, str]]:
    """`(path, Hugging Face name)` of a layer's leaves, but for the kernel of the convolution."""
    linears = {"qkv": "in_proj_qkv", "z": "in_proj_z", "b": "in_proj_b", "a": "in_proj_a", "o": "out_proj"}
    return [
        *((f"{path}/{own}/weight", f"{name}.{their}.weight") for own, their in linears.items()),
        (f"{path}/norm/weight", f"{name}.norm.weight"),
        (f"{path}/{{leaf}}", f"{name}.{{leaf}}"),
    ]
