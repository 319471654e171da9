"""Images and videos of GLM-4.5V against the processors of transformers, and a conversation through all of it."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil, smart_resize
from transformers.models.glm4v.processing_glm4v import Glm4vProcessor
from transformers.models.glm4v.video_processing_glm4v import Glm4vVideoProcessor

import mmfn
from mmfn import tree
from mmfn.batch import IGNORE, IMAGE, VIDEO
from mmfn.models.data import glm_vision
from mmfn.models.data.pixels import target_size
from mmfn.train.build.match import check_match
from mmfn.train.data import Processor, encode_sample, make_chat
from tests import tiny

TINY = {"patch_size": 2, "temporal_patch_size": 1, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CLIP = {"size": {"shortest_edge": 12_544, "longest_edge": 9_633_792}}  # as published


def processor(pixels=TINY, low=16, high=4096, **video):
    config = {**pixels, "size": {"shortest_edge": low, "longest_edge": high}}
    return glm_vision.processor({"image_processor": config, "video_processor": {**config, **video}}, None)


def picture(height, width, frames=1):
    t, c, y, x = torch.meshgrid(*(torch.arange(n) for n in (frames, 3, height, width)), indexing="ij")
    return ((x * x // 3 + 5 * y + 37 * c + x * y // 7 + 11 * t * x) % 256).to(torch.uint8)


@pytest.mark.parametrize(("height", "width"), [(28, 28), (56, 84), (112, 112), (427, 640), (31, 300), (20, 9)])
def test_images_are_those_of_the_library(height, width):
    """A budget counts an image as one of two frames: half as many pixels as its number says."""
    config = {"size": {"shortest_edge": 12_544, "longest_edge": 200_000}}
    own = glm_vision.processor({"image_processor": config}, None)
    image_u8 = picture(height, width)[0]
    media = own.image(image_u8)
    theirs = Glm4vImageProcessorPil(**config)(images=[image_u8.numpy()], return_tensors="pt")
    assert list(media.grid) == theirs["image_grid_thw"][0].tolist()
    assert media.grid[1] * media.grid[2] * 14**2 <= 100_000
    error = (media.in_floats().inputs_UF - theirs["pixel_values"]).abs()
    if (media.grid[1] * 14, media.grid[2] * 14) == (height, width):
        assert error.max() < 1e-4
    assert error.mean() < 0.6 / 255 / 0.26  # grey levels: PIL's filter rounds its weights otherwise


def test_sizes_are_those_of_the_library_at_the_published_bounds():
    spec = glm_vision.processor({"image_processor": CLIP}, None).image_spec
    for height, width in ((100, 100), (1080, 1920), (4000, 3000), (13, 27), (42, 8000), (14, 14), (2200, 2190)):
        want = smart_resize(2, height, width, 2, 28, 12_544, 9_633_792)
        assert target_size(height, width, spec, spec.temporal_patch_size) == want


@pytest.mark.parametrize(
    ("num_frames", "rate"),
    [(24, 8.0), (5, 2.0), (1, 30.0), (900, 29.97), (61, 7.3), (12_000, 25.0), (400, 1.0), (700, 2.0)],
)
def test_frames_are_those_the_library_reads(num_frames, rate):
    spec = processor(max_duration=300).video_spec
    metadata = SimpleNamespace(fps=rate, total_num_frames=num_frames, duration=num_frames / rate)
    reader = SimpleNamespace(fps=2.0, max_duration=300)
    want = Glm4vVideoProcessor.sample_frames(reader, metadata).tolist()
    got = glm_vision.sample_frames(num_frames, rate, spec)
    assert len(want) % 2 == 0
    assert got + got[-1:] * (len(got) % 2) == want
    assert processor(max_duration=300).sampling().select(num_frames, rate) == got


@pytest.mark.parametrize("num_frames", [2, 5, 6])
def test_a_video_is_written_as_the_library_writes_it(num_frames):
    """Frames by the image's token between marks; the whole second of the first frame of a group behind it."""
    own = processor({**TINY, "temporal_patch_size": 2}, low=32)
    times = [0.0, 0.7, 1.4, 2.6, 3.1, 9.9][:num_frames]
    media = own.video(picture(8, 12, num_frames), times, 2.0)
    groups = -(-num_frames // 2)
    assert media.grid[0] == groups
    assert media.times == tuple(times[::2])
    metadata = SimpleNamespace(fps=2.0, timestamps=[*times, times[-1]][: 2 * groups])
    inputs = {"video_grid_thw": torch.tensor([media.grid]), "video_metadata": [metadata]}
    writer = SimpleNamespace(image_token="<|image|>", video_processor=SimpleNamespace(merge_size=2))
    writer.replace_frame_token_id = lambda *args, **kwargs: Glm4vProcessor.replace_frame_token_id(
        writer, *args, **kwargs
    )
    want = Glm4vProcessor.replace_video_token(writer, inputs, 0)
    (text,) = own.texts({"video": [media]})["video"]
    count = media.grid[1] * media.grid[2] // 4
    assert text.counts == (count,) * groups
    assert text.text.replace("<|image|>", "<|image|>" * count) == f"<|begin_of_video|>{want}<|end_of_video|>"


def test_an_odd_number_of_frames_counts_as_the_next_even_one():
    """Of 5 frames the library makes 6 before it asks what the budget allows."""
    own = processor({**TINY, "temporal_patch_size": 2}, low=32, high=600)
    media = own.video(picture(12, 16, 5), [0.0, 0.5, 1.0, 1.5, 2.0], 2.0)
    assert (
        (media.grid[1] * 2, media.grid[2] * 2)
        == smart_resize(6, 12, 16, 2, 4, 32, 600)
        != smart_resize(5, 12, 16, 2, 4, 32, 600)
    )


@pytest.mark.parametrize("text", ["<|begin_of_video|><|video|><|end_of_video|>", "<|video|>"])
def test_a_video_brings_its_marks(text):
    (match,) = glm_vision.SIDE.chat.pattern.finditer(text)
    assert (match.lastgroup, match.group()) == ("video", text)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ({"max_duration": 0}, "max_duration of a video processor must be a positive integer, got 0"),
        ({"max_duration": 1.5}, "must be a positive integer, got 1.5"),
        ({"fps": -1}, "fps of a video processor must be a positive number"),
        ({"do_sample_frames": False}, "'do_sample_frames' is False"),
        ({"patch_size": 4}, "patch_size is 2 for images but 4 for videos"),
    ],
)
def test_what_it_does_not_do_is_refused(video, message):
    with pytest.raises(ValueError, match=message):
        processor(**video)


