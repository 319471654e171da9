import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmfn.models.data.frames import VideoSpec, group_times, preprocess_video, sample_frames
from mmfn.models.data.qwen_vision import VIDEO_DEFAULTS, VisionProcessor
from mmfn.train.data.video import decode_frames, decode_video

GOLDENS = json.loads((Path(__file__).parents[2] / "goldens" / "media.json").read_text(encoding="utf-8"))


def from_hf(config):
    return VideoSpec.from_hf(config, VIDEO_DEFAULTS)


SPEC = from_hf({"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 40960}})
SAMPLING = VisionProcessor(image_spec=SPEC.pixels, video_spec=SPEC).sampling()


def pixels(*shape):
    """The formula of tests/goldens/make_media_goldens.py."""
    t, c, y, x = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    return ((x * x // 3 + 5 * y + 37 * c + x * y // 7 + 11 * t * x) % 256).to(torch.uint8)


@pytest.mark.parametrize("case", GOLDENS["videos"], ids=lambda c: "x".join(map(str, c["shape"])))
def test_bits_of_the_library(case):
    frames, height, width = case["shape"]
    media = preprocess_video(pixels(frames, 3, height, width), from_hf(case["config"]).pixels)
    assert list(media.grid) == case["grid"]
    assert media.inputs_UF.flatten()[:4].tolist() == case["first"]
    assert hashlib.sha256(media.inputs_UF.contiguous().numpy().tobytes()).hexdigest() == case["sha256"]


@pytest.mark.parametrize("case", GOLDENS["sampling"], ids=lambda c: f"{c['total']}@{c['fps']}")
def test_sampling_of_the_library(case):
    indices = sample_frames(case["total"], case["fps"], from_hf({}))
    assert len(indices) == case["count"]
    assert indices[:12] == case["indices"]


def test_sampling_is_numpys_rounded_linspace():
    for num_frames in (1, 2, 3, 5, 24, 97, 250, 1801, 100_003):
        for rate in (1.0, 7.5, 24.0, 30000 / 1001, 60.0):
            indices = sample_frames(num_frames, rate, SPEC)
            expected = np.linspace(0, num_frames - 1, len(indices)).round().astype(int)
            assert indices == expected.tolist()


def test_spec_has_the_defaults_of_the_library():
    spec = from_hf({})
    assert (spec.fps, spec.min_frames, spec.max_frames) == (2.0, 4, 768)
    assert (spec.pixels.patch_size, spec.pixels.min_pixels, spec.pixels.max_pixels) == (16, 131072, 786432)
    assert spec.pixels.mean == spec.pixels.std == (0.5, 0.5, 0.5)
    older = from_hf({"size": {"min_pixels": 64, "max_pixels": 128}}).pixels
    assert (older.min_pixels, older.max_pixels) == (64, 128)


def test_group_times_are_means_of_first_and_last():
    assert group_times([0.0, 1.0, 2.0], 2) == [0.5, 2.0]
    assert group_times([0.0, 1.0, 4.0], 3) == [2.0]
    assert group_times([0.5], 2) == [0.5]


def test_frames_from_images(tmp_path):
    frames = pixels(3, 3, 6, 8)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, frame in zip(paths, frames, strict=True):
        Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()).save(path)
    decoded, times = decode_frames(paths, SPEC.fps)
    assert torch.equal(decoded, frames)
    assert times == [0.0, 0.5, 1.0]
    Image.fromarray(np.zeros((6, 9, 3), np.uint8)).save(paths[1])
    with pytest.raises(ValueError, match=r"must have one size, got \[\(6, 8\), \(6, 9\)\]"):
        decode_frames(paths, SPEC.fps)


def test_missing_pyav_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ValueError, match=r"clip\.mp4' needs PyAV to be decoded; install it"):
        decode_video(tmp_path / "clip.mp4", SAMPLING)


def _write_clip(av, path, num_frames, rate):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(num_frames):
            array = np.zeros((48, 64, 3), np.uint8)
            array[:, 2 * index : 2 * index + 8] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())


def test_decoding_a_file(tmp_path):
    av = pytest.importorskip("av", reason="PyAV is an optional dependency")
    path = tmp_path / "clip.mp4"
    _write_clip(av, path, 24, 8)
    frames, times = decode_video(path, SAMPLING)
    with av.open(str(path)) as container:
        everything = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    assert times == [i / 8 for i in (0, 5, 9, 14, 18, 23)]
    assert torch.equal(frames, torch.from_numpy(everything[[0, 5, 9, 14, 18, 23]]).permute(0, 3, 1, 2))


def test_broken_video_files(tmp_path):
    pytest.importorskip("av", reason="PyAV is an optional dependency")
    path = tmp_path / "broken.mp4"
    path.write_bytes(b"nothing")
    for source in (path, tmp_path / "missing.mp4"):
        with pytest.raises(ValueError, match=rf"{source.name}' could not be decoded"):
            decode_video(source, SAMPLING)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fps": 0}, "fps of a video processor must be a positive number, got 0"),
        ({"fps": "2"}, "fps of a video processor must be a positive number, got '2'"),
        ({"min_frames": "4"}, "min_frames of a video processor must be an integer, got '4'"),
        ({"max_frames": True}, "max_frames of a video processor must be an integer, got True"),
        ({"min_frames": 9, "max_frames": 8}, "temporal_patch_size <= min_frames <= max_frames, got 2, 9, 8"),
        ({"min_frames": 1}, "got 2, 1, 768"),
        ({"num_frames": 8}, "'num_frames' is 8, only None"),
        ({"cap_pixels_per_frame": True}, "'cap_pixels_per_frame' is True"),
        ({"do_sample_frames": False}, "'do_sample_frames' is False"),
    ],
)
def test_bad_spec(config, message):
    with pytest.raises(ValueError, match=message):
        from_hf(config)


def test_bad_videos():
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        preprocess_video(pixels(1, 3, 8, 8), SPEC.pixels)
    with pytest.raises(ValueError, match=r"must be uint8\[T, 3, H, W\]"):
        preprocess_video(pixels(2, 3, 8, 8).float(), SPEC.pixels)
