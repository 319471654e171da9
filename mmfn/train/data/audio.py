"""Sound files and the sound tracks of videos, decoded, mixed to one channel and resampled to the rate of a model.

What a model makes of the samples is its family's (`mmfn.models.data`). Legend: S samples, C channels.
"""

import importlib
import re
from collections.abc import Iterable
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import soxr
import torch
from torch import Tensor

from mmfn.errors import UserError
from mmfn.train.data.video import open_container
from mmfn.train.limits import LIMITS, Limits, check_regular

UNKNOWN_FORMAT = 1  # libsndfile's code of this error
UNKNOWN_LENGTH = 2**62  # libsndfile gives 2**63 - 1 samples to a stream that does not say
STREAMED_BYTES = 2**31 - 2**16  # so many or more are what programs write that do not know a length yet
MP3_PADDING = 2 * 1152  # samples: without a header the length of an MP3 file is that of its frames
IN_TURN = 7  # channels that NumPy sums one after the other
FULL = 2.0**15  # the value of 16 bits that is 1
Array = npt.NDArray[np.float32]


def decode_audio(source: str | PathLike[str], rate: int, limits: Limits = LIMITS) -> Tensor:
    """A sound file, or a video's first sound track -> float32[S], the mean of its channels, at `rate` per second.

    Files are read by libsndfile (WAV of all widths, FLAC, Ogg, Opus, MP3, AIFF, ...), and those it does not know (MP4,
    WebM, M4A, ...) by PyAV, an optional dependency. Channels are mixed, then resampled by soxr (HQ); S is rounded up.
    Raises ValueError naming the file when it is missing, broken, cut off, empty, or beyond a limit.

    Source: `load_audio(backend="soundfile")` of transformers 5.23 and `librosa.load`, equal to the last bit; of videos
    the models' own reader, librosa through FFmpeg, which rounds samples to 16 bits first.
    """
    try:
        check_regular(source)
        wave_SC, source_rate = _read(source, limits)
        if len(wave_SC) == 0:
            raise UserError("it holds no samples")
        wave_S = _resample(_mix(wave_SC), source_rate, rate)
    except Exception as error:  # libsndfile, soxr and PyAV have errors of their own
        reason = getattr(error, "error_string", error)
        raise UserError(
            f"sound {str(source)!r} could not be decoded ({reason}); replace the file or remove its sample"
        ) from error
    return torch.from_numpy(np.ascontiguousarray(wave_S))


def _mix(wave_SC: Array) -> Array:
    """The bits of `wave_SC.T.mean(axis=0)`, which walks memory in steps; only from 8 channels on it adds in pairs."""
    wave_CS = wave_SC.T if wave_SC.shape[1] > IN_TURN else np.ascontiguousarray(wave_SC.T)
    mean_S: Array = wave_CS.mean(axis=0)
    return mean_S


def _resample(wave_S: Array, source_rate: int, rate: int) -> Array:
    if source_rate == rate:
        return wave_S
    num = -(-len(wave_S) * rate // source_rate)
    resampled: Array = soxr.resample(wave_S, source_rate, rate, quality="HQ")  # rounds the length either way
    return np.pad(resampled, (0, max(0, num - len(resampled))))[:num]


def _read(source: str | PathLike[str], limits: Limits) -> tuple[Array, int]:
    """`(float32[S, C], samples per second)`."""
    try:
        file = soundfile.SoundFile(source)
    except soundfile.LibsndfileError as error:
        if error.code != UNKNOWN_FORMAT:
            raise
        return _read_track(source, limits)
    with file:
        return _read_file(file, limits), file.samplerate


def _read_file(file: Any, limits: Limits) -> Array:
    """All at once: a decoder of MP3 that is read in pieces starts each of them anew, with other samples."""
    num = file.frames
    if num >= UNKNOWN_LENGTH:
        raise UserError("it does not say how long it is: write it anew with ffmpeg")
    limits.check_sound(num, file.samplerate, file.channels)
    _check_bytes(file.extra_info)
    wave_SC: Array = file.read(dtype="float32", always_2d=True)
    if len(wave_SC) < num - (MP3_PADDING if file.format == "MP3" else 0):
        fix = "; if it plays to its end, let ffmpeg -c copy write its length" if file.format == "MP3" else ""
        raise UserError(f"it is cut off: it says {num} samples and has {len(wave_SC)}{fix}")
    return wave_SC


def _check_bytes(info: str) -> None:
    """Raise ValueError where libsndfile noted (nothing but its log tells) that WAV or AIFF data ends early."""
    for says, has in re.findall(r"^ *(?:data|SSND) : (\d+) \(should be (\d+)\)", info, re.MULTILINE):
        if int(has) < int(says) < STREAMED_BYTES:
            raise UserError(f"it is cut off: it says {says} bytes of sound and has {has}")


def _read_track(source: str | PathLike[str], limits: Limits) -> tuple[Array, int]:
    """`(float32[S, C], samples per second)` of the first sound track."""
    try:
        av = importlib.import_module("av")
    except ImportError:
        raise UserError(
            "libsndfile does not know its format, and PyAV, which reads the sound of videos, is missing: pip install av"
        ) from None
    try:
        container = open_container(av, source)
    except av.FFmpegError:
        raise UserError("it is neither a sound file nor a video of a known format") from None
    with container:
        if not container.streams.audio:
            raise UserError("it has no sound")
        stream = container.streams.audio[0]
        rate, channels = stream.rate, stream.channels
        seconds = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
        limits.check_sound(seconds * rate, rate, channels)
        mixer = av.AudioResampler(format="s16")  # of all formats, without a change of rate and channels
        parts: list[npt.NDArray[np.int16]] = []
        num = 0
        for part in _converted(mixer, container.decode(stream)):
            rate, channels = part.sample_rate, len(part.layout.channels)
            num += part.samples
            limits.check_sound(num, rate, channels)
            parts.append(part.to_ndarray().reshape(-1, channels))
    if not parts:
        raise UserError("its sound is empty")
    return np.concatenate(parts).astype(np.float32) / np.float32(FULL), rate


def _converted(resampler: Any, frames: Iterable[Any]) -> Iterable[Any]:
    for frame in frames:
        yield from resampler.resample(frame)
    yield from resampler.resample(None)
