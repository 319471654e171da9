import random
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmfn.models.data import Sampling, qwen_vision
from mmfn.models.data.frames import VideoSpec, sample_frames
from mmfn.models.data.pixels import resize
from mmfn.train.data import Limits, video
from mmfn.train.data.video import decode_frames, decode_video
from tests.train.data.clips import everything, write_clip
from tests.train.data.fuzz_media import peak_kib

SAMPLING = Sampling(
    fps=2.0,
    select=lambda num_frames, rate: [0, 5, 9, 14, 18, num_frames - 1],
    size=lambda num_frames, height, width: (height, width),
)


def pixels(*shape):
    """uint8[T, 3, H, W]: edges and ramps."""
    t, c, y, x = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    return ((x * x // 3 + 5 * y + 37 * c + x * y // 7 + 11 * t * x) % 256).to(torch.uint8)


def test_frames_from_images(tmp_path):
    frames = pixels(3, 3, 6, 8)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, frame in zip(paths, frames, strict=True):
        Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()).save(path)
    footage = decode_frames(paths, SAMPLING)
    assert torch.equal(footage.frames_u8, frames)
    assert (footage.times, footage.rate, footage.shape) == ([0.0, 0.5, 1.0], 2.0, (6, 8))
    Image.fromarray(np.zeros((6, 9, 3), np.uint8)).save(paths[1])
    with pytest.raises(ValueError, match=r"must have one size, got \[\(6, 8\), \(6, 9\)\]"):
        decode_frames(paths, SAMPLING)


def test_missing_pyav_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ValueError, match=r"clip\.mp4' needs PyAV to be decoded; install it"):
        decode_video(tmp_path / "clip.mp4", SAMPLING)


CODECS = [  # container, codec, options; groups of 12 pictures
    ("mp4", "libx264", {"bf": "3"}),
    ("mp4", "libx264", {"bf": "3", "x264-params": "open-gop=1:keyint=12"}),
    ("mp4", "libx264", {"g": "2", "bf": "1"}),
    ("mp4", "libx264", {"flags": "+ilme+ildct", "x264-params": "tff=1"}),
    ("mp4", "libx265", {"x265-params": "log-level=none:temporal-layers=3:keyint=12"}),
    ("mp4", "libsvtav1", {}),
    ("mkv", "libx264", {"bf": "3"}),
    ("mov", "mjpeg", {}),
    ("webm", "libvpx-vp9", {}),
    ("avi", "mpeg4", {"bf": "2"}),
    ("ts", "libx264", {"bf": "2"}),
    ("mpg", "mpeg2video", {"bf": "2"}),
    ("flv", "libx264", {}),
    ("gif", "gif", {}),
]


def sampling(*wanted: int) -> Sampling:
    return replace(SAMPLING, select=lambda num_frames, rate: list(wanted))


@pytest.mark.parametrize(("suffix", "codec", "options"), CODECS, ids=lambda x: str(x)[:20])
def test_frames_are_those_of_decoding_everything(tmp_path, suffix, codec, options):
    path = write_clip(tmp_path / f"a.{suffix}", codec=codec, num=50, rate=20, options=options)
    frames_u8, times = everything(path)
    draw = random.Random(0)
    for num in (1, 2, 5, 20):
        wanted = sorted(draw.sample(range(50), num))
        for source in (path, path.read_bytes()):
            footage = decode_video(source, sampling(*wanted))
            assert torch.equal(footage.frames_u8, frames_u8[wanted])
            assert footage.times == pytest.approx([times[i] for i in wanted], abs=1.1e-3)


