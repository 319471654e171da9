"""Images and videos of Qwen2.5-VL, against the library's video processor (whose module only loads with torchvision)."""

import __future__

import ast
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers.video_utils import VideoMetadata

from mmfn.batch import Media
from mmfn.models.data import qwen2_vision
from mmfn.models.data.chat import MediaText
from mmfn.models.data.frames import VideoSpec
from mmfn.models.data.pixels import target_size
from mmfn.models.data.qwen_vision import IMAGE_DEFAULTS

PUBLISHED = {  # preprocessor_config.json of all sizes
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}
TINY = {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 1600}}
SPEC = VideoSpec.from_hf({}, qwen2_vision.VIDEO_DEFAULTS)
RATES = (1.0, 7.5, 23.976, 24.0, 25.0, 30000 / 1001, 60.0)


class _Base:
    """In the place of the library's base class: the size it would resize to."""

    num_frames = None

    def resize(self, image, size, resample):
        return size.height, size.width


@pytest.fixture(scope="module")
def library():
    """`Qwen2VLVideoProcessor` as its file defines it, without the module's imports, set to 2 frames per second."""
    path = Path(transformers.__file__).parent / "models" / "qwen2_vl" / "video_processing_qwen2_vl.py"
    wanted = ("smart_resize", "Qwen2VLVideoProcessor")
    nodes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if getattr(node, "name", "") in wanted]
    stubs = ("PILImageResampling", "OPENAI_CLIP_MEAN", "OPENAI_CLIP_STD", "Qwen2VLVideoProcessorInitKwargs")
    names = {name: SimpleNamespace(BICUBIC=3) for name in stubs}
    names |= {"BaseVideoProcessor": _Base, "SizeDict": SimpleNamespace, "auto_docstring": lambda x: x}
    names |= {"torch": torch, "math": math}
    code = compile(ast.Module(nodes, []), str(path), "exec", __future__.annotations.compiler_flag, dont_inherit=True)
    exec(code, names)
    found = object.__new__(names["Qwen2VLVideoProcessor"])
    found.fps = 2.0
    return found


@pytest.fixture
def processor():
    return qwen2_vision.processor({"image_processor": TINY, "video_processor": TINY}, None)


def test_frames_are_those_of_the_library(library):
    r, surplus = random.Random(0), []
    for _ in range(1000):
        total = r.choice([r.randrange(2, 40), r.randrange(2, 2000), r.randrange(2, 120_000)])
        rate = r.choice([*RATES, r.uniform(0.5, 120)])
        got = qwen2_vision.sample_groups(total, rate, SPEC)
        want = library.sample_frames(VideoMetadata(total_num_frames=total, fps=rate)).tolist()
        assert got == want[: len(got)]
        assert len(got) % 2 == 0
        surplus += [(n - total) for n in want[len(got) :]]
        assert got == sorted(set(got))
        assert got[-1] < total
    assert 0 < len(surplus) < 100, surplus  # the library's fault
    assert 0 in surplus, surplus


@pytest.mark.parametrize("num_frames", [2, 299, 768])
@pytest.mark.parametrize("is_capped", [False, True])
def test_sizes_are_those_of_the_library(library, num_frames, is_capped):
    sections = {"image_processor": {}, "video_processor": {"cap_pixels_per_frame": is_capped}}
    own = qwen2_vision.processor(sections, None)
    bounds = SimpleNamespace(**qwen2_vision.VIDEO_DEFAULTS["size"])
    for side in ((360, 640), (1080, 1920), (20, 31), (2160, 100), (37, 5000)):
        clip = torch.empty(1, num_frames, 3, *side, device="meta")
        want = library.resize(clip, bounds, None, factor=28, temporal_factor=2, cap_pixels_per_frame=is_capped)
        spec = own._frame_spec(num_frames)
        assert target_size(*side, spec) == want
    assert (own._frame_spec(768).max_pixels < SPEC.pixels.max_pixels) == is_capped


