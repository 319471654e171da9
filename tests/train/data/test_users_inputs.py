"""Inputs of real users, by the kinds of bug reports: what is read, what is learned, what is refused in a sentence."""

import json
import re

import pytest
import torch
from PIL import Image

from mmfn.batch import IGNORE
from mmfn.models.data.chat import read_template
from mmfn.train.data import Dataset, decode_image, load_processor
from mmfn.train.data.bad import BadSample
from mmfn.train.data.tokenizer import own_template
from mmfn.train.dialect import Dialect
from mmfn.train.run.answer import text_of
from mmfn.train.run.evaluate import Answer, truth_tokens
from tests.train.data.clips import TURNS, write_clip
from tests.train.data.input_cases import END, HTML, LEARNED, MARKERS, READ, REFUSED, ROOT, said, shown, talk, turn


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With two pictures, a sound and a folder."""
    out = tmp_path_factory.mktemp("users")
    for name, height in (("a.png", 32), ("ä b.png", 31)):
        Image.new("RGB", (32, height), (90, 120, 30)).save(out / name)
    (out / "a.wav").touch()
    (out / "sub").mkdir()
    return out


@pytest.fixture(scope="module")
def open_set(folder, processor):
    def open_(entry, processor=processor, **more):
        text = entry if isinstance(entry, str) else json.dumps([entry])
        (folder / "d.json").write_text(text.replace(ROOT, str(folder)), encoding="utf-8")
        return Dataset(folder / "d.json", processor, cache_bytes=0, **more)

    return open_


def text_of_tokens(processor, tokens_T):
    """Runs of media tokens written once."""
    return re.sub(r"(<\|(?:image|video)_pad\|>)+", r"\1", processor.chat.tokenizer.decode(tokens_T.tolist()))


@pytest.mark.parametrize("name", READ)
def test_what_is_read(open_set, processor, name):
    entry, expected = READ[name]
    assert text_of_tokens(processor, open_set(entry).sample(0).tokens_T) == expected


@pytest.mark.parametrize("name", LEARNED)
def test_what_is_learned(open_set, processor, name):
    entry, expected = LEARNED[name]
    labels_T = open_set(entry).sample(0).labels_T
    assert text_of_tokens(processor, labels_T[labels_T != IGNORE]) == expected


def refusal(dataset):
    """The reason why row 0 is refused, read or only measured: one short sentence with a fix."""
    with pytest.raises(BadSample) as caught:
        dataset.sample(0)
    for text in (str(caught.value), caught.value.reason):
        assert "\n" not in text
        assert ". " not in text.replace("...", "").partition(": ")[2]
    assert len(caught.value.reason) < 400
    assert re.search("; [a-z]|: lower ", caught.value.reason)
    with pytest.raises(BadSample) as measured:
        dataset.measure(0)
    assert measured.value.reason == caught.value.reason
    return caught.value.reason


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(open_set, folder, name):
    entry, expected = REFUSED[name]
    assert expected in refusal(open_set(entry))


def entries_with(role, text):
    """A conversation in every format in which `role` says `text`; [0]: what is around it as a pattern."""
    question, answer = (text if role == one else "hi" for one in ("user", "assistant"))
    system = text if role == "system" else "Arr."
    turns = [turn("system", system), turn("human", question), turn("gpt", answer)]
    messages = [said("system", system), said("user", question), said("assistant", answer)]
    return {
        "messages": {"messages": messages},
        "openai": {"messages": [said("developer", system), *messages[1:]]},
        "llava": {"conversations": turns},
        "sharegpt": {"conversations": turns[1:], "system": system},
        "multimodal_tool": {"messages": messages},
        "alpaca": {"instruction": question, "output": answer, "system": system},
    }


@pytest.mark.parametrize("marker", [*MARKERS, HTML])
@pytest.mark.parametrize("format", ["messages", "openai", "llava", "sharegpt", "multimodal_tool", "alpaca"])
def test_markers_that_are_text(open_set, processor, format, marker):
    """In what the system and the assistant say, and in the user's parts of text; a user's string says the way out."""
    for role in ("system", "assistant"):
        sample = open_set(entries_with(role, marker)[format], dialect=Dialect(format=format)).sample(0)
        assert f"<|im_start|>{role}\n{marker}{END}" in processor.chat.tokenizer.decode(sample.tokens_T.tolist())
    entry = entries_with("user", marker)[format]
    reason = refusal(open_set(entry, dialect=Dialect(format=format)))
    assert re.match(
        r"it has 1 (\w+) placeholders for 0 \1s; .*\(where <\1> is meant as text, write the content as", reason
    )
    if format in ("messages", "openai"):
        entry["messages"][1]["content"] = [{"type": "text", "text": marker}]
        sample = open_set(entry, dialect=Dialect(format=format)).sample(0)
        assert f"<|im_start|>user\n{marker}{END}" in processor.chat.tokenizer.decode(sample.tokens_T.tolist())


BUDGETS = [  # settings of a part -> tokens of a picture of 32 x 32, of which 8 x 8 are one
    ({}, 4),
    ({"min_pixels": 1024, "max_pixels": 1024}, 16),
    ({"max_pixels": 64}, 1),
    ({"resized_height": 16, "resized_width": 64, "max_pixels": 4096}, 16),
]


@pytest.mark.parametrize(("settings", "num_tokens"), BUDGETS)
@pytest.mark.parametrize("is_listed", [True, False])
def test_settings_of_a_part_are_followed(open_set, processor, settings, num_tokens, is_listed):
    item = {"image": "a.png", **settings}
    entry = talk("<image>", images=[item]) if is_listed else shown({"type": "image", **item})
    assert int((open_set(entry).sample(0).kinds_T != 0).sum()) == num_tokens


TRUTHS = [  # (template, answer, what the model has to write)
    ("qwen3_vl", "<|box_start|>(1,2),(3,4)<|box_end|>", "<|box_start|>(1,2),(3,4)<|box_end|>"),
    ("qwen3_vl", "A\u030angstro\u0308m", "\u00c5ngstr\u00f6m"),
    ("qwen3_vl", "\n\nyo", "\n\nyo"),
    ("qwen3_vl", " ", " "),
    ("qwen3_vl", "", ""),
    ("qwen3_vl", "👩‍🔬 नमस्\u200dते", "👩‍🔬 नमस्\u200dते"),
    ("qwen3_vl", "<think>a</think>b", "<think>a</think>b"),
    ("qwen3_vl_thinking", "<think>\na\n</think>\n\nb", "a\n</think>\n\nb"),
    ("qwen3_vl_thinking", "b", "\n</think>\n\nb"),
    ("qwen3_5", "<think>\na\n</think>\n\nb", "a\n</think>\n\nb"),
    ("qwen3_5", "  b\n", "\n</think>\n\nb"),
    ("qwen3_5_nothink", "b", "b"),
    ("qwen3_omni", "b", "<think>\n\n</think>\n\nb"),
    ("qwen2_5_vl", "b c ", "b c "),
]


@pytest.mark.parametrize(("template", "answer", "expected"), TRUTHS)
@pytest.mark.parametrize("num_before", [0, 1])
def test_a_model_that_gives_the_samples_tokens_is_right(digits, open_set, template, answer, expected, num_before):
    own = load_processor(digits / "model", read_template(template))
    dataset = open_set({"messages": talk()["messages"] * num_before + talk("q", answer)["messages"]}, own)
    assert written_answer(dataset, own) == expected


@pytest.mark.parametrize("template", ["qwen3_vl", "qwen3_5", "qwen3_omni"])
def test_a_call_is_an_answer(digits, open_set, template):
    own = load_processor(digits / "model", read_template(template))
    call = {"function": {"name": "f", "arguments": {}}}
    entry = {"messages": [said("user", "hi"), said("assistant", "", tool_calls=[call])]}
    assert "<tool_call>" in written_answer(open_set(entry, own), own)


def written_answer(dataset, own):
    """What stands behind the prompt, once by the sample's tokens and once by the truth that a prediction meets."""
    (prompt, _), answer, sample = dataset.prompt(0), dataset.answer(0), dataset.sample(0)
    tokenizer, length = own.chat.tokenizer, prompt.tokens_T.numel()
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    truth = text_of(truth_tokens(answer, prompt), tokenizer, ends)
    assert sample.tokens_T[:length].equal(prompt.tokens_T)
    prediction = text_of(sample.tokens_T[length:].tolist(), tokenizer, ends)
    assert Answer(id="", question="", prediction=prediction, truth=truth).is_correct
    assert not Answer(id="", question="", prediction=prediction + "x", truth=truth).is_correct
    return truth


