"""Pieces of vision towers: patch embedding, interpolated position embedding, blocks and patch mergers.

A family puts its tower together of them (that of the Qwen3 models: `qwen3_tower`). Features are merged patches. Which
norm, biases and feed-forward layer a block has, its parameters say.

Legend: P patches, F values of a flattened patch, D width, H heads, C channels of a head, R = C / 2, N merged features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import isqrt
from typing import Any

from torch import Tensor

from mmfn.batch import Segments, Tower
from mmfn.dtypes import wide
from mmfn.errors import UserError
from mmfn.models.hf_config import ConfigReader
from mmfn.models.layers import decoder, interpolation, linear, norm, rope
from mmfn.models.layers.interpolation import Taps
from mmfn.models.work import Stage, attention, block, pairs, rows
from mmfn.ops import Between, Ops
from mmfn.spec import normal, spec
from mmfn.tree import Tree

MERGER_STEPS = (("norm",), ("up",), ("down",))


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes of the tower.

    `num_positions`: rows of the square table of learned positions, 0 where there is none. `deepstack`: blocks behind
    which features are tapped. `activation`: an op's name; "swiglu" has a gate. `is_rms`: norms are by the root mean
    square. `has_patch_bias`, `has_block_biases`: of the patch embedding, of all linear layers of a block.
    """

    depth: int
    d_model: int
    d_ff: int
    num_heads: int
    d_out: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    num_positions: int = 0
    num_channels: int = 3
    deepstack: tuple[int, ...] = ()
    rope_theta: float = 10_000.0
    activation: str = "gelu_tanh"
    init_std: float = 0.02
    norm_eps: float = 1e-6  # fixed in the reference implementations of most
    is_rms: bool = False
    has_patch_bias: bool = True
    has_block_biases: bool = True

    def __post_init__(self) -> None:
        if self.d_model % (4 * self.num_heads):
            raise UserError(
                f"vision hidden_size is {self.d_model} but must be a multiple of 4 * num_heads = {4 * self.num_heads}: "
                "rope turns pairs of channels by row and by column; correct one of them"
            )
        if len(set(self.deepstack)) < len(self.deepstack):
            raise UserError(f"deepstack_visual_indexes {list(self.deepstack)} names a block twice; name each once")

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


def fields_from_hf(hf: ConfigReader) -> dict[str, Any]:
    """The fields of `VisionConfig` that all families read alike, of a `vision_config` with a family's defaults."""
    rotary = hf.section("rope_parameters")
    rotary.only("rope_type", "axial", "patches turn by row and column")
    return {
        "depth": hf.integer("depth"),
        "d_model": hf.integer("hidden_size"),
        "num_heads": hf.integer("num_heads"),
        "d_out": hf.integer("out_hidden_size"),
        "patch_size": hf.integer("patch_size"),
        "temporal_patch_size": hf.integer("temporal_patch_size", 2),
        "merge_size": hf.integer("spatial_merge_size", 2),
        "num_channels": hf.integer("in_channels", 3),
        "rope_theta": rotary.number("rope_theta", 10_000.0, 1.0),
        "init_std": hf.number("initializer_range", 0.02),
    }


