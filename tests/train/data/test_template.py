import copy
import json
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import trainers

from mmfn.batch import IMAGE, TEXT, VIDEO, Media
from mmfn.models import family
from mmfn.models.data.chat import ChatFormat, MediaText, read_template
from mmfn.models.data.qwen_vision import video_text
from mmfn.train.chat_options import ChatOptions
from mmfn.train.data import load_processor, template
from mmfn.train.data.template import Chat, encode, render

CHATS = json.loads((Path(__file__).parents[2] / "goldens" / "chats.json").read_text(encoding="utf-8"))
# the ChatML core of the format, written apart from the template under test, without generation blocks
PLAIN = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{% if p.type == 'image' %}\
<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def tokenizer(digits_module):
    """The tokenizer of the example, with merges: words, runs of line ends and punctuation join across borders."""
    made = digits_module.make_tokenizer()
    trainer = trainers.BpeTrainer(vocab_size=420, show_progress=False)
    corpus = ["a:<0.5 seconds> b:<1.0 seconds> What is this? Two.\n\n\nHello there\n\n"] * 50
    return made.train_new_from_iterator(corpus, 700, initial_alphabet=trainer.initial_alphabet)


def make_chat(tokenizer, source=""):
    """A chat of the family with the ids that this tokenizer gives its tokens."""
    qwen3 = family("qwen3_vl")
    cfg = SimpleNamespace(
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in qwen3.data.chat.tokens.items()}
    )
    return template.make_chat(tokenizer, qwen3.data.chat, partial(qwen3.kinds, cfg=cfg), source)


def images(*counts):
    return {"image": [MediaText(text="<|image_pad|>", counts=(count,)) for count in counts]}


def video(*times, tokens_per_group):
    """The text of a video with one row of features in every group."""
    return video_text(Media(inputs_UF=None, grid=(len(times), 2, 2 * tokens_per_group), times=times), merge_size=2)


@pytest.fixture(scope="module")
def chat(tokenizer):
    return make_chat(tokenizer)


def conversations(num, with_media):
    """Random conversations with awkward borders."""
    rand = random.Random(0)
    words = ["hi", "\n", "  x ", "汉字", "e\u0301", "a: <b>", "{{ y }}", "Straße\n\n", "What is this?", ""]

    def text():
        return "".join(rand.choice(words) for _ in range(rand.randint(0, 4)))

    for _ in range(num):
        messages = [{"role": "system", "content": text()}] if rand.random() < 0.4 else []
        for _ in range(rand.randint(1, 3)):
            parts = [{"type": "text", "text": text()} for _ in range(rand.randint(1, 3))]
            if with_media:
                parts.insert(rand.randint(0, len(parts)), {"type": "image"})
            messages += [
                {"role": "user", "content": parts if with_media or rand.random() < 0.5 else text()},
                {"role": "assistant", "content": text()},
            ]
        yield messages


def tokens_apart(tokenizer, text):
    """(ids, what is learned) of a text in which headers and answers are tokenized apart, as other projects do."""
    ids, learned = [], []
    for number, piece in enumerate(re.split(r"(?<=<\|im_start\|>assistant\n)", text)):
        for part, is_answer in zip(
            re.split(r"(?<=<\|im_end\|>\n)", piece, maxsplit=1), (number > 0, False), strict=False
        ):
            ids += tokenizer(part)["input_ids"]
            learned += [is_answer] * (len(ids) - len(learned))
    return ids, learned


@pytest.mark.parametrize("index", range(len(CHATS)))
def test_text_of_the_published_template(tokenizer, chat, index):
    case = {**CHATS[index]}
    expected = case.pop("text")
    assert chat.template == tokenizer.chat_template
    assert tokenizer.apply_chat_template(case.pop("messages"), tokenize=False, **case) == expected


