"""Clips that tests write: any codec, rate, time stamps and rotation, and what a decoder of all their frames gives."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

TURNS = {90: (0, -1, 1, 0), 180: (-1, 0, 0, -1), 270: (0, 1, -1, 0)}  # counter-clockwise: a, b, c, d of the matrix


def write_clip(
    path: Path,
    *,
    codec: str = "libx264",
    num: int = 60,
    rate: Any = 30,
    stamps_ms: Sequence[int] = (),
    matrix: tuple[int, int, int, int] = (1, 0, 0, 1),
    size: tuple[int, int] = (64, 48),
    options: dict[str, str] | None = None,
    sound_SC: Any = None,
    sound_rate: int = 44_100,
    sound_codec: str = "",
    movflags: str = "",
) -> Path:
    """Frames of noise that moves. `stamps_ms`: when each is shown; () at a constant rate. `size`: (width, height)."""
    import av

    num = len(stamps_ms) or num
    options_of_file = {"movflags": movflags} if movflags else {}
    with scheduled_as_before(), av.open(str(path), "w", options=options_of_file) as container:
        stream = container.add_stream(codec, rate=rate, options={"g": "12", **(options or {})})
        stream.width, stream.height = size
        stream.pix_fmt = {"mjpeg": "yuvj420p", "gif": "rgb8"}.get(codec, "yuv420p")
        if stamps_ms:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if matrix != (1, 0, 0, 1):
            a, b, c, d = (x << 16 for x in matrix)
            stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        track = None
        if sound_SC is not None:
            track = container.add_stream(sound_codec, rate=sound_rate, layout=("mono", "stereo")[sound_SC.shape[1] - 1])
        ground = np.random.default_rng(num).integers(0, 256, (size[1] // 4, size[0] // 4, 3), np.uint8)
        for place in range(num):
            array = np.roll(ground, place, 1).repeat(4, 0).repeat(4, 1)
            array[: size[1] // 3, : size[0] // 4] = 4 * place % 256
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            if stamps_ms:
                frame.pts, frame.time_base = stamps_ms[place], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if track is not None:
            sound = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(sound_SC.astype(np.float32).T), "fltp", track.layout.name
            )
            sound.sample_rate, sound.pts = sound_rate, 0
            mixer = av.AudioResampler(track.format.name, track.layout.name, sound_rate, track.frame_size or 1024)
            for part in (*mixer.resample(sound), *mixer.resample(None)):
                container.mux(track.encode(part))
            container.mux(track.encode())
    return path


@contextmanager
def scheduled_as_before() -> Iterator[None]:
    """SVT-AV1's encoder has the thread that calls it run in real time, before all others, where it may."""
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def everything(path: Path) -> tuple[Tensor, list[float]]:
    """uint8[N, 3, H, W] of all frames, as they are stored, and the seconds at which each is shown, from 0."""
    import av

    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        frames_u8 = torch.from_numpy(np.stack([frame.to_ndarray(format="rgb24") for frame in frames]))
        return frames_u8.permute(0, 3, 1, 2), [float((f.pts - frames[0].pts) * f.time_base) for f in frames]
