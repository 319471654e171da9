"""Images, videos and sound of Qwen3-Omni. Source: `Qwen3OmniMoeProcessor` and its parts in transformers 5.23.0."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmfn.batch import Media
from mmfn.errors import UserError
from mmfn.models.data import DataSide, Fact, MediaByKind, qwen_vision
from mmfn.models.data.chat import ChatFormat, MediaText, TextsByKind
from mmfn.models.data.frames import VideoSpec
from mmfn.models.data.inputs import integers, pair
from mmfn.models.data.mel import SoundSpec, log_mel
from mmfn.models.data.pixels import ImageSpec
from mmfn.models.data.qwen_vision import IMAGE_PAD, VIDEO_PAD, VisionProcessor
from mmfn.models.layers import audio

AUDIO_PAD = "<|audio_pad|>"
PLACEHOLDERS = {kind: re.escape(pad) for kind, pad in (("image", IMAGE_PAD), ("video", VIDEO_PAD), ("audio", AUDIO_PAD))}
TOKENS = {
    "image_token_id": IMAGE_PAD,
    "video_token_id": VIDEO_PAD,
    "audio_token_id": AUDIO_PAD,
}
SOUND, LENGTHS, SECONDS = "input_features", "feature_attention_mask", "video_second_per_grid"
UNUSED = ("num_audio_tokens",)  # what the processor returns besides, and mmfn counts itself
SOUND_DEFAULTS = {"feature_size": 128, "sampling_rate": 16_000, "hop_length": 160, "n_fft": 400}
IMAGE_DEFAULTS = {
    **qwen_vision.IMAGE_DEFAULTS,
    "patch_size": 16,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}


@dataclass(frozen=True, kw_only=True)
class OmniProcessor(VisionProcessor):
    """A `MediaProcessor` of images, videos and sound."""

    sound_spec: SoundSpec

    def video(self, frames_u8: Tensor, times: Sequence[float]) -> Media:
        """See `frames.preprocess_video`; a step in time lasts as long as its frames, of which the sampled ones count.

        transformers' processor takes the argument `fps` for their rate, 1.0 where there is none.
        """
        medium = super().video(frames_u8, times)
        apart = (times[-1] - times[0]) / (len(times) - 1)
        return replace(medium, times=(), seconds_per_grid=apart * self.image_spec.temporal_patch_size)

    def audio(self, wave_S: Tensor, rate: int) -> Media:
        """See `mel.log_mel`."""
        if rate != self.sound_spec.rate:
            raise UserError(f"sound at {rate} Hz is not resampled yet; convert it to {self.sound_spec.rate} Hz")
        return audio.clip_of(log_mel(wave_S, self.sound_spec))

    def texts(self, media: MediaByKind) -> TextsByKind:
        """A medium is its placeholder, once for every feature: the marks around it are the template's."""
        pads = {"image": IMAGE_PAD, "video": VIDEO_PAD, "audio": AUDIO_PAD}
        merged = self.image_spec.merge_size**2
        return {
            kind: [MediaText(text=pads[kind], counts=(_num_tokens(kind, one, merged),)) for one in items]
            for kind, items in media.items()
        }


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
    num, done, text, counts = audio.num_rows(clip.grid[0]), 0, "", []
    for step in range(steps):
        before = min(num, math.ceil(step * video.seconds_per_grid * per_second))  # sound that starts before the step
        for pad, count in ((AUDIO_PAD, before - done), (VIDEO_PAD, cells)):
            if count > 0:
                text, counts = text + pad, [*counts, count]
        done = max(done, before)
    if num > done:
        text, counts = text + AUDIO_PAD, [*counts, num - done]
    return MediaText(text=f"<|audio_start|>{text}<|audio_end|>", counts=tuple(counts))


def processor(sections: Mapping[str, Mapping[str, Any]], cfg: Any) -> OmniProcessor:
    """Of the sections `image_processor`, `feature_extractor` (in older files one and the same) and, where there is one,
    `video_processor`; nothing depends on `cfg`."""
    video = sections.get("video_processor")
    return OmniProcessor(
        image_spec=ImageSpec.from_hf(sections["image_processor"], IMAGE_DEFAULTS),
        video_spec=None if video is None else VideoSpec.from_hf(video, qwen_vision.VIDEO_DEFAULTS),
        sound_spec=SoundSpec.from_hf(sections["feature_extractor"], SOUND_DEFAULTS),
    )


def facts(cfg: Any, processor: OmniProcessor) -> list[Fact]:
    """`cfg`: a config with `vision` and `audio`."""
    mels = Fact(name="num_mel_bins", config=cfg.audio.num_mels, processor=processor.sound_spec.num_mels)
    return [*qwen_vision.facts(cfg, processor), mels]


def media_from_hf(inputs: Mapping[str, Tensor], cfg: Any) -> MediaByKind:
    """Images, videos with the `SECONDS` that a step in time lasts (the processor's own figure: see `OmniProcessor`),
    and clips."""
    seen = qwen_vision.media_from_hf(inputs, cfg)
    seconds = inputs.get(SECONDS)
    if len(seen["video"]) != (0 if seconds is None else seconds.numel()):
        raise UserError(f"{SECONDS} must hold one number for each of the {len(seen['video'])} videos; pass it too")
    lasting = [] if seconds is None else seconds.flatten().tolist()
    videos = [replace(m, seconds_per_grid=float(s)) for m, s in zip(seen["video"], lasting, strict=True)]
    return {**seen, "video": videos, "audio": _clips(inputs, cfg.audio.num_mels)}


def _clips(inputs: Mapping[str, Tensor], num_mels: int) -> list[Media]:
    both = pair(inputs, SOUND, LENGTHS)
    if both is None:
        return []
    features_NFU, mask_NU = both[0], integers(LENGTHS, both[1])
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


DATA = DataSide(
    chat=ChatFormat(placeholders=PLACEHOLDERS, tokens=TOKENS, templates=("qwen3_vl",)),
    sections=("image_processor", "feature_extractor"),
    processor=processor,
    facts=facts,
    input_keys=(*(key for keys in qwen_vision.INPUTS.values() for key in keys), SOUND, LENGTHS, SECONDS, *UNUSED),
    media_from_hf=media_from_hf,
    num_tokens=num_tokens,
)
