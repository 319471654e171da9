"""What families of a text decoder that sees through one tower of merged patches share: all but the forward pass.

Config, parameters and their stored names, and what such a family says of samples and batches.
Legend: T tokens, D width, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmfn.batch import IGNORE, IMAGE, TEXT, VIDEO, Batch, Laid, Media, Sample, TowerKind
from mmfn.errors import UserError
from mmfn.models.hf_config import ConfigReader
from mmfn.models.keymap import Entry
from mmfn.models.layers import balance, decoder, linear, moe, patches, qwen3_tower, vision
from mmfn.models.layers import cache as layer_cache
from mmfn.models.layers.decoder import DecoderConfig
from mmfn.models.layers.moe import MoeConfig
from mmfn.models.layers.positions import mrope
from mmfn.models.layers.vision import VisionConfig
from mmfn.models.work import CAUSAL_PAIRS, Stage, attention, block, labels
from mmfn.ops import Ops
from mmfn.spec import normal, spec
from mmfn.tree import Tree

LORA_TARGETS = (r"text/layers/\d+/attention/(q|k|v|o)",)


@dataclass(frozen=True, kw_only=True)
class VisionLanguageConfig:
    """The fields all such families have.

    `rope_sections`: rotated pairs of a head that follow time, height and width; `rotary_dim`: the channels of a head
    that turn, twice their sum.

    `pad_token_id`: the embedding row that gets no gradient as an input (None: every row does), as in transformers.
    `moe`: experts of the blocks in `moe_layers`, None where all are dense; `router_aux_coef`: weight of their
    load-balancing loss.
    """

    vocab_size: int
    num_layers: int
    decoder: DecoderConfig
    vision: VisionConfig
    rope_theta: float
    rope_sections: tuple[int, ...]
    rotary_dim: int
    is_tied: bool
    image_token_id: int
    video_token_id: int
    pad_token_id: int | None = None
    moe: MoeConfig | None = None
    moe_layers: frozenset[int] = frozenset()
    router_aux_coef: float = 0.0

    def __post_init__(self) -> None:
        if len(self.rope_sections) != 3 or 2 * sum(self.rope_sections) != self.rotary_dim:
            raise UserError(
                f"mrope_section is {list(self.rope_sections)} but must be three numbers that add up to half of the "
                f"{self.rotary_dim} channels of a head that rope turns; correct the model's config.json"
            )
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise UserError(
                f"text_config.pad_token_id is {self.pad_token_id} but must be below vocab_size {self.vocab_size}; "
                "correct the model's config.json"
            )
        if self.vision.d_out != self.decoder.d_model:
            raise UserError(
                f"vision_config.out_hidden_size is {self.vision.d_out} but must equal text_config.hidden_size "
                f"{self.decoder.d_model}: features replace token embeddings; correct the model's config.json"
            )


@dataclass(frozen=True, kw_only=True)
class RopeDefaults:
    """Rope of a family where its config.json does not say it; `part`: the share of a head's channels that
    turn, 1 in a family that knows no other."""

    theta: float
    sections: tuple[int, ...]
    is_interleaved: bool
    part: float = 1.0


def with_defaults(hf: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """A config.json with a family's defaults for absent keys: `with_defaults(hf, image_token_id=151_655)`."""
    return {**defaults, **hf}


def text_section(hf: Mapping[str, Any], defaults: Mapping[str, Any]) -> ConfigReader:
    """The `text_config` of a `config.json` with a family's defaults for absent keys (a null stays null)."""
    text = ConfigReader(hf).section("text_config")
    return ConfigReader({**defaults, **text.values}, text.name)


def fields_from_hf(
    hf: Mapping[str, Any], text: ConfigReader, rope: RopeDefaults, *, block: DecoderConfig, tower: VisionConfig
) -> dict[str, Any]:
    """The fields of `VisionLanguageConfig`. `text`: what `text_section` returns.

    `rope`: the family's defaults; `block` and `tower`: what the family reads of its sections.

    Both spellings of rope are read: `rope_parameters`, and the older `rope_scaling` beside `rope_theta`. Raises
    ValueError for values out of range and for settings mmfn does not implement (rope scaling, dropout, quantization).
    """
    outer = ConfigReader(hf)
    outer.only("quantization_config", None, "quantized weights are not supported")
    rotary = text.section("rope_parameters", "rope_scaling")
    rotary.only("rope_type", "default", "scaled rope is not supported")
    rotary.only("type", rotary.get("rope_type", "default"), "scaled rope is not supported")
    how = "interleaves" if rope.is_interleaved else "does not interleave"
    rotary.only("mrope_interleaved", rope.is_interleaved, f"this family {how} its rope sections")
    if rope.part == 1.0:
        rotary.only("partial_rotary_factor", 1.0, "this family rotates whole heads")
    part = rotary.number("partial_rotary_factor", text.number("partial_rotary_factor", rope.part))
    return {
        "vocab_size": text.integer("vocab_size"),
        "num_layers": text.integer("num_hidden_layers"),
        "decoder": block,
        "vision": tower,
        "rope_theta": rotary.number("rope_theta", text.number("rope_theta", rope.theta, 1.0), 1.0),
        "rope_sections": rotary.integers("mrope_section", rope.sections),
        "rotary_dim": int(block.head_dim * part),
        "is_tied": outer.boolean("tie_word_embeddings", False),
        "image_token_id": outer.integer("image_token_id", minimum=0),
        "video_token_id": outer.integer("video_token_id", minimum=0),
        "pad_token_id": None if text.get("pad_token_id") is None else text.integer("pad_token_id", minimum=0),
    }