def test_only_groups_of_pictures_that_are_wanted_are_decoded(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", num=120, rate=20, options={"bf": "0"})
    seen = []
    read = video._read

    def spy(packets, context, index, places):
        return read((seen.append(packet.pts) or packet for packet in packets), context, index, places)

    monkeypatch.setattr(video, "_read", spy)
    decode_video(path, sampling(3, 62, 64))
    assert len(seen) == 4 + 5  # from pictures 0 and 60 on


@pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read as Linux tells them")
def test_memory_is_that_of_the_frames_that_are_read(tmp_path):
    """Not of the file, here 400 frames as they are."""
    path = write_clip(tmp_path / "a.mkv", codec="rawvideo", num=400, rate=20, size=(320, 240))
    assert path.stat().st_size > 20 * 2**20
    decode_video(path, sampling(0))
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = peak_kib()
    decode_video(path, sampling(0, 399))
    assert peak_kib() - before < 10 * 2**10


def test_frames_are_resized_one_by_one(tmp_path):
    path = write_clip(tmp_path / "a.mp4", num=12, rate=4)
    half = replace(sampling(0, 5, 11), size=lambda num, height, width: (height // num, width // 2))
    footage, whole = decode_video(path, half), decode_video(path, sampling(0, 5, 11))
    assert (footage.frames_u8.shape, footage.shape) == ((3, 3, 16, 32), (48, 64))
    assert torch.equal(footage.frames_u8, resize(whole.frames_u8, (16, 32)))


VARIABLE = {  # milliseconds of every frame
    "a gap": [*range(0, 1000, 50), *range(5000, 6000, 50)],
    "slides": [0, 1000, 1500, 9000],
    "slower": [*range(0, 1000, 25), *range(1000, 4000, 200)],
    "ten and thirty": [*range(0, 2000, 100), *range(2000, 3980, 33)],
}


@pytest.mark.parametrize("stamps_ms", VARIABLE.values(), ids=VARIABLE)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_of_a_variable_rate_what_is_shown_at_even_moments_is_read(tmp_path, stamps_ms, suffix):
    """The oracle decodes everything and asks each frame's own stamp; the moments are those of the family's rule."""
    path = write_clip(tmp_path / f"a.{suffix}", stamps_ms=stamps_ms, options={"bf": "2"})
    frames_u8, stamps = everything(path)
    assert [round(1000 * stamp) for stamp in stamps] == list(stamps_ms)
    rule = VideoSpec.from_hf({"fps": 2.0}, qwen_vision.VIDEO_DEFAULTS)
    footage = decode_video(path, replace(SAMPLING, select=partial(sample_frames, spec=rule)))
    with __import__("av").open(str(path)) as container:
        last = max((p for p in container.demux(video=0) if p.size), key=lambda p: p.pts)
        last_s = float(last.duration * last.time_base) or stamps[-1] / (len(stamps) - 1)
    rate = len(stamps) / (stamps[-1] + last_s)
    moments = [place / rate for place in sample_frames(len(stamps), rate, rule)]
    shown = [max(i for i, stamp in enumerate(stamps) if stamp <= moment + 1e-6) for moment in moments]
    assert torch.equal(footage.frames_u8, frames_u8[shown])
    again = [False, *(a == b for a, b in pairwise(shown))]
    expected = [moment if same else stamps[i] for moment, i, same in zip(moments, shown, again, strict=True)]
    assert footage.times == pytest.approx(expected)
    assert footage.times == sorted(footage.times)
    assert footage.rate == pytest.approx(len(moments) / len(stamps) * rate)


def test_a_cut_out_piece_keeps_its_times(tmp_path):
    path = write_clip(tmp_path / "a.mp4", num=80, rate=20)
    frames_u8, _ = everything(path)
    counts = []
    select = lambda num_frames, rate: counts.append((num_frames, rate)) or [0, num_frames - 1]  # noqa: E731
    footage = decode_video(path, replace(SAMPLING, select=select), start_s=1.0, end_s=2.5)
    assert counts == [(30, 20.0)]
    assert torch.equal(footage.frames_u8, frames_u8[[20, 49]])
    assert footage.times == pytest.approx([1.0, 2.45])
    with pytest.raises(ValueError, match="shows nothing from 9 to 10 s: correct video_start and video_end"):
        decode_video(path, SAMPLING, start_s=9.0, end_s=10.0)


TURNED = {  # a, b, c, d of x' = a x + c y, y' = b x + d y, rows going down; numpy's word for it
    "90": ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
    "180": ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
    "270": ((0, -1, 1, 0), lambda x: np.rot90(x, 1)),
    "mirrored": ((-1, 0, 0, 1), np.fliplr),
    "upside down": ((1, 0, 0, -1), np.flipud),
    "transposed": ((0, 1, 1, 0), lambda x: x.transpose(1, 0, 2)),
    "both": ((0, -1, -1, 0), lambda x: np.rot90(x, 2).transpose(1, 0, 2)),
    "0": ((1, 0, 0, 1), lambda x: x),
}


@pytest.mark.parametrize(("matrix", "turn"), TURNED.values(), ids=TURNED)
@pytest.mark.parametrize("is_measured", [False, True])
def test_videos_are_turned_as_they_say(tmp_path, matrix, turn, is_measured):
    path = write_clip(tmp_path / "a.mp4", num=8, rate=4, matrix=matrix)
    frames_u8, _ = everything(path)
    footage = decode_video(path, sampling(0, 7), is_measured=is_measured)
    expected = [turn(frame.permute(1, 2, 0).numpy()).copy() for frame in frames_u8[[0, 7]]]
    assert footage.shape == expected[0].shape[:2]
    if not is_measured:
        assert torch.equal(footage.frames_u8, torch.from_numpy(np.stack(expected)).permute(0, 3, 1, 2))


def test_other_matrices_are_refused(tmp_path):
    path = write_clip(tmp_path / "a.mp4", num=8, rate=4, matrix=(2, 0, 0, 1))
    with pytest.raises(ValueError, match="does more than turn and mirror it: write it anew"):
        decode_video(path, sampling(0))


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mp4", "libx264"), ("mkv", "libx264"), ("avi", "mpeg4"), ("flv", "libx264")]
)
@pytest.mark.parametrize("share", [0.4, 0.7])
def test_files_that_end_early(tmp_path, suffix, codec, share):
    movflags = "faststart" if suffix == "mp4" else ""
    data = write_clip(tmp_path / f"a.{suffix}", codec=codec, movflags=movflags).read_bytes()
    first = sampling(0, 1)
    assert len(decode_video(data, first).times) == 2
    with pytest.raises(ValueError, match=r"video bytes could not be decoded \(it is (cut off|damaged)"):
        decode_video(data[: int(len(data) * share)], first)


def test_sound_that_is_longer_than_the_pictures_is_no_end_of_the_file(tmp_path):
    sound = np.zeros((4 * 16_000, 1), np.float32)
    path = write_clip(tmp_path / "a.mkv", num=20, rate=20, sound_SC=sound, sound_rate=16_000, sound_codec="pcm_s16le")
    assert len(decode_video(path, sampling(0, 19)).times) == 2


def test_limits_hold_before_anything_is_decoded(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", num=40, rate=10)
    assert len(decode_video(path, sampling(0, 39), Limits(video_seconds=4.0, video_values=2 * 3 * 48 * 64)).times) == 2
    for limits, message in (
        (Limits(video_seconds=3.5), r"it lasts 4 s, more than the 3\.5 of max_video_seconds"),
        (Limits(video_packets=39), "it has more than 39 frames"),
        (Limits(image_pixels=48 * 64 - 1), "64 x 48 pixels, more than the 3071 of max_image_pixels"),
    ):
        monkeypatch.setattr(video, "_read", None)
        with pytest.raises(ValueError, match=message):
            decode_video(path, SAMPLING, limits)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="2 frames of 64 x 48 pixels are read of it, more than 18431 values: lower"):
        decode_video(path, sampling(0, 39), Limits(video_values=2 * 3 * 48 * 64 - 1))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "gif"])
def test_measuring_gives_what_decoding_gives(tmp_path, suffix):
    codec = {"webm": "libvpx-vp9", "gif": "gif"}.get(suffix, "libx264")
    path = write_clip(tmp_path / f"a.{suffix}", codec=codec, num=40, rate=10)
    one, two = (decode_video(path, sampling(0, 7, 39), is_measured=is_measured) for is_measured in (False, True))
    assert (one.times, one.rate, one.shape, one.frames_u8.shape) == (
        two.times,
        two.rate,
        two.shape,
        two.frames_u8.shape,
    )
    assert two.frames_u8.is_meta


def test_broken_video_files(tmp_path):
    pytest.importorskip("av", reason="PyAV is an optional dependency")
    path = tmp_path / "broken.mp4"
    path.write_bytes(b"nothing")
    for source in (path, tmp_path / "missing.mp4"):
        with pytest.raises(ValueError, match=rf"{source.name}' could not be decoded"):
            decode_video(source, SAMPLING)
