"""Templates of all families against goldens, and what is learned, found in two ways and by a third in the test."""

import json
import re
from importlib import resources
from pathlib import Path
from unicodedata import normalize

import pytest
import torch

from mmfn.batch import TEXT
from mmfn.models import family
from mmfn.models.data.chat import read_template
from mmfn.train.chat_options import ChatOptions
from mmfn.train.data.render import plain_messages, run_template, with_marks
from mmfn.train.data.template import encode, render
from tests.train.data.chat_cases import CHATS, MODEL_TYPES, conversations, published, texts_of

GOLDENS = json.loads((Path(__file__).parents[2] / "goldens" / "templates.json").read_text(encoding="utf-8"))
NUMBER = 200  # conversations of each family
all_names = pytest.mark.parametrize("name", CHATS)


def segments(name, text):
    """What the peers agree on, by cutting the text at its headers: a turn of the assistant behind its header, with its
    end; of GLM-4.5V the role token behind it."""
    text = normalize("NFC", text)  # as the tokenizer does
    if name != "glm4v_moe":
        pieces = re.split(r"(<\|im_start\|>[a-z]+\n)", text)
        return [turn for header, turn in zip(pieces[1::2], pieces[2::2], strict=True) if "assistant" in header]
    pieces = re.split(r"(<\|(?:user|assistant|system|observation)\|>)", text)
    turns = list(zip(pieces[1::2], pieces[2::2], [*pieces[3::2], ""], strict=True))
    return [turn.removeprefix("\n") + after for header, turn, after in turns if header == "<|assistant|>"]


def without_block(turn):
    before, mark, after = turn.partition("</think>")
    return after.lstrip("\n") if mark and before.strip() == "<think>" else turn


@all_names
@pytest.mark.parametrize("has_blocks", [True, False])
@pytest.mark.parametrize("case", GOLDENS["cases"])
def test_text_and_errors_of_the_published_template(name, has_blocks, case):
    chat, expected = GOLDENS["cases"][case], GOLDENS["rendered"][name][case]
    options = {**chat["kwargs"]}
    tools, is_prompt = options.pop("tools", None), options.pop("add_generation_prompt", False)
    program = with_marks(read_template(name) if has_blocks else published(name))
    if expected.startswith("!! "):
        with pytest.raises(ValueError, match="the chat template rejects these messages") as error:
            run_template(program, chat["messages"], tools=tools, is_prompt=is_prompt, variables=options)
        assert f"!! {type(error.value.__cause__).__name__}: {error.value.__cause__}" == expected
        return
    text, spans = run_template(program, chat["messages"], tools=tools, is_prompt=is_prompt, variables=options)
    assert text == expected
    assert bool(spans) == (has_blocks and any(m["role"] == "assistant" for m in chat["messages"]))


@all_names
def test_answers_by_blocks_marks_and_headers(make_chat, chat_tokenizer, name):
    """Two ways of the program and one of the test find the same characters, and the same tokens of them."""
    by_blocks, by_marks = make_chat(name), make_chat(name, has_blocks=False)
    for messages, tools in conversations(name, NUMBER):
        (text, answers), (other, spans) = (render(messages, chat, tools=tools) for chat in (by_blocks, by_marks))
        assert (text, answers) == (other, spans)
        assert [normalize("NFC", text[start:end]) for start, end in answers] == segments(name, text)
        assert len(answers) == sum(m["role"] == "assistant" for m in messages)
        texts = texts_of(name, messages)
        one, two = (encode(messages, chat, texts=texts, tools=tools) for chat in (by_blocks, by_marks))
        assert all(torch.equal(getattr(one, field), getattr(two, field)) for field in vars(one))
        assert chat_tokenizer.decode(one.tokens_T[one.supervised_T]) == "".join(segments(name, text))
        assert int((one.kinds_T != TEXT).sum()) == 3 * sum(map(len, texts.values()))


OTHERWISE = {  # a list of text is the text, and null beside calls is no text, where a template tells them apart
    "qwen3_vl": {"tool_call_none"},
    "qwen3_vl_thinking": {"tool_call_none"},
    "qwen3_omni": {"tool_call_none", "sys_two"},
    "qwen3_omni_thinking": {"tool_call_none", "sys_two", "sys_list_tools"},
    "glm4v_moe": {"tool_call_none", "tool_list"},
}
REFUSED = (
    r"the chat template rejects these messages",
    r"the chat template has no place for '(tools|tool_calls|reasoning_content)'",
    r"message \d: the chat template drops the (text|thought) '",
)


