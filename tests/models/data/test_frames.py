import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfn.models.data.frames import VideoSpec, group_times, preprocess_video, sample_frames
from mmfn.models.data.qwen_vision import VIDEO_DEFAULTS

GOLDENS = json.loads((Path(__file__).parents[2] / "goldens" / "media.json").read_text(encoding="utf-8"))


def from_hf(config):
    return VideoSpec.from_hf(config, VIDEO_DEFAULTS)


SPEC = from_hf({"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 40960}})


def pixels(*shape):
    """The formula of tests/goldens/make_media_goldens.py."""
    t, c, y, x = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    return ((x * x // 3 + 5 * y + 37 * c + x * y // 7 + 11 * t * x) % 256).to(torch.uint8)


@pytest.mark.parametrize("case", GOLDENS["videos"], ids=lambda c: "x".join(map(str, c["shape"])))
def test_bits_of_the_library(case):
    frames, height, width = case["shape"]
    media = preprocess_video(pixels(frames, 3, height, width), from_hf(case["config"]).pixels)
    assert list(media.grid) == case["grid"]
    floats_UF = media.in_floats().inputs_UF
    assert floats_UF.flatten()[:4].tolist() == case["first"]
    assert hashlib.sha256(floats_UF.numpy().tobytes()).hexdigest() == case["sha256"]


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
