"""Random conversations of any family, as records hold them."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mmfn.batch import AUDIO, IMAGE, TEXT, VIDEO
from mmfn.models import family
from mmfn.models.data.chat import MediaText, read_template
from mmfn.train.chat_options import ChatOptions
from mmfn.train.data import Chat, template

WORDS = (
    *("hi", "汉字", "e\u0301", "a: <b>", "{{ y }}", "{% if %}", "Straße", "What is this?", "<image>", "</s>", "👩‍🔬"),
    *("assistant", "user", "system\n", "<tool_response>", "`x`", "\\n", '"', "1 < 2", "/nothink", "<|box_start|>(1,2)"),
)
SPACE = ("", " ", "\n", "\n\n", "  \n ", "\u00a0")
TOOL = {
    "type": "function",
    "function": {"name": "get_w", "description": "Wetter für x.", "parameters": {"type": "object", "properties": {}}},
}


@dataclass(frozen=True, kw_only=True)
class Chats:
    """What a family's chats hold. `thinks_in_text`: thoughts may stand in the content, as text."""

    media: tuple[str, ...] = ("image", "video")
    has_tools: bool = True
    has_reasoning: bool = True  # a key of its own
    thinks_beside_media: bool = True


CHATS = {
    "qwen2_5_vl": Chats(has_tools=False, has_reasoning=False),
    "qwen3_vl": Chats(has_reasoning=False),
    "qwen3_vl_thinking": Chats(),
    "qwen3_5": Chats(),
    "qwen3_5_nothink": Chats(),
    "qwen3_omni": Chats(media=("image", "video", "audio"), thinks_beside_media=False),
    "qwen3_omni_thinking": Chats(media=("image", "video", "audio"), thinks_beside_media=False),
    "glm4v_moe": Chats(),
}
MODEL_TYPES = {
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_thinking": "qwen3_vl_moe",
    "qwen3_5": "qwen3_5",
    "qwen3_5_nothink": "qwen3_5",
    "qwen3_omni": "qwen3_omni_moe",
    "qwen3_omni_thinking": "qwen3_omni_moe",
    "glm4v_moe": "glm4v_moe",
}

KINDS = {"image": IMAGE, "video": VIDEO, "audio": AUDIO}
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
OMNI = ("<|video_pad|>", "<|audio_start|>", "<|audio_pad|>", "<|audio_end|>")
GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|image|>", "<|video|>")
GLM_MEDIA = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
SPECIAL = (*QWEN, *OMNI, *GLM, *GLM_MEDIA)


def text(r: random.Random, least: int = 0) -> str:
    words = [r.choice(WORDS) + r.choice(SPACE) for _ in range(r.randint(least, 4))]
    return r.choice(SPACE) + "".join(words)


def call(r: random.Random) -> dict[str, Any]:
    values = ["Ö", 2, True, None, [1, "x"], {"k": "é"}, 1.5, "a\nb", ""]
    arguments = {f"a{i}": r.choice(values) for i in range(r.randint(0, 3))}
    return {"type": "function", "function": {"name": "get_w", "arguments": arguments}}


def content(r: random.Random, media: tuple[str, ...]) -> str | list[dict[str, Any]]:
    """Of a user or a tool: a string, or parts in any order."""
    if not media or r.random() < 0.4:
        texts = [text(r, 1) for _ in range(r.randint(1, 2))]
        return texts[0] if r.random() < 0.7 else [{"type": "text", "text": one} for one in texts]
    parts = [{"type": r.choice(media)} for _ in range(r.randint(1, 3))]
    parts += [{"type": "text", "text": text(r, 1)} for _ in range(r.randint(0, 3))]
    r.shuffle(parts)
    return parts


def answer(r: random.Random, chats: Chats, *, thinks: bool, calls: bool) -> dict[str, Any]:
    words, more = text(r), {}
    thought = text(r, 1).strip()
    if thinks and chats.has_reasoning and r.random() < 0.5:
        more["reasoning_content"] = thought
    elif thinks:
        words = f"<think>\n{thought}\n</think>\n\n{words}"
    if calls:
        more["tool_calls"] = [call(r) for _ in range(r.randint(1, 3))]
    return {"role": "assistant", "content": words, **more}


def conversations(name: str, number: int, seed: int = 0) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """(messages, tools) that the template `name` takes whole."""
    r, chats = random.Random(f"{name} {seed}"), CHATS[name]
    for _ in range(number):
        media = chats.media if r.random() < 0.6 else ()
        thinks = r.random() < 0.5 and (chats.thinks_beside_media or not media)
        has_tools = chats.has_tools and r.random() < 0.4
        messages: list[dict[str, Any]] = []
        if r.random() < 0.4:
            messages.append({"role": "system", "content": r.choice([text(r), "", [{"type": "text", "text": text(r)}]])})
        for _ in range(r.randint(1, 4)):
            messages.append({"role": "user", "content": content(r, media)})
            while has_tools and r.random() < 0.5:
                messages.append(answer(r, chats, thinks=thinks and r.random() < 0.5, calls=True))
                # GLM-4.5V's writes no media of tools
                places = () if name == "glm4v_moe" else media
                messages += [{"role": "tool", "content": content(r, places)} for _ in messages[-1]["tool_calls"]]
            messages.append(answer(r, chats, thinks=thinks and r.random() < 0.7, calls=False))
        if has_tools and r.random() < 0.2:
            messages.append({"role": "user", "content": text(r, 1)})
            messages.append(answer(r, chats, thinks=thinks, calls=True))
        yield messages, [TOOL] * (has_tools and r.randint(1, 2))


def pad(name: str, kind: str) -> str:
    return f"<|{kind}|>" if name == "glm4v_moe" else f"<|{kind}_pad|>"


def published(name: str) -> str:
    """The same template without generation blocks: a comment takes their place, with the same white space control."""
    return re.sub(r"\{%- (end)?generation -%\}", "{#--#}", read_template(name))


def texts_of(name: str, messages: list[dict[str, Any]]) -> dict[str, list[MediaText]]:
    parts = [part["type"] for m in messages if isinstance(m["content"], list) for part in m["content"]]
    return {kind: [MediaText(text=pad(name, kind), counts=(3,))] * parts.count(kind) for kind in CHATS[name].media}


def chat_of(tokenizer: Any, name: str, has_blocks: bool = True, options: ChatOptions | None = None) -> Chat:
    """A chat of a template, or of its text without blocks, as a checkpoint has it."""
    chat_format = family(MODEL_TYPES[name]).data.chat
    ids = {tokenizer.convert_tokens_to_ids(pad(name, kind)): KINDS[kind] for kind in chat_format.placeholders}

    def kinds(tokens_T: torch.Tensor) -> torch.Tensor:
        out_T = torch.full_like(tokens_T, TEXT)
        for number, kind in ids.items():
            out_T[tokens_T == number] = kind
        return out_T

    source = read_template(name) if has_blocks else published(name)
    return template.make_chat(tokenizer, chat_format, kinds, source, options or ChatOptions())
