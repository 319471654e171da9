from types import SimpleNamespace

import pytest
import torch

from mmfn.models.data import qwen_vision
from mmfn.models.data.chat import MediaText, read_template

TINY = {"patch_size": 4, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SIZE = {"size": {"shortest_edge": 64, "longest_edge": 40960}}


@pytest.fixture
def processor():
    sections = {"image_processor": TINY | SIZE, "video_processor": TINY | SIZE | {"fps": 4, "max_frames": 6}}
    return qwen_vision.processor(sections, None)


def test_one_patch_size():
    with pytest.raises(ValueError, match="patch_size is 8 for images but 16 for videos"):
        qwen_vision.processor({"image_processor": {"patch_size": 8}, "video_processor": {}}, None)


def test_a_video_has_the_times_of_its_groups(processor):
    frames = torch.zeros(5, 3, 16, 24, dtype=torch.uint8)
    media = processor.video(frames, [0.0, 0.5, 1.0, 1.5, 2.0], 2.0)
    assert (media.grid, media.times) == ((3, 4, 6), (0.25, 1.25, 2.0))
    (text,) = processor.texts({"video": [media]})["video"]
    pad = "<|vision_start|><|video_pad|><|vision_end|>"
    assert text == MediaText(text=f"<0.2 seconds>{pad}<1.2 seconds>{pad}<2.0 seconds>{pad}", counts=(6, 6, 6))


def test_an_image_is_its_token_once_per_feature(processor):
    media = processor.image(torch.zeros(3, 16, 24, dtype=torch.uint8))
    assert processor.texts({"image": [media, media]})["image"] == [MediaText(text="<|image_pad|>", counts=(6,))] * 2
    cfg = SimpleNamespace(vision=SimpleNamespace(merge_size=2))
    assert qwen_vision.num_tokens("image", media, cfg) == 6


def test_sampling_has_the_rate_and_bounds_of_the_file(processor):
    sampling = processor.sampling()
    assert sampling.fps == 4
    assert sampling.select(8, 8.0) == [0, 2, 5, 7]
    assert len(sampling.select(80, 8.0)) == 6


def test_videos_need_their_settings():
    without = qwen_vision.processor({"image_processor": TINY}, None)
    for call in (without.sampling, lambda: without.video(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), [0.0, 0.5], 2.0)):
        with pytest.raises(ValueError, match=r"no video_preprocessor_config\.json; add it or remove the videos"):
            call()


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("<|vision_start|><|image_pad|><|vision_end|>", ["image"]),
        ("<|vision_start|><|video_pad|><|vision_end|><|video_pad|>x<|image_pad|>", ["video", "video", "image"]),
        ("no media", []),
    ],
)
def test_placeholders(text, kinds):
    chat = qwen_vision.SIDE.chat
    matches = list(chat.pattern.finditer(text))
    assert [match.lastgroup for match in matches] == kinds
    assert all("<|vision_start|>" in match.group() or match.start() for match in matches if match.lastgroup == "video")


def test_training_templates_lie_beside_the_models():
    for name in qwen_vision.SIDE.chat.templates:
        assert "{%- generation -%}" in read_template(name)


def test_facts_name_what_config_and_processor_share(processor):
    vision = SimpleNamespace(patch_size=4, temporal_patch_size=2, merge_size=2, num_channels=3)
    facts = qwen_vision.facts(SimpleNamespace(vision=vision), processor)
    assert [fact.name for fact in facts] == ["patch_size", "temporal_patch_size", "merge_size", "in_channels"]
    assert all(fact.config == fact.processor for fact in facts)
    vision.merge_size = 4
    odd = [
        fact.name
        for fact in qwen_vision.facts(SimpleNamespace(vision=vision), processor)
        if fact.config != fact.processor
    ]
    assert odd == ["merge_size"]
