import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mmfn.batch import IGNORE, IMAGE, VIDEO
from mmfn.errors import MissingPackageError
from mmfn.models.layers.patches import lay_frames
from mmfn.train.data import Dataset, decode_frames, decode_image, media
from mmfn.train.data.bad import BadSample
from mmfn.train.dialect import Dialect


@pytest.fixture
def folder(tmp_path):
    """Frames of two sizes and a dataset with an image, a video of frames, several turns, and text alone."""
    (tmp_path / "media").mkdir()
    rng = np.random.default_rng(0)
    for index in range(5):
        Image.fromarray(rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(tmp_path / "media" / f"{index}.png")
    frames = [f"media/{i}.png" for i in range(5)]
    entries = [
        {
            "messages": [
                {"role": "user", "content": "<image>One?"},
                {"role": "assistant", "content": "One."},
                {"role": "user", "content": "<video>And <image>?"},
                {"role": "assistant", "content": "Two."},
            ],
            "images": ["media/0.png", "media/1.png"],
            "videos": [frames],
        },
        {"id": "text", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho."}]},
        {"id": "asked", "messages": [{"role": "user", "content": "Hi"}]},
    ]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    return tmp_path


def _write(folder, **change):
    entry = {"id": "x", "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a"}]}
    path = folder / "one.jsonl"
    path.write_text(json.dumps({**entry, **change}))
    return path


def test_sample_of_images_and_video(folder, processor):
    sample = Dataset(folder / "data.json", processor).sample(0)
    tokenizer = processor.chat.tokenizer
    supervised = sample.labels_T != IGNORE
    assert torch.equal(sample.labels_T[supervised], sample.tokens_T[supervised])
    assert tokenizer.decode(sample.tokens_T[supervised]) == "One.<|im_end|>\nTwo.<|im_end|>\n"
    first = processor.media.image(decode_image(folder / "media" / "0.png"))
    assert torch.equal(sample.images[0].inputs_UF, first.inputs_UF)
    footage = decode_frames([folder / "media" / f"{i}.png" for i in range(5)], processor.media.sampling())
    video = processor.media.video(footage.frames_u8, footage.times, 2.0, footage.shape)
    assert torch.equal(sample.videos[0].inputs_UF, video.inputs_UF)
    assert sample.videos[0].times == video.times == (0.25, 1.25, 2.0)
    assert sample.videos[0].grid[0] == 3
    assert "<0.2 seconds>" in tokenizer.decode(sample.tokens_T)  # mean of 0.0 and 0.5, as printed by %.1f
    assert "<2.0 seconds>" in tokenizer.decode(sample.tokens_T)
    laid = lay_frames(sample, 2, 96)
    assert sum(laid.segments[0]) == sum(m.inputs_UF.shape[0] for m in sample.media(IMAGE, VIDEO))
    assert int((sample.kinds_T == VIDEO).sum()) * 4 == sample.videos[0].inputs_UF.shape[0]


def test_text_alone(folder, processor):
    data = Dataset(folder / "data.json", processor)
    assert len(data) == 3
    assert data.sample(1).images == data.sample(1).videos == ()
    assert not data.sample(1).kinds_T.any()
    assert not (data.sample(2).labels_T != IGNORE).any()


def test_prompt_is_the_beginning_of_its_sample(folder, processor, digits):
    for data, index in ((Dataset(folder / "data.json", processor), 0), (Dataset(digits / "eval.json", processor), 5)):
        sample, (prompt, truth) = data.sample(index), data.prompt(index)
        T = prompt.tokens_T.numel()
        assert torch.equal(prompt.tokens_T, sample.tokens_T[:T])
        assert torch.equal(prompt.kinds_T, sample.kinds_T[:T])
        assert (prompt.labels_T == IGNORE).all()
        assert processor.chat.tokenizer.decode(sample.tokens_T[T:]) == truth + "<|im_end|>\n"
        assert prompt.id == sample.id


