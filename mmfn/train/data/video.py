"""Videos: choosing and decoding frames, resizing and patches.

A video arrives as a file (decoded with PyAV, an optional dependency) or as a list of frame images. Legend: T frames.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfn.batch import Media
from mmfn.train.data.image import ImageSpec, check_regular, decode_image, normalize, patchify, resize, target_size


@dataclass(frozen=True, kw_only=True)
class VideoSpec:
    """How a video becomes patches: frames per second to keep, bounds on their number, and the spec of its pixels."""

    pixels: ImageSpec
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768

    def __post_init__(self) -> None:
        if type(self.fps) not in (int, float) or not 0 < self.fps < float("inf"):
            raise ValueError(f"fps of a video processor must be a positive number, got {self.fps!r}")
        for name in ("min_frames", "max_frames"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} of a video processor must be an integer, got {getattr(self, name)!r}")
        if not self.pixels.temporal_patch_size <= self.min_frames <= self.max_frames:
            raise ValueError(
                f"a video processor needs temporal_patch_size <= min_frames <= max_frames, got "
                f"{self.pixels.temporal_patch_size}, {self.min_frames}, {self.max_frames}"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "VideoSpec":
        """The spec of a `video_preprocessor_config.json`, with the defaults of the Qwen3-VL video processor.

        Raises ValueError as `ImageSpec.from_hf` does, and for options that change the frames (`num_frames`,
        `cap_pixels_per_frame`, `do_sample_frames: false`).
        """
        for name, neutral in (("num_frames", None), ("cap_pixels_per_frame", False), ("do_sample_frames", True)):
            if config.get(name) not in (None, neutral):
                raise ValueError(f"video processor option {name!r} is {config[name]!r}, only {neutral!r} is supported")
        half = (0.5, 0.5, 0.5)
        size = config.get("size") or {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768}
        defaults = {"patch_size": 16, "image_mean": half, "image_std": half}
        return cls(
            pixels=ImageSpec.from_hf({**defaults, **config, "size": size}),
            **{name: config[name] for name in ("fps", "min_frames", "max_frames") if config.get(name) is not None},
        )


def preprocess_video(frames_u8: Tensor, spec: ImageSpec) -> Media:
    """uint8[T, 3, H, W] -> `Media` with grid (frame groups, height, width); the last frame is repeated to fill a group.

    Raises ValueError for another shape or dtype, or fewer frames than temporal_patch_size.
    Source: Qwen3VLVideoProcessor of transformers 5.23.0 (`cap_pixels_per_frame=False`), bit-equal.
    """
    if frames_u8.ndim != 4 or frames_u8.shape[1] != 3 or frames_u8.dtype != torch.uint8:
        raise ValueError(f"a video must be uint8[T, 3, H, W], got {frames_u8.dtype} {tuple(frames_u8.shape)}")
    num_frames, group = frames_u8.shape[0], spec.temporal_patch_size
    if num_frames < group:
        raise ValueError(f"a video needs at least {group} frames, got {num_frames}; pass it as images instead")
    size = target_size(frames_u8.shape[2], frames_u8.shape[3], spec, num_frames)
    frames = normalize(resize(frames_u8, size), spec)
    return patchify(torch.cat([frames, frames[-1:].expand(-num_frames % group, -1, -1, -1)]), spec)


def decode_video(source: str | PathLike[str], spec: VideoSpec) -> tuple[Tensor, list[float]]:
    """A video file -> (sampled frames uint8[T, 3, H, W], their times in seconds).

    Raises ValueError naming the file when PyAV is missing, or the file is missing or no video.
    Source: `load_video(backend="pyav")` and `Qwen3VLVideoProcessor.sample_frames` of transformers 5.23.0.
    """
    try:
        av = importlib.import_module("av")
    except ImportError as error:
        raise ValueError(
            f"video {str(source)!r} needs PyAV to be decoded; install it (pip install av) or give the video as a list "
            "of frame images"
        ) from error
    try:
        check_regular(source)
        with av.open(str(source)) as container:
            stream = container.streams.video[0]
            arrays = _decode_frames(container, stream, spec)
            rate = float(stream.average_rate)
    except Exception as error:  # PyAV raises its own FFmpeg errors, IndexError without a video stream, and others
        raise ValueError(f"video {str(source)!r} could not be decoded ({error}); replace the file") from error
    frames = torch.from_numpy(np.stack([array for _, array in arrays])).permute(0, 3, 1, 2)
    return frames, [index / rate for index, _ in arrays]


def decode_frames(sources: Sequence[str | PathLike[str] | bytes], spec: VideoSpec) -> tuple[Tensor, list[float]]:
    """Frame images, already sampled at `spec.fps` -> (uint8[T, 3, H, W], their times in seconds).

    Raises ValueError when a frame does not decode or frames differ in size.
    """
    frames = [decode_image(source) for source in sources]
    shapes = sorted({tuple(frame.shape[1:]) for frame in frames})
    if len(shapes) > 1:
        raise ValueError(f"the frames of a video must have one size, got {shapes} (height, width); resize them")
    return torch.stack(frames), [i / spec.fps for i in range(len(frames))]


def sample_frames(num_frames: int, rate: float, spec: VideoSpec) -> list[int]:
    """Indices of the frames to keep of a video with `num_frames` frames at `rate` per second, evenly spread."""
    wanted = int(num_frames / rate * spec.fps)
    wanted = min(max(wanted, spec.min_frames), spec.max_frames, num_frames)
    indices: list[int] = np.linspace(0, num_frames - 1, wanted).round().astype(int).tolist()
    return indices


def group_times(times: Sequence[float], group: int) -> list[float]:
    """One time in seconds per group of `group` frames, the mean of its first and last; the last frame is repeated."""
    padded = [*times, *[times[-1]] * (-len(times) % group)]
    return [(padded[i] + padded[i + group - 1]) / 2 for i in range(0, len(padded), group)]


def _decode_frames(container: Any, stream: Any, spec: VideoSpec) -> list[tuple[int, Any]]:
    total = stream.frames
    if total == 0:  # containers without an index do not know their length: decode once to count
        total = sum(1 for _ in container.decode(video=0))
        container.seek(0)
    wanted = set(sample_frames(total, float(stream.average_rate), spec))
    kept = []
    for index, frame in enumerate(container.decode(video=0)):
        if index in wanted:
            kept.append((index, frame.to_ndarray(format="rgb24")))
        if index >= max(wanted):
            break
    return kept
