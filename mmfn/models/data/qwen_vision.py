"""Images and timed videos of the Qwen3-VL families. Source: the processors of transformers 5.23.0."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

from torch import Tensor

from mmfn.batch import Media
from mmfn.errors import UserError
from mmfn.models.data import DataSide, Fact, MediaByKind, Sampling, Settings
from mmfn.models.data.chat import ChatFormat, Marks, MediaText, TextsByKind
from mmfn.models.data.frames import VideoSpec, group_times, needed, preprocess_video, sample_frames
from mmfn.models.data.inputs import grids_from_hf
from mmfn.models.data.pixels import CHANNELS, ImageSpec, preprocess_image, target_size

IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
PLACEHOLDERS = {"image": re.escape(IMAGE_PAD), "video": re.escape(VIDEO_PAD)}
# Every group of frames of a video has marks of its own. Since 5.10 transformers keeps those of the template around all
# of them too; 4.57, with which the models were published, replaced them.
BARE = {"video": f"(?:{re.escape(VISION_START)})?{re.escape(VIDEO_PAD)}(?:{re.escape(VISION_END)})?"}
MARKS = Marks(
    header="<|im_start|>assistant\n",
    end=r"<\|im_end\|>\n?",
    tokens=("<|im_start|>", "<|im_end|>"),
    stops=("<|im_end|>", "<|endoftext|>"),
    thinking=("<think>", "</think>"),
)
TOKENS = {
    "image_token_id": IMAGE_PAD,
    "video_token_id": VIDEO_PAD,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
INPUTS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
IMAGE_DEFAULTS = {
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
VIDEO_DEFAULTS = {
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
    "fps": 2.0,
    "min_frames": 4,
    "max_frames": 768,
}


@dataclass(frozen=True, kw_only=True)
class VisionProcessor:
    """A `MediaProcessor` of images and videos. `video_spec` is None for a checkpoint without a video processor."""

    image_spec: ImageSpec
    video_spec: VideoSpec | None = None

    def __post_init__(self) -> None:
        if self.video_spec is not None:
            check_same_patches(self.image_spec, self.video_spec.pixels)

    def image(self, image_u8: Tensor) -> Media:
        """See `pixels.preprocess_image`."""
        return preprocess_image(image_u8, self.image_spec)

    def with_settings(self, kind: str, settings: Settings) -> Self:
        """See `ImageSpec.with_settings` and `VideoSpec.with_settings`."""
        if kind == "image":
            return replace(self, image_spec=self.image_spec.with_settings(settings))
        return replace(self, video_spec=needed(self.video_spec).with_settings(settings))

    def sections(self) -> Mapping[str, Mapping[str, Any]]:
        """See `ImageSpec.to_hf` and `VideoSpec.to_hf`."""
        video = {} if self.video_spec is None else {"video_processor": self.video_spec.to_hf()}
        return {"image_processor": self.image_spec.to_hf(), **video}

    def sampling(self) -> Sampling:
        """See `frames.sample_frames`."""
        spec = needed(self.video_spec)
        return Sampling(fps=spec.fps, select=partial(sample_frames, spec=spec), size=self.frame_size)

    def frame_size(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """Of all frames together the budget says how large they are."""
        return target_size(height, width, needed(self.video_spec).pixels, num_frames)

    def video(
        self, frames_u8: Tensor, times: Sequence[float], rate: float, shape: tuple[int, int] | None = None
    ) -> Media:
        """See `frames.preprocess_video`; a group of frames has the time that lies between its first and last."""
        spec = needed(self.video_spec).pixels
        groups = group_times(times, spec.temporal_patch_size)
        return replace(preprocess_video(frames_u8, spec, self._size(frames_u8, shape)), times=tuple(groups))

    def _size(self, frames_u8: Tensor, shape: tuple[int, int] | None) -> tuple[int, int] | None:
        """What `frames_u8` are resized to; None: they are no frames, which `preprocess_video` says."""
        return self.frame_size(len(frames_u8), *(shape or frames_u8.shape[2:])) if frames_u8.ndim == 4 else None

    def sound_rate(self) -> int:
        """Such a model hears nothing."""
        raise UserError("the model takes no sound; remove it from the sample")

    def audio(self, wave_S: Tensor) -> Media:
        """Raises as `sound_rate` does."""
        raise UserError(f"the model takes no sound, got {wave_S.numel()} samples; remove them")

    def texts(self, media: MediaByKind) -> TextsByKind:
        """See `text`."""
        return {kind: [self.text(kind, one) for one in items] for kind, items in media.items()}

    def text(self, kind: str, media: Media) -> MediaText:
        """See `image_text` and `video_text`."""
        return {"image": image_text, "video": video_text}[kind](media, self.image_spec.merge_size)


def check_same_patches(image: ImageSpec, video: ImageSpec) -> None:
    """Raise ValueError where images and videos are cut otherwise."""
    for name in ("patch_size", "temporal_patch_size", "merge_size"):
        if getattr(image, name) != getattr(video, name):
            raise UserError(
                f"{name} is {getattr(image, name)} for images but {getattr(video, name)} for videos; one vision tower "
                "needs one value"
            )


def image_text(media: Media, merge_size: int) -> MediaText:
    """The placeholder token, once per feature."""
    return MediaText(text=IMAGE_PAD, counts=(math.prod(media.grid) // merge_size**2,))


def video_text(media: Media, merge_size: int) -> MediaText:
    """Each group of frames behind its time, between marks of its own."""
    groups = [f"<{time:.1f} seconds>{VISION_START}{VIDEO_PAD}{VISION_END}" for time in media.times]
    count = math.prod(media.grid[1:]) // merge_size**2
    return MediaText(text="".join(groups), counts=(count,) * len(groups))


def processor(sections: Mapping[str, Mapping[str, Any]], cfg: Any) -> VisionProcessor:
    """Of the sections `image_processor` and, where there is one, `video_processor`; nothing depends on `cfg`."""
    video = sections.get("video_processor")
    return VisionProcessor(
        image_spec=ImageSpec.from_hf(sections["image_processor"], IMAGE_DEFAULTS),
        video_spec=None if video is None else VideoSpec.from_hf(video, VIDEO_DEFAULTS),
    )


def facts(cfg: Any, processor: VisionProcessor) -> list[Fact]:
    """`cfg`: a config with `vision`, a `layers.vision.VisionConfig`."""
    names = ("patch_size", "temporal_patch_size", "merge_size")
    sizes = [Fact(name=n, config=getattr(cfg.vision, n), processor=getattr(processor.image_spec, n)) for n in names]
    channels = Fact(
        name="in_channels",
        config=cfg.vision.num_channels,
        processor=CHANNELS,
        source="every decoded image",
        remedy=f"use a model for {CHANNELS} channels",
    )
    return [*sizes, channels]


def media_from_hf(inputs: Mapping[str, Tensor], cfg: Any) -> MediaByKind:
    """Images and videos of `INPUTS`; videos without times, which stand in the text."""
    sizes = {"merge_size": cfg.vision.merge_size, "num_values": cfg.vision.patch_values}
    return {kind: grids_from_hf(inputs, *keys, **sizes) for kind, keys in INPUTS.items()}


def num_tokens(kind: str, media: Media, cfg: Any) -> int:
    """A token stands for a merged block of patches."""
    return math.prod(media.grid) // int(cfg.vision.merge_size**2)


SIDE = DataSide(
    chat=ChatFormat(
        placeholders=PLACEHOLDERS,
        bare=BARE,
        tokens=TOKENS,
        templates=("qwen3_vl", "qwen3_vl_thinking"),
        marks=MARKS,
    ),
    sections=("image_processor",),
    processor=processor,
    facts=facts,
    input_keys=tuple(key for keys in INPUTS.values() for key in keys),
    media_from_hf=media_from_hf,
    num_tokens=num_tokens,
)
