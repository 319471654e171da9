"""Frames of a video: which are read, what they become, and when they are. Legend: T frames, H and W pixels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from mmfn.batch import Media
from mmfn.errors import UserError
from mmfn.models.data.pixels import ImageSpec, patchify, resize, target_size


@dataclass(frozen=True, kw_only=True)
class VideoSpec:
    """How a video becomes patches: frames per second to keep, bounds on their number, and the spec of its pixels."""

    pixels: ImageSpec
    fps: float
    min_frames: int
    max_frames: int

    def __post_init__(self) -> None:
        if type(self.fps) not in (int, float) or not 0 < self.fps < float("inf"):
            raise UserError(f"fps of a video processor must be a positive number, got {self.fps!r}; correct it")
        for name in ("min_frames", "max_frames"):
            if type(getattr(self, name)) is not int:
                raise UserError(
                    f"{name} of a video processor must be an integer, got {getattr(self, name)!r}; correct it"
                )
        if not self.pixels.temporal_patch_size <= self.min_frames <= self.max_frames:
            raise UserError(
                f"a video processor needs temporal_patch_size <= min_frames <= max_frames, got "
                f"{self.pixels.temporal_patch_size}, {self.min_frames}, {self.max_frames}; correct them"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> "VideoSpec":
        """The spec of a `video_preprocessor_config.json`.

        `defaults`: as of `ImageSpec.from_hf`, and `fps`, `min_frames`, `max_frames`. Raises ValueError as that does,
        and for options that change the frames (`num_frames`, `cap_pixels_per_frame`, `do_sample_frames: false`).
        """
        for name, neutral in (("num_frames", None), ("cap_pixels_per_frame", False), ("do_sample_frames", True)):
            if config.get(name) not in (None, neutral):
                raise UserError(f"video processor option {name!r} is {config[name]!r}, only {neutral!r} is supported")
        frames = {name: config.get(name) for name in ("fps", "min_frames", "max_frames")}
        return cls(
            pixels=ImageSpec.from_hf(config, defaults),
            **{name: defaults[name] if value is None else value for name, value in frames.items()},
        )

    def to_hf(self) -> dict[str, Any]:
        """The section that `from_hf` reads."""
        frames = {name: getattr(self, name) for name in ("fps", "min_frames", "max_frames")}
        return {**self.pixels.to_hf(), **frames}

    def with_settings(self, settings: Mapping[str, Any]) -> Self:
        """With what `ImageSpec.with_settings` takes, `fps`, `min_frames` and `max_frames`, or `nframes` for both.

        Raises ValueError for values out of range, and for `nframes` beside another setting of their number.
        """
        frames = {name: settings[name] for name in ("fps", "min_frames", "max_frames") if name in settings}
        if "nframes" in settings:
            if frames:
                raise UserError(f"nframes says how many frames are read, and so does {next(iter(frames))}; keep one")
            least = self.pixels.temporal_patch_size
            if settings["nframes"] < least:
                raise UserError(f"nframes is {settings['nframes']} but a video has at least {least} frames; raise it")
            frames = dict.fromkeys(("min_frames", "max_frames"), settings["nframes"])
        if frames.get("max_frames", self.min_frames) < self.min_frames:  # one bound alone moves the other along
            frames.setdefault("min_frames", max(frames["max_frames"], self.pixels.temporal_patch_size))
        if frames.get("min_frames", self.max_frames) > self.max_frames:
            frames.setdefault("max_frames", frames["min_frames"])
        return replace(self, pixels=self.pixels.with_settings(settings), **frames)


Spec = TypeVar("Spec", bound=VideoSpec)


def needed(spec: Spec | None) -> Spec:
    """Raise ValueError where a checkpoint has no settings of videos."""
    if spec is None:
        raise UserError("the model's folder has no video_preprocessor_config.json; add it or remove the videos")
    return spec


def preprocess_video(frames_u8: Tensor, spec: ImageSpec, size: tuple[int, int] | None = None) -> Media:
    """uint8[T, 3, H, W] -> `Media` with grid (frame groups, height, width); the last frame is repeated to fill a group.

    `size`: height and width to resize to; None: as the budget of all frames says. Raises ValueError for another shape
    or dtype, or fewer frames than temporal_patch_size. Source: Qwen3VLVideoProcessor (`cap_pixels_per_frame=False`) and
    Qwen2VLVideoProcessor of transformers 5.23.0, bit-equal.
    """
    if frames_u8.ndim != 4 or frames_u8.shape[1] != 3 or frames_u8.dtype != torch.uint8:
        raise UserError(f"a video must be uint8[T, 3, H, W], got {frames_u8.dtype} {tuple(frames_u8.shape)}")
    num_frames, group = frames_u8.shape[0], spec.temporal_patch_size
    if num_frames < group:
        raise UserError(f"a video needs at least {group} frames, got {num_frames}; pass it as images instead")
    frames_u8 = resize(frames_u8, size or target_size(frames_u8.shape[2], frames_u8.shape[3], spec, num_frames))
    return patchify(fill_group(frames_u8, group), spec)


def fill_group(frames_u8: Tensor, group: int) -> Tensor:
    """uint8[T, 3, H, W], the last frame repeated until their number is a multiple of `group`."""
    missing = -len(frames_u8) % group
    return torch.cat([frames_u8, frames_u8[-1:].expand(missing, -1, -1, -1)]) if missing else frames_u8


def sample_frames(num_frames: int, rate: float, spec: VideoSpec) -> list[int]:
    """Indices of the frames to keep of a video with `num_frames` frames at `rate` per second, evenly spread.

    >>> sample_frames(24, 8.0, VideoSpec(pixels=..., fps=2.0, min_frames=4, max_frames=768))  # 3 s: 6 frames
    [0, 5, 9, 14, 18, 23]

    Source: `Qwen3VLVideoProcessor.sample_frames` of transformers 5.23.0; equal to its rounded `numpy.linspace`.
    """
    wanted = int(num_frames / rate * spec.fps)
    wanted = min(max(wanted, spec.min_frames), spec.max_frames, num_frames)
    if wanted < 2:
        return [0] * wanted
    step = (num_frames - 1) / (wanted - 1)
    return [*(round(i * step) for i in range(wanted - 1)), num_frames - 1]  # halves go to the even neighbour


def group_times(times: Sequence[float], group: int) -> list[float]:
    """One time in seconds per group of `group` frames, the mean of its first and last; the last frame is repeated."""
    padded = [*times, *[times[-1]] * (-len(times) % group)]
    return [(padded[i] + padded[i + group - 1]) / 2 for i in range(0, len(padded), group)]
