"""Video files, decoded: with PyAV, an optional dependency, or frame by frame from images. Legend: T frames."""

import importlib
from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfn.errors import UserError
from mmfn.models.data import Sampling
from mmfn.train.data.image import decode_image
from mmfn.train.limits import LIMITS, Limits, check_regular

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,flv,asf,ogg,gif,aac"  # FFmpeg's names


def decode_video(source: str | PathLike[str], sampling: Sampling) -> tuple[Tensor, list[float], float]:
    """A video file -> (sampled frames uint8[T, 3, H, W], their times in seconds, their number per second of the file).

    Raises ValueError naming the file when PyAV is missing, or the file is missing or no video.
    Source: `load_video(backend="pyav")` of transformers 5.23.0.
    """
    try:
        av = importlib.import_module("av")
    except ImportError as error:
        raise UserError(
            f"video {str(source)!r} needs PyAV to be decoded; install it (pip install av) or give the video as a list "
            "of frame images"
        ) from error
    try:
        check_regular(source)
        with open_container(av, source) as container:
            stream = container.streams.video[0]
            arrays, total = _decode_frames(container, stream, sampling)
            rate = float(stream.average_rate)
    except Exception as error:  # PyAV raises its own FFmpeg errors, IndexError without a video stream, and others
        raise UserError(f"video {str(source)!r} could not be decoded ({error}); replace the file") from error
    frames = torch.from_numpy(np.stack([array for _, array in arrays])).permute(0, 3, 1, 2)
    return frames, [index / rate for index, _ in arrays], len(arrays) / total * rate


def open_container(av: Any, source: str | PathLike[str]) -> Any:
    """A file opened by PyAV (`av`), if it holds its media itself: a playlist (HLS, concat, ...) under the name of a
    video would have FFmpeg read any other file, outside the media root too."""
    return av.open(f"file:{source}", options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"})


def decode_frames(
    sources: Sequence[str | PathLike[str] | bytes], fps: float, limits: Limits = LIMITS
) -> tuple[Tensor, list[float]]:
    """Frame images, already sampled at `fps` -> (uint8[T, 3, H, W], their times in seconds).

    Raises ValueError when a frame does not decode or frames differ in size.
    """
    frames = [decode_image(source, limits) for source in sources]
    shapes = sorted({tuple(frame.shape[1:]) for frame in frames})
    if len(shapes) > 1:
        raise UserError(f"the frames of a video must have one size, got {shapes} (height, width); resize them")
    return torch.stack(frames), [i / fps for i in range(len(frames))]


def _decode_frames(container: Any, stream: Any, sampling: Sampling) -> tuple[list[tuple[int, Any]], int]:
    """`([(index, frame)], frames of the file)`."""
    total = stream.frames
    if total == 0:  # containers without an index do not know their length: decode once to count
        total = sum(1 for _ in container.decode(video=0))
        container.seek(0)
    wanted = set(sampling.select(total, float(stream.average_rate)))
    kept = []
    for index, frame in enumerate(container.decode(video=0)):
        if index in wanted:
            kept.append((index, frame.to_ndarray(format="rgb24")))
        if index >= max(wanted):
            break
    return kept, total