@pytest.mark.parametrize("with_media", [False, True])
def test_tokens_and_mask_of_the_library(tokenizer, chat, with_media):
    """One token per image, so that the library's own mask covers the same tokens.

    Where an answer begins with a line end, the library joins it with that of the header to a token that a prompt, which
    ends with the header, leaves no model to write: there the two are tokenized apart.
    """
    num_equal = 0
    for messages in conversations(60, with_media):
        expected = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        num_images = expected["input_ids"].count(tokenizer.convert_tokens_to_ids("<|image_pad|>"))
        ours = encode(messages, chat, texts=images(*[1] * num_images))
        ids, learned = tokens_apart(tokenizer, tokenizer.apply_chat_template(messages, tokenize=False))
        assert (ours.tokens_T.tolist(), ours.supervised_T.tolist()) == (ids, learned)
        is_joined = any(re.match(r"\s*\n", m["content"]) for m in messages if m["role"] == "assistant")
        is_equal = (ids, learned) == (expected["input_ids"], [bool(m) for m in expected["assistant_masks"]])
        assert is_equal or is_joined
        num_equal += is_equal
    assert 20 < num_equal < 60


def test_supervised_text_is_the_answer_and_its_end(tokenizer, chat):
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    out = encode(messages, chat, texts=images(3))
    assert tokenizer.decode(out.tokens_T[out.supervised_T]) == "Two.<|im_end|>\nYes.<|im_end|>\n"
    assert tokenizer.decode(out.tokens_T[~out.supervised_T]) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|image_pad|>"
        "<|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert out.kinds_T.tolist() == [IMAGE if t == image_id else TEXT for t in out.tokens_T.tolist()]


def test_a_prompt_ends_where_its_answer_begins(tokenizer, chat):
    """Whatever the answer begins with, in training and generation it stands behind the same tokens."""
    for messages in conversations(60, True):
        turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        whole = encode(messages, chat, texts=images(*[1] * len(turns)))
        for number, place in enumerate(turns):
            prompt = encode(messages[:place], chat, texts=images(*[1] * (number + 1)), is_prompt=True)
            length = prompt.tokens_T.numel()
            assert torch.equal(prompt.tokens_T, whole.tokens_T[:length])
            assert not whole.supervised_T[length - 1]
            assert whole.supervised_T[length]
            assert not prompt.supervised_T.any()


def test_repeated_pads_equal_tokenizing_the_expanded_text(tokenizer, chat):
    for messages in conversations(20, True):
        text, _ = render(messages, chat)
        num_images = text.count("<|image_pad|>")
        counts = list(range(2, 2 + num_images))
        pieces = text.split("<|image_pad|>")
        expanded = "".join(p + "<|image_pad|>" * n for p, n in zip(pieces, [*counts, 0], strict=True))
        out = encode(messages, chat, texts=images(*counts))
        assert out.tokens_T.tolist() == tokens_apart(tokenizer, expanded)[0]
        assert int((out.kinds_T == IMAGE).sum()) == sum(counts)


@pytest.mark.parametrize("has_outer", [True, False])
def test_videos_are_timed_groups(digits, media_goldens, has_outer):
    """The library of the goldens keeps the outer pair of marks around all groups; older ones replaced it."""
    processor = load_processor(digits / "model", options=ChatOptions(video_outer_marks=has_outer))
    prompt = media_goldens["prompt"]
    times = (0.5, 2.5, 4.5)
    out = encode(prompt["messages"], processor.chat, texts=images(8) | {"video": [video(*times, tokens_per_group=6)]})
    text = prompt["text"]
    if has_outer:
        assert out.tokens_T.tolist() == prompt["input_ids"]
    else:
        text = text.replace("<|vision_start|><0.5", "<0.5").replace("<|vision_end|><|vision_end|>", "<|vision_end|>")
        assert len(prompt["input_ids"]) - out.tokens_T.numel() == 2
    assert processor.chat.tokenizer.decode(out.tokens_T) == text
    assert [k for k in out.kinds_T.tolist() if k] == [k for k in prompt["kinds"] if k]
    assert int((out.kinds_T == VIDEO).sum()) == 18
    assert processor.chat.tokenizer.decode(out.tokens_T[out.supervised_T]) == "Two.<|im_end|>\n"


