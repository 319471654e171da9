"""Videos from the file to the patches, against the library: `load_video` and the video processors of transformers."""

import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers.video_utils import VideoMetadata, load_video

from mmfn.models.data import glm_vision, qwen2_vision, qwen_vision
from mmfn.train.data.video import decode_video
from tests.oracles.torchvision import in_place_of_torchvision, library_class
from tests.train.data.clips import write_clip

pytest.importorskip("av", reason="PyAV is an optional dependency")
PIXELS = {"patch_size": 4, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CONFIG = {**PIXELS, "size": {"shortest_edge": 512, "longest_edge": 20_000}}
FAMILIES = {
    "qwen2_vl": (qwen2_vision, "qwen2_vl.video_processing_qwen2_vl.Qwen2VLVideoProcessor", {"fps": 2.0}),
    "qwen3_vl": (qwen_vision, "qwen3_vl.video_processing_qwen3_vl.Qwen3VLVideoProcessor", {}),
    "glm4v": (glm_vision, "glm4v.video_processing_glm4v.Glm4vVideoProcessor", {}),
}
KINDS = (  # container, codec, options
    ("mp4", "libx264", {"bf": "3"}),
    ("mp4", "libx264", {"bf": "0", "g": "250"}),
    ("mkv", "libx264", {"bf": "2"}),
    ("avi", "mpeg4", {"bf": "2"}),
    ("webm", "libvpx-vp9", {}),
    ("mov", "mjpeg", {}),
    ("mp4", "mpeg4", {}),
)
RATES = (Fraction(24), Fraction(25), Fraction(30), Fraction(30_000, 1001), Fraction(10))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", range(21))
def test_videos_are_those_of_the_library(tmp_path, family, place):
    draw = random.Random(place)
    suffix, codec, options = KINDS[place % len(KINDS)]
    size = 2 * draw.randrange(16, 60), 2 * draw.randrange(16, 60)
    num = draw.randrange(8, 90) | 1
    path = write_clip(
        tmp_path / f"a.{suffix}", codec=codec, num=num, rate=draw.choice(RATES), size=size, options=options
    )
    side, name, settings = FAMILIES[family]
    own = side.processor({"image_processor": CONFIG, "video_processor": CONFIG}, None)
    with in_place_of_torchvision():
        theirs = library_class(name)(**CONFIG, **settings, cap_pixels_per_frame=False)

        def indices(metadata: VideoMetadata, **_: object) -> list[int]:
            metadata.total_num_frames = num  # which Matroska does not say, so that the library cannot read it
            metadata.duration = num / metadata.fps
            return theirs.sample_frames(metadata).tolist()

        frames, metadata = load_video(str(path), backend="pyav", sample_indices_fn=indices)
        wanted = dict.fromkeys(metadata.frames_indices)
        if len(wanted) < len(metadata.frames_indices):  # GLM's repeat the last index; the reader reads it once
            frames = np.concatenate([frames, frames[-1:]])
        expected = theirs(videos=[torch.from_numpy(frames)], do_sample_frames=False, return_tensors="pt")
    footage = decode_video(path, own.sampling())
    assert footage.times == [i / metadata.fps for i in wanted]
    assert footage.rate == pytest.approx(len(wanted) / num * metadata.fps)
    assert footage.shape == size[::-1]
    media = own.video(footage.frames_u8, footage.times, footage.rate, footage.shape)
    assert list(media.grid) == expected["video_grid_thw"][0].tolist()
    assert torch.equal(media.in_floats().inputs_UF, expected["pixel_values_videos"])
