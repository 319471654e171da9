"""What is learned of answers that are hard to tell from what stands around them, by a walk over the tokens.

The tokenizer has merges, so that line ends and punctuation join across borders. The walk knows only the tokens of a
header and of an end; what an answer is to be is said in `expected`, after the published templates.
"""

import json
import random
from unicodedata import normalize

import pytest

from mmfn.batch import TEXT, VIDEO
from mmfn.models.data.chat import MediaText
from mmfn.train.chat_options import ChatOptions
from mmfn.train.data.template import encode
from tests.train.data.chat_cases import CHATS, chat_of, texts_of

BLOCK = "<think>\n\n</think>\n\n"
ARGUMENTS = {"x": "a\n\nb", "n": 2}
CALL = {"type": "function", "function": {"name": "f", "arguments": ARGUMENTS}}
JSON_CALL = f'<tool_call>\n{{"name": "f", "arguments": {json.dumps(ARGUMENTS)}}}\n</tool_call>'
XML_CALL = (
    "<tool_call>\n<function=f>\n<parameter=x>\na\n\nb\n</parameter>\n<parameter=n>\n2\n</parameter>\n</function>\n"
)
GLM_CALL = "\n<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>a\n\nb</arg_value>\n<arg_key>n</arg_key>\n<arg_value>2"
ANSWERS = (
    *(
        "yo",
        "",
        " ",
        "\n",
        "\n\n",
        " \n ",
        "\t",
        "\nyo",
        "\n\nyo",
        " \n\nyo",
        "yo\n",
        "yo\n\n",
        "\u00a0yo",
        "\r\nyo\r\n",
    ),
    *("<think>", "a <think> b", "assistant", "assistant\n", "user\nassistant\n", ":.\n\n", "...\n", "\\n", "</s>"),
    *(
        "e\u0301a\u030a",
        "\u00e9",
        "\ufb01\u2126",
        "\u1112\u1161\u11ab",
        "👩‍🔬",
        "नमस्\u200dते",
        "\u200b",
        "\ufeffyo",
        "\u202eyo\u202c",
    ),
    *(
        "\u0301yo",
        "\u0338",
        "\u2028yo",
        "\x85",
        "\x00yo",
        "<tool_call>",
        "</tool_call>\n",
        "<tool_response>\n",
        "1\n2\n",
    ),
    "wörd \n\n" * 5_000,
)


@pytest.fixture(scope="module")
def tokenizer(merging_tokenizer):
    return merging_tokenizer


def walked(name, tokenizer, tokens):
    """The answers in a list of tokens, as (first, behind the last) of each with its end."""
    if name == "glm4v_moe":
        header, ends = ["<|assistant|>", *tokenizer.tokenize("\n")], {"<|user|>", "<|observation|>"}
    else:
        header, ends = ["<|im_start|>", *tokenizer.tokenize("assistant\n")], {"<|im_end|>"}
    begins = {header[0], "<|system|>", "<|user|>", "<|observation|>"} if name == "glm4v_moe" else {header[0]}
    words, spans = tokenizer.convert_ids_to_tokens(tokens), []
    for place in range(len(words)):
        if words[place : place + len(header)] == header:
            first = last = place + len(header)
            while words[last] not in ends | begins:
                last += 1
            last += words[last] in ends
            last += name != "glm4v_moe"  # the line end
            spans.append((first, last))
    return spans


def expected(name, messages, place):
    """What an answer without a thought is to be, with its end."""
    text, call = messages[place]["content"], "tool_calls" in messages[place]
    question = max(i for i, message in enumerate(messages) if message["role"] == "user")
    is_behind, is_last = place > question, place == len(messages) - 1
    if name == "glm4v_moe":
        words = "<think></think>" + ("\n" + text.strip() if text.strip() else "")
        behind = messages[place + 1]["role"] if not is_last else "tool" if call else "user"
        end = {"user": "<|user|>", "tool": "<|observation|>", "assistant": ""}[behind]
        return words + f"{GLM_CALL}</arg_value>\n</tool_call>" * call + end
    if name.startswith("qwen3_5"):
        words = text.strip()
        call_text = "\n\n" * bool(words) + f"{XML_CALL}</tool_call>"
        return BLOCK * is_behind + words + call_text * call + "<|im_end|>\n"
    has_block = is_behind and is_last and name not in ("qwen2_5_vl", "qwen3_vl")
    written = BLOCK + text.lstrip("\n") if has_block else text
    return written + ("\n" * bool(text) + JSON_CALL) * call + "<|im_end|>\n"


