"""The thinker of Qwen3-Omni: text with experts that sees and hears. Source: `modeling_qwen3_omni_moe.py` in
transformers 5.23.

Features of images, videos and sound replace the embeddings of their placeholder tokens; those of vision that are tapped
on the way (deepstack) are added behind the first text blocks. A checkpoint of the whole model also holds what speaks
(`talker`, `code2wav`): it is not read, and copied as it is on export. Legend: T tokens, N features, D width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfn.batch import AUDIO, IGNORE, IMAGE, Batch, Laid, Media, Sample, TowerKind
from mmfn.errors import UserError
from mmfn.models import Output
from mmfn.models.data import qwen_omni
from mmfn.models.hf_config import ConfigReader
from mmfn.models.keymap import BUFFERS, Entry, KeyMap
from mmfn.models.layers import audio, balance, decoder, moe, norm, patches, qwen3_tower, rope, text
from mmfn.models.layers import vision_language as shared
from mmfn.models.layers.audio import AudioConfig
from mmfn.models.layers.cache import Cache
from mmfn.models.layers.moe import MoeConfig
from mmfn.models.layers.positions import mrope
from mmfn.models.work import Stage
from mmfn.ops import Ops
from mmfn.tree import Tree

DEFAULTS = {
    "vocab_size": 3584,
    "hidden_size": 2048,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
SOUND = {
    "encoder_layers": 32,
    "d_model": 1280,
    "encoder_ffn_dim": 5120,
    "encoder_attention_heads": 20,
    "output_dim": 3584,
    "num_mel_bins": 128,
    "downsample_hidden_size": 480,
    "n_window_infer": 800,
}
TOKENS = {"image_token_id": 151_655, "video_token_id": 151_656, "audio_token_id": 151_646}
DEEPSTACK = (8, 16, 24)  # the blocks of the tower of vision that are tapped
ROPE = shared.RopeDefaults(theta=1_000_000.0, sections=(24, 20, 20), is_interleaved=True)
OUTER, PREFIX = "thinker_config", "thinker."
PUBLISHED, IN_MEMORY = ("model", "", moe.numbered_entries), ("model.language_model", "model.", moe.fused_entries)
SPEECH = (r"talker\..*", r"code2wav\..*")

head, at_depth, taps, empty_cache = shared.head, shared.at_depth, shared.taps, shared.empty_cache
lora_targets, data, loss_weights = shared.LORA_TARGETS, qwen_omni.SIDE, shared.loss_weights


@dataclass(frozen=True, kw_only=True)
class Config(shared.VisionLanguageConfig):
    """`positions_per_second`: by which a video's frames and sound advance. `prefix`: of all stored names, that of the
    thinker in a whole model or none."""

    audio: AudioConfig
    audio_token_id: int
    positions_per_second: float
    prefix: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.audio.d_out != self.decoder.d_model:
            raise UserError(
                f"audio_config.output_dim is {self.audio.d_out} but must equal text_config.hidden_size "
                f"{self.decoder.d_model}: features replace token embeddings; correct the model's config.json"
            )


def config_from_hf(hf: Mapping[str, Any]) -> Config:
    """The dict of a `config.json`, of the whole model or of its thinker alone; absent keys take the defaults of
    transformers 5.23.

    Raises ValueError for values out of range and for settings mmfn does not implement.
    """
    is_whole = OUTER in hf or hf.get("model_type") == "qwen3_omni_moe"
    ConfigReader(hf).only("quantization_config", None, "quantized weights are not supported")
    thinker = shared.with_defaults(ConfigReader(hf).section(OUTER).values if is_whole else hf, **TOKENS)
    own, text_ = ConfigReader(thinker, OUTER if is_whole else "config"), shared.text_section(thinker, DEFAULTS)
    block = decoder.config_from_hf(text_)
    tower = qwen3_tower.config_from_hf(own.section("vision_config"), DEEPSTACK)
    fields = shared.fields_from_hf(thinker, text_, ROPE, block=block, tower=tower)
    return Config(
        **fields,
        moe=MoeConfig(
            d_model=block.d_model,
            d_ff=text_.integer("moe_intermediate_size", 768),
            num_experts=text_.integer("num_experts", 128),
            num_chosen=text_.integer("num_experts_per_tok", 8),
            is_normed=text_.boolean("norm_topk_prob", True),
            init_std=block.init_std,
        ),
        moe_layers=moe.layers_from_hf(text_, fields["num_layers"]),
        router_aux_coef=balance.weight_from_hf(text_, 0.001),
        audio=audio.config_from_hf(own.section("audio_config").with_defaults(SOUND)),
        audio_token_id=own.integer("audio_token_id", minimum=0),
        positions_per_second=own.number("position_id_per_seconds", 25.0),
        prefix=PREFIX if is_whole else "",
    )


def specs(cfg: Config) -> Tree:
    """The parameters."""
    return shared.specs(cfg, shared.blocks(cfg), vision=qwen3_tower.specs(cfg.vision), audio=audio.specs(cfg.audio))


def apply(params: Tree, batch: Batch, cfg: Config, ops: Ops, cache: Cache | None = None) -> Output:
    """The last hidden states, normalised, before the head. With a `cache` as in `qwen3_vl`."""
    x_TD = text.embed(params["text"]["embed"], batch.tokens_T, ops, pad_token_id=cfg.pad_token_id)
    between = {}
    if cache is None or cache.slots.is_prefill:
        sound, sight = batch.towers["audio"], batch.towers["vision"]
        heard_ND = audio.encode(params["audio"], sound, cfg.audio, ops)
        x_TD = text.replace_by_features(x_TD, heard_ND, sound.index_T, ops)
        seen_ND, deepstack = qwen3_tower.encode(params["vision"], sight, cfg.vision, ops)
        x_TD = text.replace_by_features(x_TD, seen_ND, sight.index_T, ops)
        for i, tapped_ND in enumerate(deepstack):
            between[i] = partial(text.add_features, features_ND=tapped_ND, index_T=sight.index_T, ops=ops)
    x_TD, routers, cache = text.decode(
        params["text"]["layers"],
        x_TD,
        rope.interleaved(batch.positions_3T, cfg.rope_sections, cfg.rope_theta),
        batch,
        cfg.decoder,
        ops,
        mixer=partial(decoder.attend, cfg=cfg.decoder, ops=ops),
        feed_forward=partial(moe.mixed, cfg=cfg.moe, ops=ops),
        between=between,
        cache=cache,
    )
    x_TD = norm.rms(ops.gather(params["text"]["norm"]), x_TD, cfg.decoder.norm_eps, ops)
    losses, stats = balance.router_losses(routers, ops), balance.router_stats(routers)
    return Output(hidden_TD=x_TD, losses=losses, stats=stats, cache=cache)


def positions(sample: Sample, cfg: Config) -> Tensor:
    """float32[3, T]: text, and a block for every image, clip and whole video, of which one and its sound are one.

    Steps in time of a video lie `seconds_per_grid * positions_per_second` apart, tokens of sound 1.
    Source: `get_rope_index` of the thinker in transformers 5.23, which takes a silent video for text where
    `use_audio_in_video` is set for others of the same call.
    """
    per_second = cfg.positions_per_second

    def times(video: Media) -> Tensor:  # rounded step by step, as in the reference
        return torch.arange(video.grid[0]).float() * video.seconds_per_grid * per_second

    sounds = (torch.arange(audio.num_rows(clip.grid[0])).float().expand(3, -1) for clip in sample.audios)
    return mrope(sample.tokens_T.numel(), patches.media_blocks(sample, cfg.vision.merge_size, times, sounds))


def towers(cfg: Config) -> dict[str, TowerKind]:
    """Merged patches, and chunks of sound."""
    return {**shared.towers(cfg), "audio": audio.tower_kind(cfg.audio)}


def lay(sample: Sample, cfg: Config) -> dict[str, Laid]:
    """See `patches.lay_frames` and `audio.lay`."""
    return {**shared.lay(sample, cfg), "audio": audio.lay(sample, cfg.audio)}


def kinds(tokens_T: Tensor, cfg: Config) -> Tensor:
    """int64[T]: the kind of every token, by the placeholders' ids."""
    return torch.where(tokens_T == cfg.audio_token_id, AUDIO, shared.kinds(tokens_T, cfg))