def blocks(cfg: VisionLanguageConfig) -> list[Tree]:
    """The specs of the text blocks: of attention, and of experts in those of `moe_layers`, else a dense layer."""
    dense = decoder.dense_specs(cfg.decoder)
    if cfg.moe is None:
        return [dense] * cfg.num_layers
    sparse = decoder.specs(cfg.decoder, attention=decoder.attention_specs(cfg.decoder), moe=moe.specs(cfg.moe))
    return [sparse if i in cfg.moe_layers else dense for i in range(cfg.num_layers)]


def loss_weights(cfg: VisionLanguageConfig) -> dict[str, float]:
    """The weight of the load-balancing loss, of a model that has a router."""
    return {balance.ROUTER_LOSS: cfg.router_aux_coef} if cfg.moe_layers else {}


def specs(cfg: VisionLanguageConfig, layers: Sequence[Tree], **towers: Tree) -> Tree:
    """The parameters around the specs of the text blocks; without a `head` when it is tied to the embedding."""
    D, V, std = cfg.decoder.d_model, cfg.vocab_size, cfg.decoder.init_std
    tree = {
        "text": {
            "embed": {"weight": spec((V, D), "vocab embed", normal(std))},
            "layers": list(layers),
            "norm": decoder.norm_specs(cfg.decoder),
        },
        **towers,
    }
    if not cfg.is_tied:
        tree["head"] = linear.specs(V, D, "vocab embed", std=std)
    return tree


def head(params: Tree, cfg: VisionLanguageConfig, ops: Ops) -> Tensor:
    """`weight_VD` of the language-model head, or those of its rows that `ops.linear_cross_entropy` takes."""
    weight_VD: Tensor = ops.gather_head(params["text"]["embed"] if cfg.is_tied else params["head"])["weight"]
    return weight_VD


def empty_cache(
    cfg: VisionLanguageConfig, num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device
) -> list[Tree]:
    """An empty key-value cache per text layer; `num_columns` counts the spare one (see `layers.cache`)."""
    shape = (num_rows, num_columns, cfg.decoder.num_kv_heads, cfg.decoder.head_dim)
    return layer_cache.empty(cfg.num_layers, shape, dtype, device)


def positions(sample: Sample, cfg: VisionLanguageConfig) -> Tensor:
    """float32[3, T]: text, and a block for every image and every frame of a video (timestamps stand between them).

    Source: `Qwen3VLModel.get_rope_index` in transformers 5.23 (which needs a text token between two blocks).
    """
    return mrope(sample.tokens_T.numel(), patches.frame_blocks(sample, cfg.vision.merge_size))


def towers(cfg: VisionLanguageConfig) -> dict[str, TowerKind]:
    """One tower, of merged patches. A patch costs a block `8 D**2 + 4 D F` FLOPs in matmuls (with a gate 6 D F), and
    `4 D` per patch it attends to: as much at `2 D + F` patches (`2 D + 3 F / 2`)."""
    vision = cfg.vision
    mlp = 3 * vision.d_ff // 2 if vision.activation == "swiglu" else vision.d_ff
    return {"vision": patches.tower_kind(vision.merge_size, vision.patch_values, 2 * vision.d_model + mlp)}


def lay(sample: Sample, cfg: VisionLanguageConfig) -> dict[str, Laid]:
    """See `patches.lay_frames`."""
    return {"vision": patches.lay_frames(sample, cfg.vision.merge_size, cfg.vision.patch_values)}


def kinds(tokens_T: Tensor, cfg: VisionLanguageConfig) -> Tensor:
    """int64[T]: the kind of every token, by the placeholders' ids."""
    is_image_T, is_video_T = tokens_T == cfg.image_token_id, tokens_T == cfg.video_token_id
    return torch.where(is_image_T, IMAGE, torch.where(is_video_T, VIDEO, TEXT))


