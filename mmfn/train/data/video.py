"""Video files, decoded: with PyAV, an optional dependency, or frame by frame from images.

A file is read twice. The first time nothing is decoded: its packets say how many frames there are, when each is shown,
and from where it can be decoded. The second time those groups of pictures are decoded that hold a wanted frame.
Legend: N frames of the file, T frames that are read.
"""

import importlib
import io
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, pairwise
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mmfn.errors import MissingPackageError, UserError
from mmfn.models.data import Sampling
from mmfn.models.data.pixels import resize
from mmfn.train.data.image import decode_image, image_size
from mmfn.train.limits import LIMITS, Limits, check_regular

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,flv,asf,ogg,gif,aac"  # FFmpeg's names
INDEXED = ("avi", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2")  # in the others time stamps behind a seek are guesses
UNREFERENCED = ("h264", "mpeg1video", "mpeg2video", "mpeg4")  # codecs that tell which frames no other one needs
SLACK_S = 0.5  # by so much the headers of whole files are off
ONE = 65536  # of a display matrix
Source = str | PathLike[str] | bytes
Times = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Footage:
    """What is read of a video: `frames_u8`, uint8[T, 3, h, w], resized as its `Sampling` says or on the device "meta";
    `times`: of each in seconds; `rate`: so many are read per second; `shape`: (height, width) of the file's frames."""

    frames_u8: Tensor
    times: list[float]
    rate: float
    shape: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Index:
    """`times_N`: in seconds, of every frame in the order they are shown, from 0. `rate`: frames per second by the
    header. `last_s`: how long the last one is shown. `pts_N`: time stamps, () where the file has none. `keys`: frames
    that decoding can begin with, () where it must begin at the start."""

    times_N: Times
    rate: float
    last_s: float
    pts_N: Sequence[int]
    keys: Sequence[int]


def decode_video(
    source: Source,
    sampling: Sampling,
    limits: Limits = LIMITS,
    *,
    start_s: float = 0.0,
    end_s: float = float("inf"),
    is_measured: bool = False,
) -> Footage:
    """A video file (path) or its bytes -> the frames that `sampling` takes of those shown from `start_s` to `end_s`.

    They are turned upright as the file says. See `choose` for files without a constant rate. `is_measured`: of the
    pictures only the first one is decoded, and the frames are on "meta". Raises ValueError naming the file when PyAV is
    missing, the file is missing, no video, damaged, ends early, or is beyond a limit.

    Source: `load_video(backend="pyav")` of transformers 5.23.0 and the processors' resizing, equal to the last bit for
    files of a constant rate that are not turned; it takes others for such.
    """
    name = "video bytes" if isinstance(source, bytes) else f"video {str(source)!r}"
    try:
        av = importlib.import_module("av")
    except ImportError as error:
        raise MissingPackageError(
            f"{name} needs PyAV to be decoded; install it (pip install mmfn[video]) or give the video as a list of "
            "frame images"
        ) from error
    try:
        check_regular(source)
        with open_container(av, source) as container:
            return _decode(container, sampling, limits, (start_s, end_s), is_measured=is_measured)
    except av.ArgumentError as error:
        raise UserError(
            f"{name} could not be decoded (it is no video of a known format); replace the file or remove its sample"
        ) from error
    except Exception as error:  # PyAV raises its own FFmpeg errors, IndexError without a video stream, and others
        raise UserError(f"{name} could not be decoded ({error}); replace the file or remove its sample") from error


def open_container(av: Any, source: Source) -> Any:
    """A file opened by PyAV (`av`), if it holds its media itself: a playlist (HLS, concat, ...) under the name of a
    video would have FFmpeg read any other file, outside the media root too."""
    file = io.BytesIO(source) if isinstance(source, bytes) else f"file:{source}"
    return av.open(file, options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"})


def decode_frames(
    sources: Sequence[Source], sampling: Sampling, limits: Limits = LIMITS, *, is_measured: bool = False
) -> Footage:
    """Frame images, all of which are taken, at `sampling.fps` per second.

    Raises ValueError when a frame does not decode or frames differ in size.
    """
    shapes = sorted({image_size(source, limits) for source in sources})
    if len(shapes) > 1:
        raise UserError(f"the frames of a video must have one size, got {shapes} (height, width); resize them")
    size = sampling.size(len(sources), *shapes[0])
    limits.check_frames(len(sources), *size)
    if is_measured:
        frames_u8 = torch.empty(len(sources), 3, *size, dtype=torch.uint8, device="meta")
    else:
        frames_u8 = torch.cat([resize(decode_image(source, limits)[None], size) for source in sources])
    times = [i / sampling.fps for i in range(len(sources))]
    return Footage(frames_u8=frames_u8, times=times, rate=sampling.fps, shape=shapes[0])


def choose(index: Index, sampling: Sampling) -> tuple[list[int], list[float], float]:
    """`(frames, their times in seconds, how many there are per second)`: which frames of a file are read.

    Where every frame lies within half a frame of its place at the file's rate, the sampling's rule for the number of
    frames and the rate says it, and time is the place divided by the rate. Else the rule for as many frames at a
    constant rate over the same duration gives moments; what is read is what is shown at each moment, and its time is
    that of its own stamp; of a picture that is still shown, read once more, it is the moment.

    >>> index = Index(times_N=np.array([0, 1, 2, 8.0]), rate=1.0, last_s=2.0, pts_N=(), keys=())  # 4 frames in 10 s
    >>> choose(index, Sampling(fps=0.4, select=lambda num, rate: [0, 1, 2, 3], size=...))  # at 0, 2.5, 5 and 7.5 s
    ([0, 2, 2, 2], [0.0, 2.0, 5.0, 7.5], 0.4)
    """
    times_N, num, rate = index.times_N, len(index.times_N), index.rate
    shown_N, first = times_N - times_N[0], float(times_N[0])
    if rate > 0 and np.abs(shown_N - np.arange(num) / rate).max() <= 0.5 / rate:
        frames = sampling.select(num, rate)
        return frames, [first + i / rate for i in frames], len(frames) / num * rate
    rate = num / (float(shown_N[-1]) + index.last_s)
    moments = np.asarray(sampling.select(num, rate)) / rate
    frames = (np.searchsorted(shown_N, moments + 1e-6, side="right") - 1).tolist()
    again = [False, *(i == j for i, j in pairwise(frames))]
    times = [moments[t] if again[t] else shown_N[i] for t, i in enumerate(frames)]
    return frames, [first + float(time) for time in times], len(frames) / num * rate


def _decode(
    container: Any, sampling: Sampling, limits: Limits, span_s: tuple[float, float], *, is_measured: bool
) -> Footage:
    if not container.streams.video or container.streams.video[0].codec_context is None:
        raise UserError("it has no pictures of a known codec")
    stream = container.streams.video[0]
    limits.check_image(stream.width, stream.height)
    limits.check_video((container.duration or 0) / 1e6)
    stream.codec_context.thread_count = 1  # samples are decoded side by side; and packets one by one, see `_pictures`
    index = _index(container, stream, limits)
    low, high = (int(x) for x in np.searchsorted(index.times_N, span_s, side="left"))
    if low >= high:
        raise UserError(f"it shows nothing from {span_s[0]:g} to {span_s[1]:g} s: correct video_start and video_end")
    part = Index(times_N=index.times_N[low:high], rate=index.rate, last_s=index.last_s, pts_N=(), keys=())
    frames, times, rate = choose(part, sampling)
    wanted = sorted({low + i for i in frames})
    pictures = _pictures(container, stream, index, wanted[:1] if is_measured else wanted)
    arrays: dict[int, Tensor] = {}
    for place, picture in pictures:
        limits.check_image(picture.width, picture.height)
        frame_u8 = _upright(picture)
        if not arrays:
            shape = (frame_u8.shape[1], frame_u8.shape[2])
            size = sampling.size(len(frames), *shape)
            limits.check_frames(len(frames), *size)
        if (frame_u8.shape[1], frame_u8.shape[2]) != shape:
            raise UserError("its frames have several sizes: write it anew with ffmpeg")
        arrays[place] = frame_u8.to("meta") if is_measured else resize(frame_u8[None], size)[0]
    if is_measured:
        frames_u8 = torch.empty(len(frames), 3, *size, dtype=torch.uint8, device="meta")
    else:
        frames_u8 = torch.stack([arrays[low + i].permute(1, 2, 0) for i in frames]).permute(0, 3, 1, 2)
    return Footage(frames_u8=frames_u8, times=times, rate=rate, shape=shape)


def _index(container: Any, stream: Any, limits: Limits) -> Index:
    """By its packets. Raises ValueError for a file that ends early, and beyond the limit of seconds."""
    base, num = stream.time_base, 0
    shown: list[tuple[int | None, int, bool]] = []  # stamp, duration, is a key; no packets, which hold bytes
    for packet in container.demux(stream):
        if packet.size:
            if packet.is_corrupt:
                raise UserError("it is damaged or cut off")
            num += 1
            limits.check_packets(num)
            if not packet.is_discard:
                shown.append((packet.pts, packet.duration or 0, packet.is_keyframe))
    shown.sort(key=lambda one: one[0] or 0)
    if not shown:
        raise UserError("it holds no frames")
    if num < stream.frames:
        raise UserError(f"it is cut off: it says {stream.frames} frames and has {num}")
    rate = float(stream.average_rate or 0)
    stamps = [stamp for stamp, _, _ in shown if stamp is not None]
    if len(set(stamps)) < len(shown):
        if not rate:
            raise UserError("it says neither when its frames are shown nor how many there are per second")
        return Index(times_N=np.arange(len(shown)) / rate, rate=rate, last_s=1 / rate, pts_N=(), keys=())
    times_N = np.array([float((stamp - stamps[0]) * base) for stamp in stamps])
    mean_s = float(times_N[-1]) / max(1, len(shown) - 1)
    last_s = float(shown[-1][1] * base) or mean_s or 1.0
    limits.check_video(float(times_N[-1]))
    if stream.duration is None and container.duration:
        _check_end(container, container.duration / 1e6, float(stamps[-1] * base) + last_s)
    is_indexed = container.format.name in INDEXED
    keys = [place for place, (_, _, is_key) in enumerate(shown) if is_indexed and is_key]
    return Index(times_N=times_N, rate=rate, last_s=last_s, pts_N=stamps, keys=keys)


def _check_end(container: Any, says_s: float, end_s: float) -> None:
    """Raise ValueError where no stream, sound included, lasts as long as the header of the file says."""
    if end_s < says_s - SLACK_S:
        container.seek(0)
        for packet in container.demux():
            if packet.pts is not None:
                end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    if end_s < says_s - SLACK_S:
        raise UserError(f"it is cut off: it says {says_s:g} s and has {end_s:g}")


def _pictures(container: Any, stream: Any, index: Index, wanted: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """`(place, frame)` of the wanted frames, ascending. Raises ValueError where one does not come out whole."""
    num = 0
    for key, group in groupby(wanted, lambda place: bisect_right(index.keys, place) - 1):
        packets = _packets_from(container, stream, index, key)
        if packets is None:
            break
        places = list(group)
        yield from _read(packets, stream.codec_context, index, places)
        num += len(places)
    if num < len(wanted):
        container.seek(0)
        yield from _read(container.demux(stream), stream.codec_context, index, wanted[num:])


def _packets_from(container: Any, stream: Any, index: Index, key: int) -> Iterator[Any] | None:
    """Packets from a frame on that decoding can begin with, a key or one before it; None where seeking leads elsewhere.

    Some containers seek by the order of decoding, in which the key after a short group may count as the nearest.
    """
    for earlier in range(key, max(key - 2, -1), -1):
        container.seek(index.pts_N[index.keys[earlier]], stream=stream)
        packets = iter(container.demux(stream))
        first = next((packet for packet in packets if packet.is_keyframe), None)
        if first is not None and first.pts is not None and first.pts <= index.pts_N[index.keys[key]]:
            return chain([first], packets)
    return None


def _read(packets: Iterable[Any], context: Any, index: Index, places: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """Decode until all places are there. Where the codec tells, pictures that no other one needs are passed over."""
    wanted = {index.pts_N[place]: place for place in places} if index.pts_N else dict(zip(places, places, strict=True))
    num, left = 0, len(places)
    is_sparse = bool(index.pts_N) and context.name in UNREFERENCED
    for packet in packets:
        if is_sparse:
            context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        for frame in packet.decode():
            place = wanted.get(frame.pts if index.pts_N else num)
            num += 1
            if place is not None:
                if frame.is_corrupt:
                    raise UserError(f"its picture at {index.times_N[place]:.2f} s is damaged")
                yield place, frame
                left -= 1
        if not left:
            return
    raise UserError(f"it is damaged: {left} of its pictures do not decode")


def _upright(picture: Any) -> Tensor:
    """uint8[3, H, W], turned and mirrored as the file says. Raises ValueError for a matrix that does anything else."""
    frame_u8 = torch.from_numpy(picture.to_ndarray(format="rgb24")).permute(2, 0, 1)
    matrix = picture.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return frame_u8
    a, b, _, c, d = (round(x / ONE) for x in np.frombuffer(matrix, np.int32)[:5].tolist())  # x' = a x + c y
    if sorted((abs(a), abs(b), abs(c), abs(d))) != [0, 0, 1, 1] or abs(a) != abs(d):
        raise UserError("its display matrix does more than turn and mirror it: write it anew with ffmpeg")
    if b:
        frame_u8, a, d = frame_u8.transpose(1, 2), c, b
    return frame_u8.flip([dim for dim, sign in ((1, d), (2, a)) if sign < 0])