@pytest.mark.parametrize("num_frames", [4, 5])
def test_patches_are_those_of_the_library(library, processor, num_frames):
    frames_u8 = torch.randint(256, (num_frames, 3, 16, 24), dtype=torch.uint8)
    media = processor.video(frames_u8, [], 2.0)
    spec = processor.video_spec.pixels
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (spec.mean, spec.std))
    values = (frames_u8 / 255 - mean) / std
    patches, *grid = library.patchify(values[None], patch_size=4, merge_size=2, temporal_patch_size=2)
    assert media.grid == tuple(grid) == (-(-num_frames // 2), 4, 6)
    torch.testing.assert_close(media.in_floats().inputs_UF, patches[0], rtol=1e-5, atol=1e-5)
    padded = torch.cat([values, values[-1:].expand(num_frames % 2, -1, -1, -1)])
    torch.testing.assert_close(processor_values(media, spec), padded, rtol=1e-5, atol=1e-5)


def processor_values(media, spec):
    """The frames that patches were cut from."""
    t, h, w = media.grid
    p, m, group = spec.patch_size, spec.merge_size, spec.temporal_patch_size
    x = media.in_floats().inputs_UF.view(t, h // m, w // m, m, m, 3, group, p, p)
    return x.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(t * group, 3, h * p, w * p)


def test_a_video_is_one_run_and_each_step_lasts_as_its_frames(processor):
    media = processor.video(torch.zeros(6, 3, 16, 24, dtype=torch.uint8), [0.0] * 6, 24000 / 1001 / 8)
    assert (media.grid, media.times) == ((3, 4, 6), ())
    assert media.seconds_per_grid == 2 / (24000 / 1001 / 8)
    image = processor.image(torch.zeros(3, 16, 24, dtype=torch.uint8))
    texts = processor.texts({"image": [image], "video": [media]})
    assert texts["video"] == [MediaText(text="<|video_pad|>", counts=(18,))]
    assert texts["image"] == [MediaText(text="<|image_pad|>", counts=(6,))]


def test_marks_stay_around_a_placeholder():
    chat = qwen2_vision.SIDE.chat
    text = "<|vision_start|><|video_pad|><|vision_end|><|image_pad|>"
    assert chat.pattern.sub("X", text) == "<|vision_start|>X<|vision_end|>X"


def test_a_published_checkpoint_has_settings_of_images_alone():
    own = qwen2_vision.processor({"image_processor": PUBLISHED}, None)
    assert (own.image_spec.min_pixels, own.image_spec.max_pixels) == (3136, 12_845_056)
    video = own.video_spec
    assert (video.pixels.min_pixels, video.pixels.max_pixels) == (128 * 28 * 28, 768 * 28 * 28)
    assert (video.fps, video.min_frames, video.max_frames, own.max_video_tokens) == (2.0, 4, 768, None)
    assert video.pixels.mean == own.image_spec.mean == IMAGE_DEFAULTS["image_mean"]
    assert own.sampling().select(24, 8.0) == [0, 4, 8, 12, 16, 20]


def test_what_transformers_writes_of_videos_is_read():
    section = {**TINY, "do_sample_frames": False, "fps": None, "cap_pixels_per_frame": None, "max_video_tokens": 9000}
    own = qwen2_vision.processor({"image_processor": TINY, "video_processor": section}, None)
    assert (own.sampling().fps, own.max_video_tokens) == (2.0, None)
    own = qwen2_vision.processor({"image_processor": TINY, "video_processor": section | {"fps": 4}}, None)
    assert own.sampling().fps == 4
    with pytest.raises(ValueError, match="patch_size is 4 for images but 14 for videos"):
        qwen2_vision.processor({"image_processor": TINY, "video_processor": {}}, None)
    with pytest.raises(ValueError, match="a video needs at least 2 frames, got 1"):
        own.sampling().select(1, 8.0)


CFG = SimpleNamespace(vision=SimpleNamespace(merge_size=2, patch_values=5))
VIDEOS = {"pixel_values_videos": torch.ones(24, 5), "video_grid_thw": torch.tensor([[2, 2, 2], [1, 4, 4]])}


def test_seconds_come_with_videos():
    timed = {**VIDEOS, "second_per_grid_ts": torch.tensor([0.5, 1 / 3])}
    media = qwen2_vision.media_from_hf(timed, CFG)["video"]
    assert [(m.grid, m.seconds_per_grid) for m in media] == [((2, 2, 2), 0.5), ((1, 4, 4), torch.tensor(1 / 3).item())]
    assert [m.seconds_per_grid for m in qwen2_vision.media_from_hf(VIDEOS, CFG)["video"]] == [1.0, 1.0]
    images = {"pixel_values": torch.ones(4, 5), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    (image,) = qwen2_vision.media_from_hf(images, CFG)["image"]
    assert isinstance(image, Media)
    assert image.seconds_per_grid == 0.0


@pytest.mark.parametrize("seconds", [[0.5], [0.5, 0.0], [0.5, float("nan")], [[0.5, 0.5]]])
def test_wrong_seconds_are_refused(seconds):
    with pytest.raises(
        ValueError, match=r"second_per_grid_ts is .* a positive number of seconds for each of the 2 vid"
    ):
        qwen2_vision.media_from_hf({**VIDEOS, "second_per_grid_ts": torch.tensor(seconds)}, CFG)