def example(num_tokens: int, side: int, cfg: VisionLanguageConfig) -> Sample:
    """A sample to plan with: an image of `side` x `side` patches, rounded down to merge blocks, where that leaves room
    for text behind it, which is supervised."""
    merge, kinds_T = cfg.vision.merge_size, torch.full((num_tokens,), TEXT)
    side = side // merge * merge
    num_features = (side // merge) ** 2
    images: tuple[Media, ...] = ()
    if 0 < num_features < num_tokens - 1:
        kinds_T[1 : 1 + num_features] = IMAGE
        images = (Media(inputs_UF=torch.empty(side * side, cfg.vision.patch_values), grid=(1, side, side)),)
    tokens_T = torch.where(kinds_T == IMAGE, cfg.image_token_id, torch.arange(num_tokens) % cfg.vocab_size)
    labels_T = torch.where(kinds_T == IMAGE, IGNORE, tokens_T)
    return Sample(tokens_T=tokens_T, labels_T=labels_T, kinds_T=kinds_T, images=images)


def at_depth(cfg: VisionLanguageConfig, num_layers: int) -> VisionLanguageConfig:
    """The config of the model with the first `num_layers` text blocks alone."""
    return replace(cfg, num_layers=num_layers)


def experts_per_token(cfg: VisionLanguageConfig) -> int:
    """How many experts a token goes through in a block that has some."""
    return cfg.moe.num_chosen if cfg.moe is not None else 0


def taps(cfg: VisionLanguageConfig) -> int:
    """Text blocks, from the first on, behind which something is added."""
    return len(cfg.vision.deepstack)


def row_ids(batch: Batch, cfg: VisionLanguageConfig) -> list[tuple[str, Tensor]]:
    """Which rows parameters compute with, by the beginning of their path."""
    return [*vision.row_ids(batch.towers["vision"], cfg.vision, "vision/"), ("text/", batch.token_ids_T)]


def flow(cfg: VisionLanguageConfig) -> dict[str, list[Stage]]:
    """The stages of the tower and of the text."""
    return {"vision": vision.flow(cfg.vision), "text": text_flow(cfg)}


def text_flow(cfg: VisionLanguageConfig, mixers: Sequence[Sequence[Stage]] | None = None) -> list[Stage]:
    """The stages of the text, head and all. `mixers`: of its blocks (default: attention)."""
    if mixers is None:
        mixers = [attention_flow(f"text/layers/{i}/attention", cfg) for i in range(cfg.num_layers)]
    return [
        Stage(parameters=("text/embed",), share=0),
        *(stage for i, mixer in enumerate(mixers) for stage in block(f"text/layers/{i}", mixer)),
        Stage(parameters=("text/norm",)),
        head_flow(cfg),
    ]


def attention_flow(path: str, cfg: VisionLanguageConfig) -> list[Stage]:
    """The stages of causal attention in the text."""
    return attention(path, cfg.decoder.num_heads * cfg.decoder.head_dim, CAUSAL_PAIRS)


def head_flow(cfg: VisionLanguageConfig, ahead: int = 0) -> Stage:
    """The head on the tokens that are scored `ahead` places further."""
    return Stage(parameters=("text/embed" if cfg.is_tied else "head",), count=labels(ahead))


def parts(cfg: VisionLanguageConfig) -> dict[str, str]:
    """Regexes over the paths of the parts a run can freeze; a tied head is the embedding, so no part of its own."""
    found = {
        "vision_encoder": r"vision/(?!(merger|deepstack)/).*",
        "vision_projector": r"vision/(merger|deepstack)/.*",
        "text_decoder": r"text/.*",
    }
    return found if cfg.is_tied else {**found, "lm_head": r"head/.*"}


def text_entries(name: str, head: str = "lm_head") -> tuple[Entry, ...]:
    """Hugging Face names of the text's leaves, there under `name`, and of the `head`."""
    pairs = [
        ("head/weight", f"{head}.weight"),
        ("text/embed/weight", f"{name}.embed_tokens.weight"),
        ("text/norm/{weight}", f"{name}.norm.weight"),
        *decoder.names("text/layers/{i}", f"{name}.layers.{{i}}"),
    ]
    return tuple(Entry(path=path, name=stored) for path, stored in pairs)


def patch_entry(cfg: VisionConfig, name: str) -> Entry:
    """That of the patch embedding's weight, a convolution kernel on disk."""
    kernel = (cfg.d_model, cfg.num_channels, cfg.temporal_patch_size, cfg.patch_size, cfg.patch_size)
    return Entry(path="vision/patch_embed/weight", name=f"{name}.patch_embed.proj.weight", disk_shape=kernel)


def entries(cfg: VisionLanguageConfig, text: str, tower: str) -> tuple[Entry, ...]:
    """Hugging Face names of the leaves of a text, there under `text`, and a tower of the Qwen3 models."""
    own = (Entry(path=path, name=name) for path, name in qwen3_tower.names(tower))
    return (patch_entry(cfg.vision, tower), *text_entries(text), *own)


def copies(cfg: VisionLanguageConfig, head: str = "lm_head") -> dict[str, str]:
    """The stored name of a head that is tied to the embedding."""
    return {f"{head}.weight": "text/embed/weight"} if cfg.is_tied else {}