def test_prompt_drops_media_after_it(folder, processor):
    messages = [
        {"role": "user", "content": "<image>One?"},
        {"role": "assistant", "content": [{"type": "text", "text": "O"}, {"type": "text", "text": "ne."}]},
        {"role": "user", "content": "<image>Late"},
    ]
    data = Dataset(_write(folder, messages=messages, images=["media/0.png", "media/1.png"]), processor)
    prompt, truth = data.prompt(0)
    assert truth == "One."
    assert len(prompt.images) == 1
    assert int((prompt.kinds_T == IMAGE).sum()) == 2


def test_prompt_needs_an_answer(folder, processor):
    with pytest.raises(
        ValueError, match=r"sample 'asked' of .*data\.json', entry 2: it has no assistant turn after a prompt"
    ):
        Dataset(folder / "data.json", processor).prompt(2)


@pytest.mark.parametrize("name", ["/etc/hostname", "../out.png", "media/../../out.png"])
def test_paths_outside_are_refused(folder, processor, name):
    with pytest.raises(ValueError, match=r"one\.jsonl', line 1: media path .* leaves the media root"):
        Dataset(_write(folder, images=[name]), processor).sample(0)
    video = _write(folder, messages=[{"role": "user", "content": "<video>"}], videos=[["media/0.png", name]])
    with pytest.raises(ValueError, match="leaves the media root"):
        Dataset(video, processor).sample(0)