def test_times_join_the_text_before_them(tokenizer, chat):
    """A merge over the border of a video's text needs the text expanded before it is tokenized."""
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a:"}, {"type": "video"}]},
        {"role": "assistant", "content": "ok"},
    ]
    bare = replace(chat, format=replace(chat.format, placeholders={**chat.format.placeholders, **chat.format.bare}))
    out = encode(messages, bare, texts={"video": [video(0.5, 1.0, tokens_per_group=1)]})
    pad = "<|vision_start|><|video_pad|><|vision_end|>"
    text = f"<|im_start|>user\na:<0.5 seconds>{pad}<1.0 seconds>{pad}<|im_end|>\n<|im_start|>assistant\nok<|im_end|>\n"
    expected = tokenizer(text)["input_ids"]
    assert out.tokens_T.tolist() == expected
    assert (
        expected
        != tokenizer("<|im_start|>user\na:")["input_ids"] + tokenizer(text[len("<|im_start|>user\na:") :])["input_ids"]
    )
    assert tokenizer.decode(out.tokens_T[out.supervised_T]) == "ok<|im_end|>\n"


def test_template_without_blocks_is_followed_to_the_letter(tokenizer):
    copy = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, chat_template=PLAIN)
    chat = make_chat(copy)
    assert chat.template == PLAIN
    for messages in conversations(20, True):
        out = encode(messages, chat, texts=images(*[1] * sum(m["role"] == "user" for m in messages)))
        text = copy.apply_chat_template(messages, tokenize=False)
        assert out.tokens_T.tolist() == tokens_apart(tokenizer, text)[0]
        assert bool(out.supervised_T.any())
    prompt = encode([{"role": "user", "content": "Hi"}], chat, is_prompt=True)
    assert copy.decode(prompt.tokens_T) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_whose_answers_no_one_can_tell(tokenizer):
    """Neither blocks nor the header that the family knows."""
    other = PLAIN.replace("<|im_start|>{{ m.role }}", "<|im_start|>{{ m.role | replace('assistant', 'bot') }}")
    chat = make_chat(tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, chat_template=other))
    with pytest.raises(
        ValueError, match=r"writes '<\|im_start\|>assistant\\n' 0 times for 1 answers; put \{% generation"
    ):
        encode([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], chat)


def test_template_given_wins(tokenizer):
    source = "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    out = encode([{"role": "user", "content": "Hi"}], make_chat(tokenizer, source))
    assert tokenizer.decode(out.tokens_T) == "user:Hi"
    assert tokenizer.decode(out.tokens_T[out.supervised_T]) == "Hi"


def test_bad_templates(tokenizer):
    markless = replace(family("qwen3_vl").data.chat, marks=None)
    with pytest.raises(ValueError, match=r"the chat template has no \{% generation %\} block; put one around"):
        template.make_chat(tokenizer, markless, lambda tokens_T: tokens_T, PLAIN)
    bare = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        template.make_chat(bare, replace(markless, templates=()), lambda tokens_T: tokens_T)
    assert make_chat(bare).template == read_template("qwen3_vl")  # the family's first
    strict = "{% generation %}{% endgeneration %}{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"rejects these messages \(roles must alternate\)"):
        encode([{"role": "user", "content": "Hi"}], make_chat(tokenizer, strict))
    nested = "{% generation %}{% generation %}x{% endgeneration %}{% endgeneration %}"
    with pytest.raises(ValueError, match="has a generation block within another; put them side by side"):
        encode([{"role": "user", "content": "x"}], make_chat(tokenizer, nested))