def talks(name, answer, other):
    """The shapes of conversations: turns, steps of tools, answers in a row, an answer that nobody asked for."""
    ask, say, next_ = (
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "\n"},
    )
    last = {"role": "assistant", "content": other}
    yield [ask, say]
    yield [{"role": "system", "content": answer}, ask, say, next_, last]
    yield [ask, say, last]
    yield [say, ask, last]
    if CHATS[name].has_tools:
        result = {"role": "tool", "content": answer or "7"}
        step = {**say, "tool_calls": [CALL]}
        yield [ask, step, result, last]
        yield [ask, step, result, {**last, "tool_calls": [CALL]}, result, say, next_, last]
        yield [ask, say, next_, step]


@pytest.mark.parametrize("has_blocks", [True, False])
@pytest.mark.parametrize("name", CHATS)
def test_awkward_answers(tokenizer, name, has_blocks):
    chat, draw, num_talks = chat_of(tokenizer, name, has_blocks), random.Random(0), 0
    for answer in ANSWERS:
        for messages in talks(name, answer, draw.choice(ANSWERS[:-1])):
            out = encode(messages, chat)
            spans = walked(name, tokenizer, out.tokens_T.tolist())
            turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
            found = [tokenizer.decode(out.tokens_T[first:last]) for first, last in spans]
            assert found == [normalize("NFC", expected(name, messages, place)) for place in turns]
            places = [place for first, last in spans for place in range(first, last)]
            assert out.supervised_T.nonzero()[:, 0].tolist() == places
            num_talks += 1
            if turns[0]:  # a prompt may go on with what opens a thought
                prompt, start = encode(messages[: turns[0]], chat, is_prompt=True).tokens_T, spans[0][0]
                assert prompt[:start].equal(out.tokens_T[:start])
                assert tokenizer.decode(prompt[start:]) in ("", "<think>\n", BLOCK)
    assert num_talks >= 4 * len(ANSWERS)


THOUGHTS = {  # what the last answer becomes of "x </think> y", and of a text with two thoughts
    "qwen2_5_vl": "x </think> y",
    "qwen3_vl": "x </think> y",
    "qwen3_vl_thinking": "<think>\nx \n</think>\n\n y",
    "qwen3_5": "<think>\nx\n</think>\n\n y",
    "qwen3_5_nothink": "<think>\nx\n</think>\n\n y",
    "qwen3_omni": "<think>\nx \n</think>\n\n y",
    "qwen3_omni_thinking": "<think>\nx \n</think>\n\n y",
    "glm4v_moe": "<think>x</think>\ny",
}


@pytest.mark.parametrize("name", CHATS)
def test_the_end_of_a_thought_as_text(tokenizer, name):
    """What stands before it is the thought of a model that thinks; with a thought of its own the content is words."""
    chat, ask = chat_of(tokenizer, name), {"role": "user", "content": "q"}
    end = "<|user|>" if name == "glm4v_moe" else "<|im_end|>\n"

    def learned(**answer):
        out = encode([ask, {"role": "assistant", **answer}], chat)
        return tokenizer.decode(out.tokens_T[out.supervised_T])

    assert learned(content="x </think> y") == THOUGHTS[name] + end
    if CHATS[name].has_reasoning:
        both = learned(content="see </think>", reasoning_content="hm")
        assert both.endswith("see </think>" + end)
        assert both.startswith("<think>hm</think>" if name == "glm4v_moe" else "<think>\nhm\n</think>\n\n")


@pytest.mark.parametrize("name", [name for name in CHATS if CHATS[name].has_tools and name != "glm4v_moe"])
def test_a_video_that_a_tool_shows(tokenizer, name):
    """Its text is not learned, and what is stands where it stood."""
    chat, text = chat_of(tokenizer, name), MediaText(text="<0.2 seconds><|video_pad|>:\n\n<|video_pad|>", counts=(6, 5))
    parts = [{"type": "video"}, {"type": "text", "text": ":\n\n"}, {"type": "video"}]
    step = {"role": "assistant", "content": "\n\n:", "tool_calls": [CALL]}
    messages = [{"role": "user", "content": "q"}, step, {"role": "tool", "content": parts}]
    messages += [{"role": "assistant", "content": "\n\nyo"}]
    out = encode(messages, chat, texts=texts_of(name, messages) | {"video": [text, text]})
    spans = walked(name, tokenizer, out.tokens_T.tolist())
    found = [tokenizer.decode(out.tokens_T[first:last]) for first, last in spans]
    assert found == [expected(name, messages, place) for place in (1, 3)]
    assert out.supervised_T.nonzero()[:, 0].tolist() == [i for span in spans for i in range(*span)]
    assert int((out.kinds_T == VIDEO).sum()) == 22
    every = encode(
        messages, chat_of(tokenizer, name, True, ChatOptions(train_on_prompt=True)), texts={"video": [text] * 2}
    )
    assert every.supervised_T.equal(every.kinds_T == TEXT)
    assert every.tokens_T.equal(out.tokens_T)