def test_links_that_lead_outside_are_refused(folder, processor, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "a.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(outside)
    os.symlink(outside, folder / "media" / "link.png")
    data = Dataset(_write(folder, images=["media/link.png"]), processor)
    with pytest.raises(ValueError, match=r"sample 'x' of .*media path 'media/link\.png' leaves the media root"):
        data.sample(0)


def test_links_in_a_circle_are_refused(folder, processor):
    os.symlink("loop.png", folder / "media" / "loop.png")
    with pytest.raises(ValueError, match=r"sample 'x' of .*media.*loop\.png"):
        Dataset(_write(folder, images=["media/loop.png"]), processor).sample(0)


def test_media_root(folder, processor):
    data = Dataset(_write(folder, images=["0.png"]), processor, media_root=folder / "media")
    assert len(data.sample(0).images) == 1
    with pytest.raises(
        ValueError, match=r"data\.root '.*nowhere' is no folder; give the one that paths of media begin"
    ):
        Dataset(folder / "data.json", processor, media_root=folder / "nowhere")


def test_what_is_learned_does_not_depend_on_packages(folder, processor, monkeypatch):
    """Without PyAV a video ends the run: it is no bad sample, which a run would leave out."""
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    entry = {"messages": [{"role": "user", "content": "<video>"}, {"role": "assistant", "content": "x"}]}
    (folder / "a.mp4").touch()
    (folder / "clip.json").write_text(json.dumps([entry | {"videos": ["a.mp4"]}]))
    (folder / "a.mp4").write_bytes(b"anything")
    data = Dataset(folder / "clip.json", processor)
    for read in (data.sample, data.measure, data.prompt, data.answer):
        with pytest.raises(MissingPackageError, match=r"a\.mp4' needs PyAV to be decoded; install it") as error:
            read(0)
        assert not isinstance(error.value, BadSample)


def test_media_that_fail_name_the_sample(folder, processor):
    (folder / "broken.png").write_bytes(b"no")
    with pytest.raises(
        ValueError, match=r"sample 'x' of .*one\.jsonl', line 1: image .*broken\.png' could not be decoded"
    ):
        Dataset(_write(folder, images=["broken.png"]), processor).sample(0)
    Image.new("RGB", (1, 201)).save(folder / "long.png")
    with pytest.raises(ValueError, match=r"sample 'x' of .*one\.jsonl', line 1: image 'long\.png': .*200 times"):
        Dataset(_write(folder, images=["long.png"]), processor).sample(0)
    without = replace(processor, media=replace(processor.media, video_spec=None))
    with pytest.raises(ValueError, match=r"sample '0' of .*no video_preprocessor_config\.json"):
        Dataset(folder / "data.json", without).sample(0)


def test_placeholder_tokens_in_the_text_are_refused(folder, processor):
    messages = [{"role": "user", "content": "<|image_pad|>"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(ValueError, match=r"sample 'x' of .*message 0 holds '<\|image_pad\|>'"):
        Dataset(_write(folder, messages=messages), processor).sample(0)


def test_the_first_samples_alone(digits, processor):
    few, all_ = (Dataset(digits / "eval.json", processor, max_samples=n) for n in (3, None))
    assert list(few.records) == all_.records[:3]
    assert len(all_) > 3


def test_a_file_in_words_of_its_own(folder, processor):
    entry = {"talk": [{"from": "me", "value": "<image>?"}, {"from": "gpt", "value": "a"}], "image": "media/0.png"}
    (folder / "own.json").write_text(json.dumps([entry]))
    dialect = Dialect(format="sharegpt", columns={"messages": "talk"}, tags={"user_tag": "me"})
    messages = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a"}]
    known = Dataset(_write(folder, messages=messages, images=["media/0.png"]), processor).sample(0)
    sample = Dataset(folder / "own.json", processor, dialect=dialect).sample(0)
    assert torch.equal(sample.tokens_T, known.tokens_T)
    assert torch.equal(sample.labels_T, known.labels_T)


def test_long_samples_are_refused_not_cut(folder, processor):
    path = _write(folder, images=["media/0.png"])
    length = Dataset(path, processor).sample(0).tokens_T.numel()
    assert Dataset(path, processor, max_tokens=length).sample(0).tokens_T.numel() == length
    with pytest.raises(
        ValueError, match=rf"sample 'x' of .*one\.jsonl', line 1: it has {length} tokens but max_tokens is {length - 1}"
    ):
        Dataset(path, processor, max_tokens=length - 1).sample(0)


def test_cache_is_bounded_and_changes_nothing(digits, processor, monkeypatch):
    decoded = []
    monkeypatch.setattr(media, "decode_image", lambda path, limits: decoded.append(path) or decode_image(path))
    size = 16 * 96 + 3 * 48 * 8  # patches in bytes, three rows of 48 int64
    data, bare = (Dataset(digits / "eval.json", processor, cache_bytes=n) for n in (2 * size + 1, 0))
    first = [data.sample(i) for i in range(4)]
    assert len(decoded) == 4
    again = [data.sample(i) for i in range(4)]
    assert len(decoded) == 6  # samples 0 and 1 were kept
    for one, two, three in zip(first, again, [bare.sample(i) for i in range(4)], strict=True):
        assert torch.equal(one.tokens_T, two.tokens_T)
        assert torch.equal(one.labels_T, three.labels_T)
        assert torch.equal(one.images[0].inputs_UF, three.images[0].inputs_UF)


def test_the_parts_of_a_sample_are_decoded_once(digits, processor, monkeypatch):
    """Those that evaluation asks for one after the other, also where the cache has no room left."""
    decoded = []
    monkeypatch.setattr(media, "decode_image", lambda path, limits: decoded.append(path) or decode_image(path))
    data = Dataset(digits / "eval.json", processor, cache_bytes=0)
    for index in range(3):
        parts = data.prompt(index)[0], data.sample(index), data.answer(index)
        assert len(decoded) == index + 1
        assert len({part.images[0].inputs_UF.data_ptr() for part in parts}) == 1
    data.sample(0)
    assert len(decoded) == 4


def test_samples_from_threads_equal_samples_in_turn(digits, processor):
    data = Dataset(digits / "eval.json", processor, cache_bytes=200_000)
    gate = threading.Barrier(4)

    def work(_):
        gate.wait()
        return [data.sample(i) for i in range(60)]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(4)))
    bare = Dataset(digits / "eval.json", processor, cache_bytes=0)
    for index in range(60):
        expected = bare.sample(index)
        for result in results:
            assert torch.equal(result[index].labels_T, expected.labels_T)
            assert torch.equal(result[index].images[0].inputs_UF, expected.images[0].inputs_UF)