@pytest.mark.parametrize(
    "source", ["", PLAIN.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")]
)
@pytest.mark.parametrize("key", ["reasoning_content", "tool_calls", "tools"])
def test_what_a_template_would_drop_is_refused(tokenizer, source, key):
    """The family's training template writes calls and tools, a plain one neither, and no one here thoughts."""
    chat = make_chat(tokenizer, source)
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    more = {"reasoning_content": {"reasoning_content": "hm"}, "tool_calls": {"tool_calls": [call]}, "tools": {}}[key]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x", **more}]
    tools = [call] if key == "tools" else None
    if not source and key != "reasoning_content":
        assert '"name": "f"' in render(messages, chat, tools=tools)[0]
        return
    with pytest.raises(ValueError, match=f"has no place for '{key}' and would drop it; write it into the content"):
        render(messages, chat, tools=tools)


@pytest.mark.parametrize(
    "source", ["{{ 1 / 0 }}", "{{ '{a}'.format() }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"]
)
def test_a_template_that_fails(tokenizer, source):
    chat = make_chat(tokenizer, source + "{% generation %}{% endgeneration %}")
    with pytest.raises(ValueError, match="the chat template rejects these messages"):
        encode([{"role": "user", "content": "Hi"}], chat)


@pytest.mark.parametrize("source", ["{{ x", "{% if %}", "{{ 1 | no_filter }}", "{% endfor %}"])
def test_a_template_that_is_none_is_refused_at_once(tokenizer, source):
    with pytest.raises(
        ValueError, match=r"the chat template is no valid jinja \(.+, line 2\); correct it, or give another"
    ):
        make_chat(tokenizer, "{% generation %}{% endgeneration %}\n" + source)


@pytest.mark.parametrize(
    ("content", "counts", "message"),
    [
        ([{"type": "image"}], [], "1 image placeholders for 0 images"),
        ("Hi", [4], "0 image placeholders for 1 images"),
        ("<|image_pad|>", [], r"message 0 holds '<\|image_pad\|>', which only the chat template may write"),
        ([{"type": "video"}], [], "1 video placeholders for 0 videos"),
    ],
)
def test_placeholders_match_media(chat, content, counts, message):
    with pytest.raises(ValueError, match=message):
        encode([{"role": "user", "content": content}], chat, texts=images(*counts))


def test_media_of_a_kind_the_model_does_not_know(chat):
    with pytest.raises(ValueError, match="0 audio placeholders for 1 audios"):
        encode([{"role": "user", "content": "Hi"}], chat, texts={"audio": [MediaText(text="", counts=())]})


def test_ids_of_another_model_are_refused(chat):
    """The tokenizer writes media tokens that the model takes for text."""
    other = replace(chat, kinds=lambda tokens_T: torch.full_like(tokens_T, TEXT))
    with pytest.raises(ValueError, match=r"written with 1 media tokens but config\.json has the ids of 0"):
        encode([{"role": "user", "content": [{"type": "image"}]}], other, texts=images(2))


def marked_kinds(tokens_T, image, begin, end):
    """A rule of context: image tokens between the marks of a video are its frames."""
    inside_T = (tokens_T == begin).cumsum(0) > (tokens_T == end).cumsum(0)
    return torch.where(tokens_T == image, torch.where(inside_T, VIDEO, IMAGE), TEXT)


def test_a_format_whose_video_frames_are_image_tokens(tokenizer):
    """Another model's chats: other tokens, whole seconds behind every frame, kinds that the context decides."""
    marks = ["<|image|>", "<|video|>", "<|begin_of_video|>", "<|end_of_video|>", "<|frame|>"]
    other = copy.deepcopy(tokenizer)
    other.add_tokens(marks, special_tokens=True)
    image, _, begin, end, _ = other.convert_tokens_to_ids(marks)
    chat_format = ChatFormat(
        placeholders={"image": re.escape(marks[0]), "video": re.escape(marks[1])},
        tokens={"image_token_id": marks[0], "video_token_id": marks[1]},
        templates=(),
    )
    source = (
        "{% for m in messages %}{% for p in m.content %}{% if p.type == 'video' %}<|begin_of_video|><|video|>"
        "<|end_of_video|>{% elif p.type == 'image' %}<|image|>{% else %}{% generation %}{{ p.text }}"
        "{% endgeneration %}{% endif %}{% endfor %}{% endfor %}"
    )
    chat = template.make_chat(other, chat_format, partial(marked_kinds, image=image, begin=begin, end=end), source)
    parts = [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "ok"}]
    clip = MediaText(text="".join(f"<|frame|><|image|><|frame|>{second}" for second in (0, 1, 2)), counts=(2, 2, 2))
    picture = MediaText(text="<|image|>", counts=(3,))
    out = encode([{"role": "user", "content": parts}], chat, texts={"image": [picture], "video": [clip]})
    frames = "".join(f"<|frame|><|image|><|image|><|frame|>{second}" for second in (0, 1, 2))
    text = f"<|begin_of_video|>{frames}<|end_of_video|><|image|><|image|><|image|>ok"
    assert out.tokens_T.tolist() == other(text)["input_ids"]
    assert out.kinds_T[out.kinds_T != TEXT].tolist() == [VIDEO] * 6 + [IMAGE] * 3
    assert other.decode(out.tokens_T[out.supervised_T]) == "ok"


