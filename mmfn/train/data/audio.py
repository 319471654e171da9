"""Sound files and the sound tracks of videos, decoded, mixed to one channel and resampled to the rate of a model.

What a model makes of the samples is its family's (`mmfn.models.data`). Legend: S samples, C channels.
"""

import importlib
import io
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import soxr
import torch
from torch import Tensor

from mmfn.errors import MissingPackageError, UserError
from mmfn.train.data.video import Source, open_container
from mmfn.train.limits import LIMITS, Limits, check_regular

UNKNOWN_FORMAT = 1  # libsndfile's code of this error
UNKNOWN_LENGTH = 2**62  # libsndfile gives 2**63 - 1 samples to a stream that does not say
STREAMED_BYTES = 2**31 - 2**16  # so many or more are what programs write that do not know a length yet
MP3_PADDING = 2 * 1152  # samples: without a header the length of an MP3 file is that of its frames
IN_TURN = 7  # channels that NumPy sums one after the other
FULL = 2.0**15  # the value of 16 bits that is 1
Array = npt.NDArray[np.float32]


def decode_audio(source: Source, rate: int, limits: Limits = LIMITS, *, is_measured: bool = False) -> Tensor:
    """A sound file (path) or its bytes, or a video's first sound track -> float32[S], the mean of its channels, at
    `rate` per second. `is_measured`: S alone counts, on the device "meta", without decoding where the header says it.

    Files are read by libsndfile (WAV of all widths, FLAC, Ogg, Opus, MP3, AIFF, ...), and those it does not know (MP4,
    WebM, M4A, ...) by PyAV, an optional dependency. Channels are mixed, then resampled by soxr (HQ); S is rounded up.
    Raises ValueError naming the file when it is missing, broken, cut off, empty, or beyond a limit.

    Source: `load_audio(backend="soundfile")` of transformers 5.23 and `librosa.load`, equal to the last bit; of videos
    the models' own reader, librosa through FFmpeg, which rounds samples to 16 bits first.
    """
    name = _named(source)
    try:
        check_regular(source)
        wave_SC, source_rate = _read(source, limits, is_measured=is_measured)
        if len(wave_SC) == 0:
            raise UserError("it holds no samples")
        if is_measured:
            return torch.empty(_length(len(wave_SC), source_rate, rate), device="meta")
        wave_S = _resample(_mix(wave_SC), source_rate, rate)
    except MissingPackageError:
        raise
    except Exception as error:  # libsndfile, soxr and PyAV have errors of their own
        reason = getattr(error, "error_string", error)
        raise UserError(f"{name} could not be decoded ({reason}); replace the file or remove its sample") from error
    return torch.from_numpy(np.ascontiguousarray(wave_S))


def _named(source: Source) -> str:
    return "sound bytes" if isinstance(source, bytes) else f"sound {str(source)!r}"


def resample(wave_S: Tensor, source_rate: int, rate: int) -> Tensor:
    """float32[S] from one number of samples per second to another, by soxr (HQ)."""
    if wave_S.is_meta:
        return wave_S.new_empty(_length(len(wave_S), source_rate, rate))
    return torch.from_numpy(np.ascontiguousarray(_resample(wave_S.numpy(), source_rate, rate)))


def _mix(wave_SC: Array) -> Array:
    """The bits of `wave_SC.T.mean(axis=0)`, which sums up to 7 channels one after the other, and more in pairs."""
    num = wave_SC.shape[1]
    if num > IN_TURN:
        mean_S: Array = wave_SC.T.mean(axis=0)
        return mean_S
    if num == 1:
        return wave_SC[:, 0]
    sum_S = wave_SC[:, 0] + wave_SC[:, 1]
    for channel in range(2, num):
        sum_S += wave_SC[:, channel]
    sum_S /= np.float32(num)
    return sum_S


def _length(num: int, source_rate: int, rate: int) -> int:
    return -(-num * rate // source_rate)


def _resample(wave_S: Array, source_rate: int, rate: int) -> Array:
    if source_rate == rate:
        return wave_S
    num = _length(len(wave_S), source_rate, rate)
    resampled: Array = soxr.resample(wave_S, source_rate, rate, quality="HQ")  # rounds the length either way
    return resampled[:num] if len(resampled) >= num else np.pad(resampled, (0, num - len(resampled)))


def _read(source: Source, limits: Limits, *, is_measured: bool) -> tuple[Array, int]:
    """`(float32[S, C], samples per second)`; measured, of the same length at least."""
    try:
        file = soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source)
    except soundfile.LibsndfileError as error:
        if error.code != UNKNOWN_FORMAT:
            raise
        return _read_track(source, limits)
    with file:
        return _read_file(file, limits, is_measured=is_measured), file.samplerate


def _read_file(file: Any, limits: Limits, *, is_measured: bool) -> Array:
    """All at once: a decoder of MP3 that is read in pieces starts each of them anew, with other samples."""
    num = file.frames
    if num >= UNKNOWN_LENGTH:
        raise UserError("it does not say how long it is: write it anew with ffmpeg")
    limits.check_sound(num, file.samplerate, file.channels)
    _check_bytes(file.extra_info)
    if is_measured and file.format != "MP3":  # whose header does not always say it to the sample
        return np.broadcast_to(np.float32(0), (num, 1))
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


def _read_track(source: Source, limits: Limits) -> tuple[Array, int]:
    """`(float32[S, C], samples per second)` of the first sound track."""
    try:
        av = importlib.import_module("av")
    except ImportError:
        raise MissingPackageError(
            f"{_named(source)} has a format that libsndfile does not know, and PyAV, which reads the sound of videos, "
            "is missing; install it (pip install mmfn[video])"
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
