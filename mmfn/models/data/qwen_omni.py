"""Images, videos and sound of Qwen3-Omni. Source: `Qwen3OmniMoeProcessor` and its parts in transformers 5.23.0."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmfn.batch import Media
from mmfn.errors import UserError
from mmfn.models.data import DataSide, Fact, MediaByKind, qwen2_vision, qwen_vision
from mmfn.models.data.chat import ChatFormat, MediaText
from mmfn.models.data.inputs import floats, integers, pair
from mmfn.models.data.mel import SoundSpec, log_mel
from mmfn.models.data.qwen2_vision import BlockProcessor
from mmfn.models.data.qwen_vision import VIDEO_PAD
from mmfn.models.layers import audio

AUDIO_PAD, AUDIO_START, AUDIO_END = "<|audio_pad|>", "<|audio_start|>", "<|audio_end|>"
PADS = {**qwen2_vision.PADS, "audio": AUDIO_PAD}
TOKENS = {
    **qwen_vision.TOKENS,
    "audio_token_id": AUDIO_PAD,
    "audio_start_token_id": AUDIO_START,
    "audio_end_token_id": AUDIO_END,
}
SOUND, LENGTHS, SECONDS = "input_features", "feature_attention_mask", "video_second_per_grid"
COUNTS = "num_audio_tokens"  # which the processor returns too, and mmfn works out itself
SOUND_DEFAULTS = {"feature_size": 128, "sampling_rate": 16_000, "hop_length": 160, "n_fft": 400}
PIXELS = {"patch_size": 16, "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
IMAGE_DEFAULTS = {**qwen_vision.IMAGE_DEFAULTS, **PIXELS}
VIDEO_DEFAULTS = {
    **qwen2_vision.VIDEO_DEFAULTS,
    **PIXELS,
    "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32},
}


@dataclass(frozen=True, kw_only=True)
class OmniProcessor(BlockProcessor):
    """A `MediaProcessor` of images, videos and sound.

    A step in time of a video lasts as long as its frames, of which the sampled ones count; transformers' processor
    takes its argument `fps` for their rate, 1.0 where there is none.
    """

    sound_spec: SoundSpec
    positions_per_second: float = 13.0  # of the published models, and of transformers' processor

    def sound_rate(self) -> int:
        """That of the feature extractor."""
        return self.sound_spec.rate

    def audio(self, wave_S: Tensor) -> Media:
        """See `mel.log_mel`."""
        return audio.clip_of(log_mel(wave_S, self.sound_spec))

    def text(self, kind: str, media: Media) -> MediaText:
        """A medium is its placeholder, once for every feature: the marks around it are the template's. See
        `video_with_sound` for a video that is heard."""
        if media.sound is not None:
            merge_size, per_second = self.image_spec.merge_size, self.positions_per_second
            return video_with_sound(media, media.sound, merge_size=merge_size, per_second=per_second)
        return MediaText(text=PADS[kind], counts=(_num_tokens(kind, media, self.image_spec.merge_size**2),))


def video_with_sound(video: Media, clip: Media, *, merge_size: int, per_second: float) -> MediaText:
    """What is written for a video that is heard: one run of placeholders, of a step in time and then of the sound until
    the next one, between the marks of sound.

    `per_second`: positions of a second of video, of which a token of sound takes one. A video of 2 steps, 0.5 s and 6
    features each, with 13 tokens of sound, 13 positions per second:

    >>> video_with_sound(video, clip, merge_size=2, per_second=13.0).counts
    (6, 7, 6, 6)

    Source: `replace_video_with_audio_token` of `Qwen3OmniMoeProcessor` in transformers 5.23.
    """
    steps, cells = video.grid[0], math.prod(video.grid[1:]) // merge_size**2
    num, done, text = audio.num_rows(clip.grid[0]), 0, ""
    counts: list[int] = []
    for step in range(steps):
        before = min(num, math.ceil(step * video.seconds_per_grid * per_second))  # sound that starts before the step
        for pad, count in ((AUDIO_PAD, before - done), (VIDEO_PAD, cells)):
            if count > 0:
                text, counts = text + pad, [*counts, count]
        done = max(done, before)
    if num > done:
        text, counts = text + AUDIO_PAD, [*counts, num - done]
    return MediaText(text=f"{AUDIO_START}{text}{AUDIO_END}", counts=tuple(counts))


def processor(sections: Mapping[str, Mapping[str, Any]], cfg: Any) -> OmniProcessor:
    """Of the sections `image_processor`, `feature_extractor` (in older files one and the same) and, where there is one,
    `video_processor`. `cfg`: a config with `positions_per_second`, by which a video and its sound are interleaved."""
    specs = qwen2_vision.specs_from_hf(sections, IMAGE_DEFAULTS, VIDEO_DEFAULTS)
    sound = SoundSpec.from_hf(sections["feature_extractor"], SOUND_DEFAULTS)
    return OmniProcessor(**specs, sound_spec=sound, positions_per_second=cfg.positions_per_second)


def facts(cfg: Any, processor: OmniProcessor) -> list[Fact]:
    """`cfg`: a config with `vision` and `audio`."""
    mels = Fact(name="num_mel_bins", config=cfg.audio.num_mels, processor=processor.sound_spec.num_mels)
    return [*qwen_vision.facts(cfg, processor), mels]


def media_from_hf(inputs: Mapping[str, Tensor], cfg: Any) -> MediaByKind:
    """Images, clips, and videos with the `SECONDS` that a step in time lasts as the processor says: see
    `OmniProcessor`."""
    seen = qwen2_vision.media_from_hf(inputs, cfg, seconds=SECONDS)
    return {**seen, "audio": _clips(inputs, cfg.audio.num_mels)}


def _clips(inputs: Mapping[str, Tensor], num_mels: int) -> list[Media]:
    both = pair(inputs, SOUND, LENGTHS)
    if both is None:
        return []
    features_NFU, mask_NU = floats(SOUND, both[0]), integers(LENGTHS, both[1])
    N, U = mask_NU.shape if mask_NU.ndim == 2 else (-1, -1)
    if list(features_NFU.shape) != [N, num_mels, U]:
        raise UserError(
            f"{SOUND} of shape {list(features_NFU.shape)} and {LENGTHS} of shape {list(mask_NU.shape)} must be "
            f"[clips, {num_mels}, frames] and [clips, frames]; use the processor of this model"
        )
    lengths_N = mask_NU.sum(1)
    if not torch.equal(mask_NU, (torch.arange(U) < lengths_N[:, None]).long()):
        raise UserError(f"{LENGTHS} must be ones, then zeros in every row; pass the processor's own mask")
    clips = zip(features_NFU, lengths_N.tolist(), strict=True)
    return [audio.clip_of(features_FU[:, :num].T.float()) for features_FU, num in clips]


def num_tokens(kind: str, media: Media, cfg: Any) -> int:
    """A token stands for a merged block of patches, or a row of the audio tower."""
    return _num_tokens(kind, media, cfg.vision.merge_size**2)


def _num_tokens(kind: str, media: Media, merged: int) -> int:
    return audio.num_rows(media.grid[0]) if kind == "audio" else math.prod(media.grid) // merged


SIDE = DataSide(
    chat=ChatFormat(
        placeholders={kind: re.escape(pad) for kind, pad in PADS.items()},
        tokens=TOKENS,
        templates=("qwen3_omni", "qwen3_omni_thinking"),
        marks=qwen_vision.MARKS,
    ),
    sections=("image_processor", "feature_extractor"),
    processor=processor,
    facts=facts,
    input_keys=(*(key for keys in qwen_vision.INPUTS.values() for key in keys), SECONDS, SOUND, LENGTHS, COUNTS),
    media_from_hf=media_from_hf,
    num_tokens=num_tokens,
)