def test_a_placeholder_of_two_kinds_interleaved(tokenizer):
    """A video with its sound is one placeholder: runs of both kinds take turns."""
    pads = ["<|video_pad|>", "<|audio_pad|>"]
    other = copy.deepcopy(tokenizer)
    other.add_tokens(pads, special_tokens=True)
    ids = other.convert_tokens_to_ids(pads)
    chat_format = ChatFormat(
        placeholders={"video": re.escape(pads[0]), "audio": re.escape(pads[1])},
        tokens={"video_token_id": pads[0], "audio_token_id": pads[1]},
        templates=(),
    )

    def kinds(tokens_T):
        return torch.where(tokens_T == ids[0], VIDEO, torch.where(tokens_T == ids[1], 3, TEXT))

    source = (
        "{% for p in messages[0].content %}{% generation %}{{ p.text or '<|' ~ p.type ~ '_pad|>' }}{% endgeneration %}"
        "{% endfor %}"
    )
    chat = template.make_chat(other, chat_format, kinds, source)
    both = MediaText(text="".join(pads) * 2, counts=(6, 13, 6, 7))
    words = [{"type": "text", "text": word} for word in "abc"]
    parts = [words[0], {"type": "video"}, words[1], {"type": "audio"}, words[2]]
    messages = [{"role": "assistant", "content": parts}]
    out = encode(messages, chat, texts={"video": [both], "audio": [MediaText(text=pads[1], counts=(5,))]})
    text = "a" + pads[0] * 6 + pads[1] * 13 + pads[0] * 6 + pads[1] * 7 + "b" + pads[1] * 5 + "c"
    assert out.tokens_T.tolist() == other(text)["input_ids"]
    assert out.kinds_T.tolist() == kinds(out.tokens_T).tolist()
    assert other.decode(out.tokens_T[out.supervised_T]) == "abc"


def test_threads_do_not_mix_spans(chat):
    """The renderer of the library is one shared object; encode may be called from several threads."""
    texts = ["x" * n for n in range(40)]
    gate = threading.Barrier(4)

    def work(chat: Chat, offset: int) -> list[int]:
        gate.wait()
        order = texts[offset:] + texts[:offset]
        return [int(encode([{"role": "assistant", "content": t}], chat).supervised_T.sum()) - len(t) for t in order]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: work(chat, i), range(4)))
    assert {extra for result in results for extra in result} == {2}


def test_inputs_are_not_modified(chat):
    messages = [{"role": "user", "content": [{"type": "image"}], "name": None}, {"role": "assistant", "content": "a"}]
    before = json.dumps(messages)
    out = encode(messages, chat, texts=images(2))
    assert json.dumps(messages) == before
    assert out.tokens_T.dtype == out.kinds_T.dtype == torch.int64
    assert out.supervised_T.dtype == torch.bool