def test_what_a_saved_processor_says_beside_is_read_over():
    plain, saved = processor(), processor(num_frames=16, max_image_size={"longest_edge": 1})
    assert plain == saved
    assert (saved.video_spec.fps, saved.video_spec.max_duration) == (2.0, 300)
    without = glm_vision.processor({"image_processor": TINY}, None)
    with pytest.raises(ValueError, match=r"no video_preprocessor_config\.json; add it or remove the videos"):
        without.sampling()


# ---- a conversation

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content[0].text }} "
    "<|user|>{% endgeneration %}{% else %}{% for p in m.content %}{% if p.type == 'image' %}"
    "<|begin_of_image|><|image|><|end_of_image|>{% elif p.type == 'video' %}<|begin_of_video|><|video|><|end_of_video|>"
    "{% else %} {{ p.text }} {% endif %}{% endfor %}{% endif %}{% endfor %}"
)
SPECIAL = ("<|image|>", "<|video|>", "<|begin_of_video|>", "<|end_of_video|>", "<|begin_of_image|>", "<|end_of_image|>")
WORDS = ("other", *SPECIAL, "<|user|>", "<|assistant|>", "what", "a", "bird", *map(str, range(10)))


def test_a_conversation_with_both_kinds_becomes_a_batch():
    model = tiny.model_of("glm", 3)
    model = mmfn.Model(family=model.family, cfg=model.cfg, params=model.params, hf_config=tiny.TINY["glm"](3))
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="other"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens([AddedToken(word, special=True) for word in WORDS[1:9]])
    chat = make_chat(
        PreTrainedTokenizerFast(tokenizer_object=raw),
        model.family.data.chat,
        lambda tokens_T: model.family.kinds(tokens_T, model.cfg),
        TEMPLATE,
    )
    own = Processor(chat=chat, media=processor())
    check_match(model, own)
    media = {
        "image": [own.media.image(picture(4, 8)[0])] * 2,
        "video": [own.media.video(picture(4, 4, 2), [0.0, 3.5], 2.0)],
    }
    parts = [{"type": kind} for kind in ("image", "video", "image")]
    user = {"role": "user", "content": [*parts, {"type": "text", "text": "what"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a bird"}]}
    sample = encode_sample([user, answer], own, media)
    names = [WORDS[token] for token in sample.tokens_T.tolist()]
    still = ["<|begin_of_image|>", "<|image|>", "<|image|>", "<|end_of_image|>"]
    frames = [["<|begin_of_image|>", "<|image|>", "<|end_of_image|>", second] for second in ("0", "3")]
    video = ["<|begin_of_video|>", *frames[0], *frames[1], "<|end_of_video|>"]
    assert names == ["<|user|>", *still, *video, *still, "what", "<|assistant|>", "a", "bird", "<|user|>"]
    assert [(sample.kinds_T == kind).sum().item() for kind in (IMAGE, VIDEO)] == [4, 2]
    assert [WORDS[t] for t in sample.labels_T[sample.labels_T != IGNORE].tolist()] == ["a", "bird", "<|user|>"]
    inputs = {
        "input_ids": sample.tokens_T[None],
        "mm_token_type_ids": sample.kinds_T[None],
        "labels": sample.labels_T[None],
        "pixel_values": torch.cat([one.in_floats().inputs_UF for one in media["image"]]),
        "image_grid_thw": torch.tensor([one.grid for one in media["image"]]),
        "pixel_values_videos": media["video"][0].in_floats().inputs_UF,
        "video_grid_thw": torch.tensor([media["video"][0].grid]),
    }
    batch, want = mmfn.batch_from_hf(inputs, model), model.family.pack([sample], model.cfg)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(batch), tree.leaves(want), strict=True))
    prompt = model.family.pack([encode_sample([user], own, media, is_prompt=True)], model.cfg)
    (answer_ids,) = mmfn.generate(model, prompt, max_new_tokens=4)
    assert len(answer_ids) == 4
