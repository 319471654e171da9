"""Images and videos of the Qwen2.5-VL family: a video is one run of tokens, and its time is told by its positions.

Source: the processors of transformers 5.23.0. Legend: T frames, N videos.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfn.batch import Media
from mmfn.errors import UserError
from mmfn.models.data import MediaByKind, Sampling, qwen_vision
from mmfn.models.data.chat import MediaText
from mmfn.models.data.frames import VideoSpec, preprocess_video
from mmfn.models.data.pixels import ImageSpec, target_size
from mmfn.models.data.qwen_vision import IMAGE_DEFAULTS, IMAGE_PAD, VIDEO_PAD, VisionProcessor

SECONDS = "second_per_grid_ts"  # of transformers' processor: how long each step in time of a video lasts
PADS = {"image": IMAGE_PAD, "video": VIDEO_PAD}
CHAT = replace(
    qwen_vision.SIDE.chat,
    bare={},  # videos are one run of tokens between the template's marks
    templates=("qwen2_5_vl",),
    marks=replace(qwen_vision.MARKS, thinking=None),
)
VIDEO_DEFAULTS = {
    **IMAGE_DEFAULTS,
    "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768},
    "fps": 2.0,
    "min_frames": 4,
    "max_frames": 768,
}
MAX_VIDEO_TOKENS = 128_000  # of merged patches, a tenth of which is for text


@dataclass(frozen=True, kw_only=True)
class BlockProcessor(VisionProcessor):
    """A `MediaProcessor` of images, and of videos whose `video_spec` bounds the pixels of each frame.

    `max_video_tokens`: the frames of a video share the pixels of 0.9 times so many merged patches; None: no such bound.
    """

    video_spec: VideoSpec
    max_video_tokens: int | None = None

    def sampling(self) -> Sampling:
        """See `sample_groups`."""
        select = partial(sample_groups, spec=self.video_spec)
        return Sampling(fps=self.video_spec.fps, select=select, size=self.frame_size)

    def frame_size(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """A frame is as large as an image of its budget."""
        return target_size(height, width, self._frame_spec(num_frames))

    def video(
        self, frames_u8: Tensor, times: Sequence[float], rate: float, shape: tuple[int, int] | None = None
    ) -> Media:
        """See `frames.preprocess_video`; a step in time lasts as long as its frames."""
        spec = self.video_spec.pixels
        media = preprocess_video(frames_u8, spec, self._size(frames_u8, shape))
        return replace(media, seconds_per_grid=spec.temporal_patch_size / rate)

    def text(self, kind: str, media: Media) -> MediaText:
        """The placeholder token, once per feature: that of a video in one run over all of its steps in time."""
        return MediaText(text=PADS[kind], counts=(math.prod(media.grid) // self.image_spec.merge_size**2,))

    def _frame_spec(self, num_frames: int) -> ImageSpec:
        """Source: `Qwen2VLVideoProcessor.resize` (`cap_pixels_per_frame`)."""
        spec = self.video_spec.pixels
        if self.max_video_tokens is None:
            return spec
        total = int(self.max_video_tokens * (spec.patch_size * spec.merge_size) ** 2 * 0.9)
        share = total * spec.temporal_patch_size // num_frames
        return replace(spec, max_pixels=max(min(spec.max_pixels, share), int(spec.min_pixels * 1.05)))


def sample_groups(num_frames: int, rate: float, spec: VideoSpec) -> list[int]:
    """Indices of the frames to read of a video with `num_frames` frames at `rate` per second: whole groups, evenly
    spread, the first frame first.

    >>> sample_groups(24, 8.0, VideoSpec(pixels=..., fps=2.0, min_frames=4, max_frames=768))  # 3 s: 6 frames
    [0, 4, 8, 12, 16, 20]

    Raises ValueError for a video shorter than a group. Source: `Qwen2VLVideoProcessor.sample_frames`, without the
    frame more, often one behind the last, that rounding gives it now and then.
    """
    group = spec.pixels.temporal_patch_size
    most = min(spec.max_frames, num_frames) // group * group
    wanted = int(min(max(num_frames / rate * spec.fps, spec.min_frames), most) // group * group)
    if not wanted:
        raise UserError(f"a video needs at least {group} frames, got {num_frames}; pass it as images instead")
    indices: list[int] = torch.arange(0, num_frames, num_frames / wanted)[:wanted].int().tolist()
    return indices


def processor(sections: Mapping[str, Mapping[str, Any]], cfg: Any) -> BlockProcessor:
    """Of the sections `image_processor` and `video_processor`; nothing depends on `cfg`. See `specs_from_hf`."""
    return BlockProcessor(**specs_from_hf(sections, IMAGE_DEFAULTS, VIDEO_DEFAULTS))


def specs_from_hf(
    sections: Mapping[str, Mapping[str, Any]], image_defaults: Mapping[str, Any], video_defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of a `BlockProcessor`.

    Published checkpoints have no section for videos: theirs are cut and normalised as images are, within the bounds of
    `video_defaults`. Frames are sampled by `fps` whatever `do_sample_frames` says: false, which transformers writes,
    leaves it to its caller to ask for a rate.
    """
    image = sections["image_processor"]
    video = dict(sections.get("video_processor", {k: v for k, v in image.items() if k not in _PIXEL_BOUNDS}))
    video.pop("do_sample_frames", None)
    is_capped, max_tokens = video.pop("cap_pixels_per_frame", None), video.pop("max_video_tokens", MAX_VIDEO_TOKENS)
    return {
        "image_spec": ImageSpec.from_hf(image, image_defaults),
        "video_spec": VideoSpec.from_hf(video, video_defaults),
        "max_video_tokens": max_tokens if is_capped else None,
    }


_PIXEL_BOUNDS = ("size", "min_pixels", "max_pixels")


def media_from_hf(inputs: Mapping[str, Tensor], cfg: Any, *, seconds: str = SECONDS) -> MediaByKind:
    """Images and videos of `qwen_vision.INPUTS`; without the key `seconds` every step in time lasts one, as in
    transformers."""
    media = qwen_vision.media_from_hf(inputs, cfg)
    videos = media["video"]
    seconds_N = inputs.get(seconds, torch.ones(len(videos)))
    if list(seconds_N.shape) != [len(videos)] or not bool(((seconds_N > 0) & (seconds_N < torch.inf)).all()):
        raise UserError(
            f"{seconds} is {seconds_N.tolist()} but must be a positive number of seconds for each of the {len(videos)} "
            "videos; pass the processor's own result"
        )
    timed = [replace(video, seconds_per_grid=s) for video, s in zip(videos, seconds_N.tolist(), strict=True)]
    return {**media, "video": timed}


SIDE = replace(
    qwen_vision.SIDE,
    chat=CHAT,
    processor=processor,
    input_keys=(*qwen_vision.SIDE.input_keys, SECONDS),
    media_from_hf=media_from_hf,
)