def example(num_tokens: int, side: int, cfg: Config) -> Sample:
    """That of `vision_language`, with as much sound at its end, in whole chunks, as an image gives features, where that
    leaves room for text."""
    seen = shared.example(num_tokens, side, cfg)
    num_seen = int((seen.kinds_T == IMAGE).sum())
    chunks = min(-(-num_seen // audio.ROWS), (num_tokens - num_seen - 3) // audio.ROWS)
    if not num_seen or chunks < 1:
        return seen
    is_heard_T = torch.arange(num_tokens) >= num_tokens - 1 - chunks * audio.ROWS
    is_heard_T[-1] = False
    return replace(
        seen,
        tokens_T=torch.where(is_heard_T, cfg.audio_token_id, seen.tokens_T),
        labels_T=torch.where(is_heard_T, IGNORE, seen.labels_T),
        kinds_T=torch.where(is_heard_T, AUDIO, seen.kinds_T),
        audios=(audio.clip_of(torch.empty(chunks * audio.CHUNK, cfg.audio.num_mels)),),
    )


def row_ids(batch: Batch, cfg: Config) -> list[tuple[str, Tensor]]:
    """Which rows parameters compute with, by the beginning of their path."""
    return [*shared.row_ids(batch, cfg), ("audio/", batch.towers["audio"].ids_P)]


experts_per_token = shared.experts_per_token


def flow(cfg: Config) -> dict[str, list[Stage]]:
    """The stages of both towers and of the text."""
    return {"audio": audio.flow(cfg.audio), **shared.flow(cfg)}


def parts(cfg: Config) -> dict[str, str]:
    """Regexes over the paths of the parts a run can freeze."""
    heard = {"audio_encoder": r"audio/(convolutions|entry|layers)/.*", "audio_projector": r"audio/projector/.*"}
    return {**shared.parts(cfg), **heard}


def key_map(cfg: Config) -> KeyMap:
    """Hugging Face names of the leaves: as published, as transformers holds them, and the first under the other prefix.

    Published, an expert's matrices are tensors of their own.
    """
    whose = "ForConditionalGeneration"
    return KeyMap(
        entries=(),
        architecture=f"Qwen3OmniMoe{whose}" if cfg.prefix else f"Qwen3OmniMoeThinker{whose}",
        layouts={
            "hub": _entries(cfg, cfg.prefix, *PUBLISHED),
            "transformers": _entries(cfg, cfg.prefix, *IN_MEMORY),
            "renamed": _entries(cfg, "" if cfg.prefix else PREFIX, *PUBLISHED),
        },
        copies={} if not cfg.is_tied else {f"{prefix}lm_head.weight": "text/embed/weight" for prefix in ("", PREFIX)},
        ignore=BUFFERS,
        verbatim=SPEECH,
    )


def _entries(
    cfg: Config, prefix: str, text_name: str, towers: str, experts: Callable[[str, str], tuple[Entry, ...]]
) -> tuple[Entry, ...]:
    """Behind the prefix, `towers` begins the names of what sees and hears. `experts`: how they are stored."""
    seen, heard, written = f"{prefix}{towers}visual", f"{prefix}{towers}audio_tower", f"{prefix}{text_name}"
    block, layer = "text/layers/{i}/moe", f"{written}.layers.{{i}}.mlp"
    tower = qwen3_tower.names(seen, merger=("ln_q", "mlp.0", "mlp.2"), deepstack="merger_list")
    pairs = [*moe.names(block, layer), *tower, *audio.names(heard)]
    return (
        *experts(block, layer),
        shared.patch_entry(cfg.vision, seen),
        *shared.text_entries(written, f"{prefix}lm_head"),
        *(Entry(path=path, name=name) for path, name in pairs),
    )
