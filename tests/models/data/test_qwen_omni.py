"""Sound beside images and videos: what is written for media, and what transformers' processor returns of them."""

from types import SimpleNamespace

import pytest
import torch
import transformers

import mmfn
from mmfn.batch import Media
from mmfn.models.data import qwen_omni
from mmfn.models.layers import audio
from tests.tiny import model_of

SECTIONS = {
    "image_processor": {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 4096}},
    "video_processor": {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 4096}},
    "feature_extractor": {"feature_size": 128},
}
RATE = 16_000
CFG = SimpleNamespace(positions_per_second=13.0)


@pytest.fixture(scope="module")
def processor():
    return qwen_omni.processor(SECTIONS, CFG)


def sound(seconds, seed=0):
    return 0.1 * torch.randn(int(RATE * seconds), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("seconds", "count"), [(1.0, 13), (2.37, 31), (0.5, 7), (0.0126, 1)])
def test_a_clip_is_its_placeholder_as_often_as_it_has_features(processor, seconds, count):
    clip = processor.audio(sound(seconds))
    (text,) = processor.texts({"audio": [clip]})["audio"]
    assert (text.text, text.counts) == ("<|audio_pad|>", (count,))
    assert clip.inputs_UF.shape == (-(-clip.grid[0] // 100) * 100, 128)
    assert not clip.inputs_UF[clip.grid[0] :].any()


def test_sound_is_wanted_at_the_rate_of_the_feature_extractor(processor):
    assert processor.sound_rate() == RATE
    slow = {**SECTIONS, "feature_extractor": {"feature_size": 128, "sampling_rate": 8000}}
    assert qwen_omni.processor(slow, CFG).sound_rate() == 8000


def test_a_step_of_a_video_lasts_as_long_as_its_frames(processor):
    frames_u8 = torch.zeros(6, 3, 16, 24, dtype=torch.uint8)
    video = processor.video(frames_u8, [i / 4 for i in range(6)], 4.0)
    assert (video.grid, video.seconds_per_grid) == ((3, 4, 6), 0.5)
    (text,) = processor.texts({"video": [video]})["video"]
    assert (text.text, text.counts) == ("<|video_pad|>", (18,))


@pytest.mark.parametrize("seconds", [1.0, 0.5, 2.0, 0.25, 1 / 3, 2 / 24])
@pytest.mark.parametrize(("grid", "frames"), [((2, 4, 6), 300), ((3, 2, 2), 57), ((1, 4, 4), 1), ((5, 2, 4), 1000)])
def test_a_video_with_its_sound_is_written_as_by_transformers(grid, frames, seconds):
    names = {"video_token": "V", "audio_token": "A", "audio_bos_token": "<", "audio_eos_token": ">"}
    theirs = SimpleNamespace(video_processor=SimpleNamespace(merge_size=2), **names)
    given = {"video_grid_thw": [grid], "video_second_per_grid": [seconds]}
    heard = {"num_audio_tokens": [audio.num_rows(frames)]}
    want = transformers.Qwen3OmniMoeProcessor.replace_video_with_audio_token(
        theirs, given, 0, heard, 0, position_id_per_seconds=13.0
    )
    video = Media(inputs_UF=torch.empty(0), grid=grid, seconds_per_grid=seconds)
    clip = Media(inputs_UF=torch.empty(0), grid=(frames, 1, 1))
    written = qwen_omni.video_with_sound(video, clip, merge_size=2, per_second=13.0)
    text = written.text
    for name, letter in (
        ("<|video_pad|>", "V"),
        ("<|audio_pad|>", "A"),
        ("<|audio_start|>", "<"),
        ("<|audio_end|>", ">"),
    ):
        text = text.replace(name, letter)
    counts = iter(written.counts)
    assert "".join(c * next(counts) if c in "VA" else c for c in text) == want


def inputs(model):
    """Of a row with two clips, 130 and 57 frames, and a video."""
    num_mels, values = model.cfg.audio.num_mels, model.cfg.vision.patch_values
    ids = [9, *[3] * 17, 8, *[2] * 2, 7, *[3] * 8, 6]
    mask = (torch.arange(130) < torch.tensor([130, 57])[:, None]).long()
    return {
        "input_ids": torch.tensor([ids]),
        "input_features": torch.randn(2, num_mels, 130, generator=torch.Generator().manual_seed(0)),
        "feature_attention_mask": mask,
        "num_audio_tokens": torch.tensor([17, 8]),
        "pixel_values_videos": torch.randn(8, values),
        "video_grid_thw": torch.tensor([[2, 2, 2]]),
        "video_second_per_grid": torch.tensor([0.5]),
    }


def test_what_a_processor_returns_becomes_media():
    model = model_of("omni")
    given = inputs(model)
    batch = mmfn.batch_from_hf(given, model)
    tower = batch.towers["audio"]
    assert tower.inputs_UF.shape == (300, model.cfg.audio.num_mels)
    assert torch.equal(tower.inputs_UF[200:257], given["input_features"][1, :, :57].T)
    assert not tower.inputs_UF[257:].any()
    assert not tower.inputs_UF[130:200].any()
    assert batch.positions_3T[0, 19:22].tolist() == [19.0, 25.5, 26.5]  # 13 positions a second, half a second a step


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_attention_mask": torch.ones(2, 131)}, "feature_attention_mask is of torch.float32"),
        ({"feature_attention_mask": torch.ones(2, 131).long()}, r"\[clips, 5, frames\] and \[clips, frames\]"),
        ({"feature_attention_mask": torch.eye(2, 130).long()}, "must be ones, then zeros in every row"),
        ({"feature_attention_mask": None}, "feature_attention_mask is missing although input_features is given"),
        ({"video_second_per_grid": torch.tensor([0.5, 1.0])}, "a positive number of seconds for each of the 1 videos"),
    ],
)
def test_inputs_that_are_refused(change, message):
    model = model_of("omni")
    with pytest.raises(ValueError, match=message):
        mmfn.batch_from_hf(inputs(model) | change, model)