def run_blocks(
    layers: Sequence[Tree],
    x_PD: Tensor,
    coords_P4: Tensor,
    segments: Sequence[Segments],
    cfg: VisionConfig,
    ops: Ops,
    *,
    between: Mapping[int, Between] | None = None,
) -> tuple[Tensor, dict[int, Tensor]]:
    """`(x_PD, taps)`: all blocks; within `segments[i]` patches attend to each other in block i.

    `between`, and what it taps: see `ops.stack`.
    """
    angles = rope.axial(coords_P4, cfg.head_dim // 2, cfg.rope_theta)
    block = partial(vision_block, cfg=cfg, ops=ops)
    x_PD, _, taps = ops.stack(ops.layer, block, layers, x_PD, *angles, name="vision", each=segments, between=between)
    return x_PD, taps


def row_ids(tower: Tower, cfg: VisionConfig, prefix: str) -> list[tuple[str, Tensor]]:
    """Which rows the parameters of the tower, under the path `prefix`, compute with (see `mmfn.lora.with_drops`).

    A merged feature goes by the id of its first patch.
    """
    ids_N = tower.ids_P[:: cfg.merged]
    return [(f"{prefix}merger/", ids_N), (f"{prefix}deepstack/", ids_N), (prefix, tower.ids_P)]


def flow(
    cfg: VisionConfig, *, lists: Sequence[int] = (), merger: Sequence[Sequence[str]] = MERGER_STEPS
) -> list[Stage]:
    """The stages of a tower of merged patches, under `vision` in the tree.

    `lists`: of each block, the list of segments it attends within (default: the first). `merger`: what the merger does,
    one behind the other; those of what is tapped on the way do the same.
    """
    mergers = ("vision/merger", *(f"vision/deepstack/{i}" for i in range(len(cfg.deepstack))))
    blocks = [
        block(path, attention(f"{path}/attention", cfg.d_model, pairs("vision", k), rows("vision")), rows("vision"))
        for path, k in ((f"vision/layers/{i}", k) for i, k in enumerate(lists or [0] * cfg.depth))
    ]
    merging = [tuple(f"{path}/{name}" for path in mergers for name in names) for names in merger]
    return [
        Stage(parameters=("vision/patch_embed",), count=rows("vision")),
        Stage(parameters=("vision/patch_norm", "vision/positions"), count=rows("vision"), share=0),
        *(stage for stages in blocks for stage in stages),
        Stage(parameters=("vision/norm",), count=rows("vision")),
        *(Stage(parameters=names, count=rows("vision"), share=Fraction(1, cfg.merged)) for names in merging),
    ]


def patch_embed_specs(cfg: VisionConfig) -> Tree:
    """The convolution of non-overlapping patches as a matmul: weight [D, F]."""
    axes, bias = "vision_embed tower_inputs", cfg.has_patch_bias
    return linear.specs(cfg.d_model, cfg.patch_values, axes, std=cfg.init_std, bias=bias)


def patch_embed(params: Tree, patches_PF: Tensor, ops: Ops) -> Tensor:
    """Patches in the weight's dtype times the weight. Raises ValueError for bytes, which are not normalised yet."""
    if not patches_PF.is_floating_point():
        raise UserError("the patches of the batch are bytes still; bring it to the device by mmfn.batch.to")
    params = ops.gather(params)
    return linear.apply(params, patches_PF.to(params["weight"].dtype), ops)


def position_specs(cfg: VisionConfig) -> Tree:
    """A square table of positions, flattened."""
    return {"weight": spec((cfg.num_positions, cfg.d_model), "positions vision_embed", normal(cfg.init_std))}


def position_embed(params: Tree, coords_P4: Tensor, ops: Ops, *, taps: Taps = interpolation.bilinear) -> Tensor:
    """Position of every patch, interpolated from the table stretched over its grid: by `taps`.

    `coords_P4`: int32, (row, column, height, width) in patches. Result in the wider of float32 and the table's dtype.
    """
    table_ND = ops.gather(params)["weight"]
    return ops.interpolate(table_ND, *taps(coords_P4, isqrt(table_ND.shape[0]), wide(table_ND.dtype)))


def block_specs(cfg: VisionConfig) -> Tree:
    """Parameters of one block; queries, keys and values are one fused projection."""
    D, F, std, bias = cfg.d_model, cfg.d_ff, cfg.init_std, cfg.has_block_biases
    into = dict.fromkeys(("gate", "up") if cfg.activation == "swiglu" else ("up",), (F, D))
    return {
        "attention": {
            "qkv": linear.specs(3 * D, D, "vision_heads vision_embed", std=std, bias=bias, parts=3),
            "o": linear.specs(D, D, "vision_embed vision_heads", std=std, bias=bias),
        },
        "attention_norm": norm_specs(cfg),
        "mlp": {
            **{n: linear.specs(*shape, "vision_mlp vision_embed", std=std, bias=bias) for n, shape in into.items()},
            "down": linear.specs(D, F, "vision_embed vision_mlp", std=std, bias=bias),
        },
        "mlp_norm": norm_specs(cfg),
    }


def norm_specs(cfg: VisionConfig) -> Tree:
    """Parameters of a norm over the width."""
    return (norm.rms_specs if cfg.is_rms else norm.layer_specs)(cfg.d_model, "vision_embed")


def vision_block(
    params: Tree, x_PD: Tensor, cos_PR: Tensor, sin_PR: Tensor, segments: Segments, *, cfg: VisionConfig, ops: Ops
) -> tuple[Tensor, None]:
    """One pre-norm block; a patch attends to its whole segment. Rotation in float32 (or wider)."""
    params = ops.gather(params)
    normed_PD = norm.either(params["attention_norm"], x_PD, cfg.norm_eps, ops)
    qkv_P3HC = linear.apply(params["attention"]["qkv"], normed_PD, ops).view(-1, 3, cfg.num_heads, cfg.head_dim)
    q_PHC, k_PHC, v_PHC = qkv_P3HC.unbind(1)
    q_PHC, k_PHC = ops.rotary(q_PHC, cos_PR, sin_PR), ops.rotary(k_PHC, cos_PR, sin_PR)
    out_PHC = ops.attention(q_PHC, k_PHC, v_PHC, segments, is_causal=False)
    x_PD = x_PD + linear.apply(params["attention"]["o"], out_PHC.flatten(1), ops)
    normed_PD = norm.either(params["mlp_norm"], x_PD, cfg.norm_eps, ops)
    return x_PD + _mlp(params["mlp"], normed_PD, cfg, ops), None


def _mlp(params: Tree, x_PD: Tensor, cfg: VisionConfig, ops: Ops) -> Tensor:
    if "gate" in params:
        return decoder.mlp(params, x_PD, ops)
    activation = {"gelu_tanh": ops.gelu_tanh, "gelu": ops.gelu}[cfg.activation]
    return linear.apply(params["down"], activation(linear.apply(params["up"], x_PD, ops)), ops)


def merger_specs(cfg: VisionConfig, *, norm_merged: bool) -> Tree:
    """Parameters of a patch merger; its norm sees single patches or, with `norm_merged`, concatenated ones."""
    merged, std = cfg.d_model * cfg.merged, cfg.init_std
    return {
        "norm": norm.layer_specs(merged, "merged") if norm_merged else norm_specs(cfg),
        "up": linear.specs(merged, merged, "vision_mlp merged", std=std, bias=True),
        "down": linear.specs(cfg.d_out, merged, "embed vision_mlp", std=std, bias=True),
    }


def merge(params: Tree, x_PD: Tensor, cfg: VisionConfig, ops: Ops, *, norm_merged: bool) -> Tensor:
    """`features_ND`, N = P / merge_size**2: consecutive patches concatenated, then two layers to the text's width."""
    params = ops.gather(params)
    merged = (x_PD.shape[0] // cfg.merged, cfg.merged * cfg.d_model)
    if norm_merged:
        x = norm.either(params["norm"], x_PD.reshape(merged), cfg.norm_eps, ops)
    else:
        x = norm.either(params["norm"], x_PD, cfg.norm_eps, ops).reshape(merged)
    return linear.apply(params["down"], ops.gelu(linear.apply(params["up"], x, ops)), ops)
