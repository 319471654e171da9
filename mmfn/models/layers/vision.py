"""The vision tower's layers: patch embedding, interpolated position embedding, block and patch merger.

Legend: P patches, F values of a flattened patch, D width, H heads, C channels of a head, R = C / 2, N merged features.
"""

from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import embedding

from mmfn.batch import Segments
from mmfn.models.layers import linear, norm
from mmfn.ops import Ops
from mmfn.spec import normal, spec
from mmfn.tree import Tree

NORM_EPS = 1e-6  # of every layer norm in the tower; fixed in the reference implementation


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes of the tower. `deepstack`: blocks behind which features are tapped; `activation`: an op's name."""

    depth: int
    d_model: int
    d_ff: int
    num_heads: int
    d_out: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    num_positions: int
    num_channels: int = 3
    deepstack: tuple[int, ...] = ()
    rope_theta: float = 10_000.0
    activation: str = "gelu_tanh"
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.d_model % (4 * self.num_heads):
            raise ValueError(
                f"vision hidden_size is {self.d_model} but must be a multiple of 4 * num_heads = {4 * self.num_heads}: "
                "rope turns pairs of channels by row and by column; correct one of them"
            )
        if len(set(self.deepstack)) < len(self.deepstack):
            raise ValueError(f"deepstack_visual_indexes {list(self.deepstack)} names a block twice; name each once")

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.d_model // self.num_heads

    @property
    def merged(self) -> int:
        """Patches that form one feature."""
        return self.merge_size**2

    @property
    def patch_values(self) -> int:
        """Values of one flattened patch, (channel, frame, row, column)."""
        return self.num_channels * self.temporal_patch_size * self.patch_size**2


def patch_embed_specs(cfg: VisionConfig) -> Tree:
    """The convolution of non-overlapping patches as a matmul: weight [D, F]."""
    return linear.specs(cfg.d_model, cfg.patch_values, "vision_embed patch_values", std=cfg.init_std, bias=True)


def patch_embed(params: Tree, patches_PF: Tensor, ops: Ops) -> Tensor:
    """Patches in the weight's dtype times the weight."""
    params = ops.gather(params)
    return linear.apply(params, patches_PF.to(params["weight"].dtype))


def position_specs(cfg: VisionConfig) -> Tree:
    """A square table of positions, flattened."""
    return {"weight": spec((cfg.num_positions, cfg.d_model), "positions vision_embed", normal(cfg.init_std))}


def position_embed(params: Tree, coords_P4: Tensor, cfg: VisionConfig, ops: Ops) -> Tensor:
    """Position of every patch, interpolated bilinearly from the table stretched over its grid, corners aligned.

    `coords_P4`: int32, (row, column, height, width) in patches. Result in the wider of float32 and the table's dtype.
    Source: `get_vision_interpolation_indices_and_weights` in transformers 5.23.
    """
    params = ops.gather(params)
    side = isqrt(cfg.num_positions)
    index_P2, size_P2 = coords_P4[:, :2].float(), coords_P4[:, 2:].float()
    source_P2 = index_P2 * (side - 1) / (size_P2 - 1).clamp(min=1)
    low_P2 = source_P2.floor()
    high_part_P2 = source_P2 - low_P2
    taps_P22 = torch.stack([low_P2, low_P2 + 1], dim=2).long().clamp(max=side - 1)
    parts_P22 = torch.stack([1 - high_part_P2, high_part_P2], dim=2)
    taps_P4 = (taps_P22[:, 0, :, None] * side + taps_P22[:, 1, None, :]).flatten(1)
    parts_P4 = (parts_P22[:, 0, :, None] * parts_P22[:, 1, None, :]).flatten(1)
    return (embedding(taps_P4, params["weight"]) * parts_P4[..., None]).sum(1)


def block_specs(cfg: VisionConfig) -> Tree:
    """Parameters of one block; queries, keys and values are one fused projection."""
    D, F, std = cfg.d_model, cfg.d_ff, cfg.init_std
    return {
        "attention": {
            "qkv": linear.specs(3 * D, D, "vision_heads vision_embed", std=std, bias=True),
            "o": linear.specs(D, D, "vision_embed vision_heads", std=std, bias=True),
        },
        "attention_norm": norm.layer_specs(D, "vision_embed"),
        "mlp": {
            "up": linear.specs(F, D, "vision_mlp vision_embed", std=std, bias=True),
            "down": linear.specs(D, F, "vision_embed vision_mlp", std=std, bias=True),
        },
        "mlp_norm": norm.layer_specs(D, "vision_embed"),
    }


def vision_block(
    params: Tree, x_PD: Tensor, cos_PR: Tensor, sin_PR: Tensor, segments: Segments, *, cfg: VisionConfig, ops: Ops
) -> tuple[Tensor, None]:
    """One pre-norm block; a patch attends to its whole frame. Rotation in float32 (or wider)."""
    params = ops.gather(params)
    normed_PD = norm.layer(params["attention_norm"], x_PD, NORM_EPS, ops)
    qkv_P3HC = linear.apply(params["attention"]["qkv"], normed_PD).view(-1, 3, cfg.num_heads, cfg.head_dim)
    q_PHC, k_PHC, v_PHC = qkv_P3HC.unbind(1)
    q_PHC, k_PHC = ops.rotary(q_PHC, cos_PR, sin_PR), ops.rotary(k_PHC, cos_PR, sin_PR)
    out_PHC = ops.attention(q_PHC, k_PHC, v_PHC, segments, is_causal=False)
    x_PD = x_PD + linear.apply(params["attention"]["o"], out_PHC.flatten(1))
    activation = {"gelu_tanh": ops.gelu_tanh, "gelu": ops.gelu}[cfg.activation]
    hidden_PF = activation(linear.apply(params["mlp"]["up"], norm.layer(params["mlp_norm"], x_PD, NORM_EPS, ops)))
    return x_PD + linear.apply(params["mlp"]["down"], hidden_PF), None


def merger_specs(cfg: VisionConfig, *, norm_merged: bool) -> Tree:
    """Parameters of a patch merger; its norm sees single patches or, with `norm_merged`, concatenated ones."""
    D, merged, std = cfg.d_model, cfg.d_model * cfg.merged, cfg.init_std
    return {
        "norm": norm.layer_specs(*((merged, "merged") if norm_merged else (D, "vision_embed"))),
        "up": linear.specs(merged, merged, "vision_mlp merged", std=std, bias=True),
        "down": linear.specs(cfg.d_out, merged, "embed vision_mlp", std=std, bias=True),
    }


def merge(params: Tree, x_PD: Tensor, cfg: VisionConfig, ops: Ops, *, norm_merged: bool) -> Tensor:
    """`features_ND`, N = P / merge_size**2: consecutive patches concatenated, then two layers to the text's width."""
    params = ops.gather(params)
    merged = (x_PD.shape[0] // cfg.merged, cfg.merged * cfg.d_model)
    if norm_merged:
        x = norm.layer(params["norm"], x_PD.reshape(merged), NORM_EPS, ops)
    else:
        x = norm.layer(params["norm"], x_PD, NORM_EPS, ops).reshape(merged)
    return linear.apply(params["down"], ops.gelu(linear.apply(params["up"], x)))