PICTURES = {  # name -> (mode, its values, how it is saved, what is seen of it)
    "black under alpha 0": ("RGBA", (0, 0, 0, 0), {}, (255, 255, 255)),
    "red under half": ("RGBA", (255, 0, 0, 128), {}, (255, 127, 127)),
    "red under all": ("RGBA", (255, 0, 0, 255), {}, (255, 0, 0)),
    "grey under alpha 0": ("LA", (7, 0), {}, (255, 255, 255)),
    "a colour that is none": ("RGB", (1, 2, 3), {"transparency": (1, 2, 3)}, (255, 255, 255)),
    "another colour is none": ("RGB", (1, 2, 3), {"transparency": (9, 9, 9)}, (1, 2, 3)),
    "a grey that is none": ("L", 5, {"transparency": 5}, (255, 255, 255)),
    "a palette": ("P", 3, {}, (10, 20, 30)),
    "a palette with a colour that is none": ("P", 3, {"transparency": 3}, (255, 255, 255)),
    "black and white": ("1", 1, {}, (255, 255, 255)),
}


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("suffix", ["png", "webp", "gif"])
def test_what_is_seen_of_a_picture(tmp_path, name, suffix):
    mode, values, saving, expected = PICTURES[name]
    if (suffix != "png" and (saving or mode not in ("RGBA", "P"))) or (
        suffix == "gif" and mode == "RGBA" and values[3] == 128
    ):
        suffix = "png"  # the others do not hold it
    image = Image.new(mode, (5, 4), values)
    if mode == "P":
        image.putpalette([0] * 9 + [10, 20, 30])
    image.save(tmp_path / f"a.{suffix}", **saving, **({"lossless": True} if suffix == "webp" else {}))
    seen_3HW = decode_image(tmp_path / f"a.{suffix}")
    assert torch.equal(seen_3HW, torch.tensor(expected, dtype=torch.uint8)[:, None, None].expand(3, 4, 5))


