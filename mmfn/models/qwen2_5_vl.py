"""Qwen2.5-VL. Source: `modeling_qwen2_5_vl.py` in transformers 5.23.

Images and videos pass a tower most of whose blocks attend within windows of a frame, the others within whole frames;
its features replace the embeddings of their placeholder tokens. Videos lie on an axis of absolute time.
Legend: T tokens, P patches, N features, K steps in time, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfn.batch import Batch, Laid, Media, Sample, Tower, TowerKind
from mmfn.errors import UserError
from mmfn.models import Output
from mmfn.models.data import qwen2_vision
from mmfn.models.hf_config import ConfigReader
from mmfn.models.keymap import Entry, KeyMap
from mmfn.models.layers import decoder, norm, patches, rope, text, vision
from mmfn.models.layers import vision_language as shared
from mmfn.models.layers.cache import Cache
from mmfn.models.layers.positions import mrope
from mmfn.models.work import Stage
from mmfn.ops import Ops
from mmfn.tree import Tree

DEFAULTS = {
    "vocab_size": 152_064,
    "hidden_size": 8192,
    "intermediate_size": 29_568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}
TOWER = {
    "depth": 32,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "window_size": 112,
    "tokens_per_second": 4,
}
TOKENS = {"image_token_id": 151_655, "video_token_id": 151_656}
ROPE = shared.RopeDefaults(theta=1_000_000.0, sections=(16, 24, 24), is_interleaved=False)
BLOCK_ENDS = {"time_height_width": (0, 1, 2), "height_width": (1, 2)}
NAMES = {"hub": ("model", "visual"), "transformers": ("model.language_model", "model.visual")}  # of text and tower

head, parts, at_depth = shared.head, shared.parts, shared.at_depth
empty_cache, lora_targets, row_ids = shared.empty_cache, shared.LORA_TARGETS, shared.row_ids
kinds, example = shared.kinds, shared.example
data = qwen2_vision.SIDE


@dataclass(frozen=True, kw_only=True)
class WindowVisionConfig(vision.VisionConfig):
    """`window`: merged cells on a side of an attention window. `frame_blocks`: the blocks that attend to whole frames.
    `positions_per_second`: steps of the temporal position."""

    window: int
    frame_blocks: frozenset[int]
    positions_per_second: int


@dataclass(frozen=True, kw_only=True)
class Config(shared.VisionLanguageConfig):
    """`block_end`: the coordinates whose largest place says where what follows a medium begins."""

    vision: WindowVisionConfig
    block_end: tuple[int, ...]


def config_from_hf(hf: Mapping[str, Any]) -> Config:
    """The dict of a `config.json`; absent keys take the defaults of transformers 5.23.

    Published files hold the text's values beside `vision_config`, newer ones in a `text_config`. One key is of mmfn
    alone, `mrope_block_end`: "time_height_width" (default) lets text behind a video begin behind its last moment, as in
    the code the models were published with, "height_width" behind its rows and columns, as transformers 5.23 does.
    Raises ValueError for values out of range and for settings mmfn does not implement.
    """
    hf = shared.with_defaults(hf, **TOKENS)
    text = _text_section(hf)
    num_heads, d_model = text.integer("num_attention_heads"), text.integer("hidden_size")
    text.only("head_dim", d_model // num_heads, "the width is divided among the heads")
    text.only("use_sliding_window", False, "text attends to all that is before it")
    num_layers, kind = text.integer("num_hidden_layers"), "full_attention"
    text.strings("layer_types", [kind], num_layers, [kind] * num_layers)
    block = decoder.config_from_hf(text, biased=("q", "k", "v"), has_qk_norm=False)
    tower = _vision_config(ConfigReader(hf).section("vision_config"))
    values = shared.fields_from_hf(hf, text, ROPE, block=block, tower=tower)
    is_tied = values["is_tied"] or text.boolean("tie_word_embeddings", False)
    block_end = ConfigReader(hf).choice("mrope_block_end", BLOCK_ENDS, "time_height_width")
    return Config(**{**values, "is_tied": is_tied}, block_end=block_end)


def _text_section(hf: Mapping[str, Any]) -> ConfigReader:
    """The values of the text, wherever they are; the older name of the type of rope is replaced by the newer one."""
    text = shared.text_section(hf, DEFAULTS)
    if hf.get("text_config") is None:
        text = ConfigReader({**DEFAULTS, **hf})
    key = "rope_parameters" if text.get("rope_parameters") is not None else "rope_scaling"
    rotary = text.section(key).values
    default = {name: "default" for name in ("rope_type", "type") if rotary.get(name) == "mrope"}
    return ConfigReader({**text.values, key: {**rotary, **default}}, text.name)


def _vision_config(hf: ConfigReader) -> WindowVisionConfig:
    """The `vision_config` of a `config.json`."""
    hf = hf.with_defaults({**TOWER, "in_channels": hf.integer("in_chans", 3)})
    for older, newer in (("in_chans", "in_channels"), ("spatial_patch_size", "patch_size")):
        hf.only(older, hf.integer(newer), "it is another name of a value that is there")
    hf.only("hidden_act", "silu", "the feed-forward layer is SwiGLU")
    fields = vision.fields_from_hf(hf)
    window = hf.integer("window_size") // fields["merge_size"] // fields["patch_size"]
    if not window:
        raise UserError(
            f"{hf.name}.window_size is {hf.get('window_size')} but must be at least one merged cell of "
            f"{fields['merge_size']} x {fields['patch_size']} pixels; correct the model's config.json"
        )
    return WindowVisionConfig(
        **fields,
        d_ff=hf.integer("intermediate_size"),
        activation="swiglu",
        is_rms=True,
        has_patch_bias=False,
        window=window,
        frame_blocks=frozenset(hf.integers("fullatt_block_indexes", (7, 15, 23, 31))),
        positions_per_second=hf.integer("tokens_per_second"),
    )


def specs(cfg: Config) -> Tree:
    """The parameters."""
    tower = {
        "patch_embed": vision.patch_embed_specs(cfg.vision),
        "layers": [vision.block_specs(cfg.vision)] * cfg.vision.depth,
        "merger": vision.merger_specs(cfg.vision, norm_merged=False),
    }
    return shared.specs(cfg, shared.blocks(cfg), vision=tower)


def apply(params: Tree, batch: Batch, cfg: Config, ops: Ops, cache: Cache | None = None) -> Output:
    """The last hidden states, normalised, before the head.

    With a `cache`, keys and values of the tokens are written to it and `Output.cache` is the new one; a decode step
    (one token per row, `cache.slots.is_prefill` false) reads no images and skips the tower.
    """
    x_TD = text.embed(params["text"]["embed"], batch.tokens_T, ops, pad_token_id=cfg.pad_token_id)
    if cache is None or cache.slots.is_prefill:
        tower = batch.towers["vision"]
        features_ND = encode(params["vision"], tower, cfg.vision, ops)
        x_TD = text.replace_by_features(x_TD, features_ND, tower.index_T, ops)
    x_TD, _, cache = text.decode(
        params["text"]["layers"],
        x_TD,
        rope.chunked(batch.positions_3T, cfg.rope_sections, cfg.rope_theta),
        batch,
        cfg.decoder,
        ops,
        mixer=partial(decoder.attend, cfg=cfg.decoder, ops=ops),
        feed_forward=partial(decoder.dense, ops=ops),
        cache=cache,
    )
    return Output(
        hidden_TD=norm.rms(ops.gather(params["text"]["norm"]), x_TD, cfg.decoder.norm_eps, ops),
        cache=cache,
    )


def encode(params: Tree, tower: Tower, cfg: WindowVisionConfig, ops: Ops) -> Tensor:
    """`features_ND`: merged features of all images and frames, in the order in which patches are laid."""
    x_PD = vision.patch_embed(params["patch_embed"], tower.inputs_UF, ops)
    windows, frames = tower.segments
    each = [frames if i in cfg.frame_blocks else windows for i in range(cfg.depth)]
    x_PD, _ = vision.run_blocks(params["layers"], x_PD, tower.coords_P4, each, cfg, ops)
    return vision.merge(params["merger"], x_PD, cfg, ops, norm_merged=False)


def positions(sample: Sample, cfg: Config) -> Tensor:
    """float32[3, T]: text, and a block for every image and every video, whose steps in time lie as its seconds say.

    Source: `Qwen2_5_VLModel.get_rope_index` in transformers 5.23, but for what follows a video (`config_from_hf`).
    """
    times = partial(_times, sample=sample, positions_per_second=cfg.vision.positions_per_second)
    return mrope(sample.tokens_T.numel(), patches.media_blocks(sample, cfg.vision.merge_size, times), cfg.block_end)


def _times(video: Media, sample: Sample, positions_per_second: int) -> Tensor:
    """float32[K]: whole numbers, rounded down before anything is added to them."""
    if not video.seconds_per_grid > 0:
        raise UserError(
            f"sample {sample.id!r} has a video with seconds_per_grid {video.seconds_per_grid} but each of its "
            f"{video.grid[0]} steps in time must last; preprocess it for this model"
        )
    return (torch.arange(video.grid[0]) * (positions_per_second * torch.tensor(video.seconds_per_grid))).floor()


def towers(cfg: Config) -> dict[str, TowerKind]:
    """One tower, of merged patches, with windows and frames.

    Of a frame of n patches, a patch costs a block `8 D**2 + 6 D F` FLOPs in matmuls and `4 D` per patch it attends to:
    n in blocks over frames, a window's in the others, which so count with the matmuls. (With no block over frames
    nothing grows with n; one is assumed.)
    """
    vision = cfg.vision
    num_full = max(1, sum(i in vision.frame_blocks for i in range(vision.depth)))
    matmuls = vision.depth * (2 * vision.d_model + 3 * vision.d_ff // 2)
    windows = (vision.depth - num_full) * vision.window**2 * vision.merged
    matmul_patches = (matmuls + windows) // num_full
    return {"vision": patches.tower_kind(vision.merge_size, vision.patch_values, matmul_patches, num_lists=2)}


def flow(cfg: Config) -> dict[str, list[Stage]]:
    """The stages of the tower, in windows or whole frames by turns, and of the text."""
    lists = [int(i in cfg.vision.frame_blocks) for i in range(cfg.vision.depth)]
    return {"vision": vision.flow(cfg.vision, lists=lists), "text": shared.text_flow(cfg)}


def lay(sample: Sample, cfg: Config) -> dict[str, Laid]:
    """See `patches.lay_windows`."""
    vision = cfg.vision
    return {"vision": patches.lay_windows(sample, vision.merge_size, vision.patch_values, vision.window)}


def key_map(cfg: Config) -> KeyMap:
    """Hugging Face names of the leaves: as published, and as transformers holds them in memory."""
    return KeyMap(
        entries=(),
        architecture="Qwen2_5_VLForConditionalGeneration",
        layouts={layout: _entries(cfg, *names) for layout, names in NAMES.items()},
        copies=shared.copies(cfg),
    )


def _entries(cfg: Config, text: str, tower: str) -> tuple[Entry, ...]:
    pairs = {
        "layers/{i}/attention_norm": "blocks.{i}.norm1",
        "layers/{i}/attention/qkv": "blocks.{i}.attn.qkv",
        "layers/{i}/attention/o": "blocks.{i}.attn.proj",
        "layers/{i}/mlp_norm": "blocks.{i}.norm2",
        "layers/{i}/mlp/{proj}": "blocks.{i}.mlp.{proj}_proj",
        "merger/norm": "merger.ln_q",
        "merger/up": "merger.mlp.0",
        "merger/down": "merger.mlp.2",
    }
    own = (Entry(path=f"vision/{path}/{{leaf}}", name=f"{tower}.{name}.{{leaf}}") for path, name in pairs.items())
    return (shared.patch_entry(cfg.vision, tower), *shared.text_entries(text), *own)
