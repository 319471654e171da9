"""Images and timed videos of the GLM-4.5V family. Source: the processors `glm4v` of transformers 5.23.0.

A pixel budget counts an image as a video of one group of frames. Every group of frames of a video is written as an
image, by the image's token, and behind it the whole second at which it begins.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

from torch import Tensor

from mmfn.batch import Media
from mmfn.errors import UserError
from mmfn.models.data import Sampling, Settings, qwen_vision
from mmfn.models.data.chat import ChatFormat, Marks, MediaText
from mmfn.models.data.frames import VideoSpec, fill_group, needed, preprocess_video
from mmfn.models.data.pixels import ImageSpec, preprocess_image
from mmfn.models.data.qwen_vision import VisionProcessor

IMAGE_TOKEN, VIDEO_TOKEN = "<|image|>", "<|video|>"
IMAGE_START, IMAGE_END = "<|begin_of_image|>", "<|end_of_image|>"
VIDEO_START, VIDEO_END = "<|begin_of_video|>", "<|end_of_video|>"
PLACEHOLDERS = {
    "image": re.escape(IMAGE_TOKEN),
    # with its marks, without which its frames would be taken for images: they are written anew
    "video": f"(?:{re.escape(VIDEO_START)})?{re.escape(VIDEO_TOKEN)}(?:{re.escape(VIDEO_END)})?",
}
TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": VIDEO_TOKEN,
    "image_start_token_id": IMAGE_START,
    "image_end_token_id": IMAGE_END,
    "video_start_token_id": VIDEO_START,
    "video_end_token_id": VIDEO_END,
}
# An answer ends with the role of the turn behind it.
MARKS = Marks(
    header="<|assistant|>\n",
    end=r"<\|user\|>|<\|observation\|>",
    tokens=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    stops=("<|endoftext|>", "<|user|>", "<|observation|>"),
    closing=("<|user|>", "<|observation|>"),
    thinking=("<think>", "</think>"),
)
_PIXELS = {
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
IMAGE_DEFAULTS = {**_PIXELS, "size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 15_000}}
UNBOUNDED = 2**31 - 1  # frames
VIDEO_DEFAULTS = {
    **_PIXELS,
    "size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 2 * 30_000},
    "fps": 2.0,
    "max_duration": 300,
}


@dataclass(frozen=True, kw_only=True)
class TimedVideoSpec(VideoSpec):
    """`max_duration`: seconds, at the longest, of a video that is read at `fps`; of a longer one as many frames."""

    max_duration: int

    def to_hf(self) -> dict[str, Any]:
        """The section that `video_spec_from_hf` reads."""
        section = {**super().to_hf(), "max_duration": self.max_duration}
        without = ("min_frames", *(() if self.max_frames < UNBOUNDED else ("max_frames",)))
        return {key: value for key, value in section.items() if key not in without}


@dataclass(frozen=True, kw_only=True)
class GlmProcessor(VisionProcessor):
    """A `MediaProcessor` of images and videos."""

    video_spec: TimedVideoSpec | None = None

    def image(self, image_u8: Tensor) -> Media:
        """See `pixels.preprocess_image`."""
        return preprocess_image(image_u8, self.image_spec, self.image_spec.temporal_patch_size)

    def sampling(self) -> Sampling:
        """See `sample_frames`."""
        spec = needed(self.video_spec)
        return Sampling(fps=spec.fps, select=partial(sample_frames, spec=spec), size=self.frame_size)

    def with_settings(self, kind: str, settings: Settings) -> Self:
        """See `VisionProcessor.with_settings`."""
        for name in ("nframes", "min_frames"):
            if kind == "video" and name in settings:
                raise UserError(f"{name} means nothing to GLM, which reads a frame every 1 / fps seconds; set fps")
        return super().with_settings(kind, settings)

    def frame_size(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """An odd number of frames becomes even before the budget counts them."""
        return super().frame_size(num_frames + num_frames % 2, height, width)

    def video(
        self, frames_u8: Tensor, times: Sequence[float], rate: float, shape: tuple[int, int] | None = None
    ) -> Media:
        """See `frames.preprocess_video`; a group of frames has the time of its first."""
        spec, size = needed(self.video_spec).pixels, self._size(frames_u8, shape)
        media = preprocess_video(fill_group(frames_u8, 2), spec, size)
        return replace(media, times=tuple(times[:: spec.temporal_patch_size]))

    def text(self, kind: str, media: Media) -> MediaText:
        """See `image_text` and `video_text`."""
        return {"image": image_text, "video": video_text}[kind](media, self.image_spec.merge_size)


def sample_frames(num_frames: int, rate: float, spec: TimedVideoSpec) -> list[int]:
    """Indices of the frames to keep of a video with `num_frames` frames at `rate` per second.

    Every `1 / fps` seconds the next frame; of a video longer than `max_duration` as many frames as one of that length
    gives, evenly spread, its end included. At 8 frames per second and `fps` 2, 12 frames give [0, 4, 8]. Where that is
    more than `max_frames`, so many, both ends included.

    Source: `Glm4vVideoProcessor.sample_frames` of transformers 5.23.0, which repeats the last index of an odd number.
    """
    duration, last = num_frames / rate, num_frames - 1
    if duration <= spec.max_duration:
        wanted = [i * rate / spec.fps for i in range(max(1, math.floor(duration * spec.fps)))]
    elif (number := int(spec.max_duration * spec.fps)) >= num_frames:
        return list(range(num_frames))
    else:
        step = duration / max(1, number - 1)
        wanted = [*(i * step * rate for i in range(number - 1)), duration * rate]
    if len(wanted) > spec.max_frames:
        wanted = [i * last / (spec.max_frames - 1) for i in range(spec.max_frames)]
    return list(dict.fromkeys(min(last, math.ceil(place)) for place in wanted))


def image_text(media: Media, merge_size: int) -> MediaText:
    """The placeholder token, once per feature; the marks around it are the template's."""
    return MediaText(text=IMAGE_TOKEN, counts=(math.prod(media.grid) // merge_size**2,))


def video_text(media: Media, merge_size: int) -> MediaText:
    """Each group of frames between the marks of an image, its time in whole seconds behind it."""
    groups = [f"{IMAGE_START}{IMAGE_TOKEN}{IMAGE_END}{int(time)}" for time in media.times]
    count = math.prod(media.grid[1:]) // merge_size**2
    return MediaText(text="".join([VIDEO_START, *groups, VIDEO_END]), counts=(count,) * len(groups))


def processor(sections: Mapping[str, Mapping[str, Any]], cfg: Any) -> GlmProcessor:
    """Of the sections `image_processor` and, where there is one, `video_processor`; nothing depends on `cfg`."""
    video = sections.get("video_processor")
    return GlmProcessor(
        image_spec=ImageSpec.from_hf(sections["image_processor"], IMAGE_DEFAULTS),
        video_spec=None if video is None else video_spec_from_hf(video),
    )


def video_spec_from_hf(config: Mapping[str, Any]) -> TimedVideoSpec:
    """The spec of a `video_preprocessor_config.json`. `num_frames` and `max_image_size` are there, and mean nothing;
    `max_frames` is there where mmfn wrote it.

    Raises ValueError as `VideoSpec.from_hf` does, and for a `max_duration` that is no number of seconds.
    """
    config = {key: value for key, value in config.items() if key not in ("num_frames", "max_image_size")}
    seconds = config.get("max_duration", VIDEO_DEFAULTS["max_duration"])
    if not isinstance(seconds, int) or isinstance(seconds, bool) or seconds < 1:
        raise UserError(f"max_duration of a video processor must be a positive integer, got {seconds!r}")
    bounds = {
        "min_frames": config.get("temporal_patch_size", _PIXELS["temporal_patch_size"]),
        "max_frames": config.get("max_frames", UNBOUNDED),
    }
    spec = VideoSpec.from_hf({**config, **bounds}, VIDEO_DEFAULTS)
    return TimedVideoSpec(**{name: getattr(spec, name) for name in ("pixels", "fps", *bounds)}, max_duration=seconds)


SIDE = replace(
    qwen_vision.SIDE,
    chat=ChatFormat(placeholders=PLACEHOLDERS, tokens=TOKENS, templates=("glm4v_moe",), marks=MARKS),
    processor=processor,
)