@pytest.mark.parametrize("angle", [0, *TURNS])
def test_a_video_is_turned(open_set, folder, angle):
    pytest.importorskip("av", reason="PyAV is an optional dependency")
    write_clip(folder / "v.mp4", num=20, rate=10, matrix=TURNS.get(angle, (1, 0, 0, 1)))
    (video,) = open_set(talk("<video>?", videos=["v.mp4"])).sample(0).videos
    assert (video.grid[1] > video.grid[2]) == (angle in (90, 270))


def test_videos_of_a_variable_rate_and_cut_ones(open_set, folder, processor):
    pytest.importorskip("av", reason="PyAV is an optional dependency")
    stamps = [0, 50, 100, 1000, 2000, 2100, 2200, 4000]
    write_clip(folder / "v.mkv", stamps_ms=stamps, rate=30)
    (video,) = open_set(talk("<video>?", videos=["v.mkv"])).sample(0).videos
    assert video.times[-1] > 2.5  # of the eight frames as many as 4 seconds have, not as many as 8 / 30
    whole = write_clip(folder / "w.mp4", num=60, rate=30, movflags="faststart").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    assert "cut.mp4" in refusal(open_set(talk("<video>?", videos=["cut.mp4"])))


def test_lists_of_templates(digits):
    """One is that one; of several a user says which, where the library would choose by whether there are tools."""
    own = load_processor(digits / "model")
    tokenizer, source = own.chat.tokenizer, own.chat.template
    for one in (source, {"default": source}, [{"name": "default", "template": source}]):
        tokenizer.chat_template = one
        assert own_template(tokenizer) == source
    for several in ({"default": source, "tool_use": source}, [{"name": name, "template": source} for name in "ab"]):
        tokenizer.chat_template = several
        with pytest.raises(ValueError, match=r"several chat templates \(\[.*\]\); give one as data\.template"):
            own_template(tokenizer)
    tokenizer.chat_template = [3]
    with pytest.raises(ValueError, match="give one as data"):
        own_template(tokenizer)


def test_there_are_enough():
    assert len(READ) + len(LEARNED) + len(REFUSED) >= 60