@all_names
def test_answers_of_the_goldens(make_chat, name):
    """All goldens as training takes them: the published text, the same spans by blocks and by marks, or a reason."""
    num_taken = 0
    for case, chat in GOLDENS["cases"].items():
        options = {**chat["kwargs"]}
        tools, is_prompt = options.pop("tools", None), options.pop("add_generation_prompt", False)
        has_thinking = "enable_thinking" in options and "enable_thinking" in read_template(name)
        chosen = ChatOptions(enable_thinking=options["enable_thinking"]) if has_thinking else None
        if "add_vision_id" in options or "tool_call_str" in case:  # no setting; records hold arguments as objects
            continue
        found = []
        for has_blocks in (True, False):
            try:
                found.append(
                    render(chat["messages"], make_chat(name, has_blocks, chosen), tools=tools, is_prompt=is_prompt)
                )
            except ValueError as error:
                found.append(str(error))
        assert found[0] == found[1]
        if isinstance(found[0], str):
            assert any(re.match(reason, found[0]) for reason in REFUSED)
            continue
        num_taken += 1
        closing = found[0][0].removeprefix(GOLDENS["rendered"][name][case])
        assert (closing in ("", "<|user|>", "<|observation|>")) != (case in OTHERWISE.get(name, ()))
    assert num_taken >= 30


@all_names
def test_answers_of_the_library(name):
    """transformers' own tracker of blocks finds the same spans; blocks that touch are one answer here."""
    from transformers.utils.chat_template_utils import render_jinja_template

    source = read_template(name)
    for messages, tools in conversations(name, 60, seed=1):
        plain = plain_messages(messages)
        (text,), (spans,) = render_jinja_template(
            [plain], tools=tools or None, chat_template=source, return_assistant_tokens_mask=True
        )
        ours, answers = run_template(with_marks(source), plain, tools=tools, variables={})
        assert ours == text
        assert "".join(text[a:b] for a, b in answers) == "".join(text[a:b] for a, b in spans)


@all_names
@pytest.mark.parametrize("has_blocks", [True, False])
def test_options_choose_among_answers(make_chat, chat_tokenizer, name, has_blocks):
    """`mask_history`, `loss` and `train_on_prompt` on random conversations, from the segments of the test."""

    def learned(messages, tools, **options):
        out = encode(
            messages, make_chat(name, has_blocks, ChatOptions(**options)), texts=texts_of(name, messages), tools=tools
        )
        assert not bool((out.supervised_T & (out.kinds_T != TEXT)).any())
        return chat_tokenizer.decode(out.tokens_T[out.supervised_T]), out

    for number, (messages, tools) in enumerate(conversations(name, 60, seed=2)):
        turns = segments(name, render(messages, make_chat(name, has_blocks), tools=tools)[0])
        places = [place for place, m in enumerate(messages) if m["role"] == "assistant"]
        question = max(place for place, m in enumerate(messages) if m["role"] == "user")
        behind = "".join(turn for turn, place in zip(turns, places, strict=True) if place > question)
        assert learned(messages, tools, mask_history=True)[0] == behind
        flags = [(number + i) % 3 > 0 for i in range(len(places))]
        flagged = [{**m, "loss": flags[places.index(i)]} if i in places else m for i, m in enumerate(messages)]
        assert learned(flagged, tools)[0] == "".join(t for t, flag in zip(turns, flags, strict=True) if flag)
        out = learned(messages, tools, train_on_prompt=True)[1]
        assert torch.equal(out.supervised_T, out.kinds_T == TEXT)
        last = encode(flagged, make_chat(name, has_blocks), texts=texts_of(name, messages), tools=tools, only_last=True)
        assert chat_tokenizer.decode(last.tokens_T[last.supervised_T]) == turns[-1]
        if name != "qwen2_5_vl":
            assert learned(messages, tools, train_empty_thinking=False)[0] == "".join(map(without_block, turns))


def test_templates_that_mmfn_brings():
    """Those of the folder, of the families and of the page are the same, each with blocks."""
    folder = resources.files("mmfn.models.data") / "templates"
    names = {path.name.removesuffix(".jinja") for path in folder.iterdir() if not path.name.startswith("_")}
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    assert names == set(CHATS) == {name for kind in MODEL_TYPES.values() for name in family(kind).data.chat.templates}
    assert all(f"`{name}`" in page and "{%- generation -%}" in read_template(name) for name in names)
