"""Chat templates: a conversation becomes tokens and the mask of what the assistant wrote.

The text is the one the template renders, by the library's own sandboxed renderer. What stands between
`{% generation %}` and `{% endgeneration %}` is supervised: the answer and its end mark, not the header before it.
Legend: T tokens.
"""

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfn.batch import IMAGE, TEXT, VIDEO
from mmfn.train.data.tokenizer import Tokenizer, token_id

TEMPLATES = ("qwen3_vl",)  # training templates in templates/, tried in this order
IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# A video's pad is replaced together with its marks: every frame group brings its own. transformers 4.57, with which the
# models were published, did the same; 5.x keeps the outer pair too.
_PLACEHOLDER = re.compile(
    f"(?P<image>{re.escape(IMAGE_PAD)})"
    f"|(?P<video>(?:{re.escape(VISION_START)})?{re.escape(VIDEO_PAD)}(?:{re.escape(VISION_END)})?)"
)
_RENDERER = threading.Lock()  # the renderer of transformers tracks spans in a shared object


@dataclass(frozen=True, kw_only=True)
class Chat:
    """How conversations become tokens.

    `templates`: jinja sources with generation blocks, the first that fits is used. `own`: the checkpoint's template
    when that has no such blocks; a fitting template renders the conversation to the same text. "" when not needed.
    """

    tokenizer: Tokenizer
    templates: tuple[str, ...]
    own: str
    image_id: int
    video_id: int


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """`tokens_T`: int64[T]. `supervised_T`: bool[T], what the assistant wrote. `kinds_T`: int64[T] (see mmfn.batch)."""

    tokens_T: Tensor
    supervised_T: Tensor
    kinds_T: Tensor


@dataclass(frozen=True, kw_only=True)
class VideoText:
    """What the text needs to know of a video: time in seconds of every frame group, and tokens per group."""

    times: tuple[float, ...]
    tokens_per_group: int


def make_chat(tokenizer: Tokenizer, template: str = "") -> Chat:
    """`template` (jinja source) or else the tokenizer's own template, made ready for training.

    A template of the tokenizer without generation blocks is followed to the letter through a training template of
    mmfn. Raises ValueError when there is no template, or `template` has no generation blocks.
    """
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    if template and not _GENERATION.search(template):
        raise ValueError(
            "the chat template given has no {% generation %} block; put one around the assistant's content"
        )
    if not template and not own:
        raise ValueError("the tokenizer has no chat template; give one with {% generation %} blocks")
    marked = template or (own if _GENERATION.search(own) else "")
    folder = Path(__file__).parent / "templates"
    return Chat(
        tokenizer=tokenizer,
        templates=(marked,) if marked else tuple((folder / f"{n}.jinja").read_text("utf-8") for n in TEMPLATES),
        own="" if marked else own,
        image_id=token_id(tokenizer, IMAGE_PAD),
        video_id=token_id(tokenizer, VIDEO_PAD),
    )


def encode(
    messages: Sequence[Mapping[str, Any]],
    chat: Chat,
    *,
    images: Sequence[int] = (),
    videos: Sequence[VideoText] = (),
    tools: Sequence[Mapping[str, Any]] | None = None,
    is_prompt: bool = False,
) -> Encoded:
    """Tokens of a conversation in the messages format (`role`, `content` as a string or list of parts).

    `images[i]`: tokens of the i-th image. `is_prompt` appends the header of an answer to be generated. Raises
    ValueError when the template rejects the messages, no training template renders them as the checkpoint's own does,
    or the text does not hold one placeholder per image and video.
    """
    text, spans = render(messages, chat, tools=tools, is_prompt=is_prompt)
    text, spans = _expand_videos(text, spans, len(images), videos)
    encoding = chat.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens_T = torch.tensor(encoding["input_ids"], dtype=torch.int64)
    offsets_T2 = torch.tensor(encoding["offset_mapping"], dtype=torch.int64).reshape(-1, 2)
    supervised_T = torch.zeros(tokens_T.shape, dtype=torch.bool)
    for start, end in spans:
        supervised_T |= (offsets_T2[:, 0] < end) & (offsets_T2[:, 1] > start)
    is_image_T, is_video_T = tokens_T == chat.image_id, tokens_T == chat.video_id
    kinds_T = torch.where(is_image_T, IMAGE, torch.where(is_video_T, VIDEO, TEXT))
    # pads are special tokens: repeating the token equals repeating the text, without tokenizing it
    counts_T = torch.ones_like(tokens_T)
    counts_T[is_image_T] = torch.tensor(list(images), dtype=torch.int64)
    counts_T[is_video_T] = torch.tensor([v.tokens_per_group for v in videos for _ in v.times], dtype=torch.int64)
    tokens_T, supervised_T, kinds_T = (x.repeat_interleave(counts_T) for x in (tokens_T, supervised_T, kinds_T))
    return Encoded(tokens_T=tokens_T, supervised_T=supervised_T & (kinds_T == TEXT), kinds_T=kinds_T)


def render(
    messages: Sequence[Mapping[str, Any]],
    chat: Chat,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    is_prompt: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation and the character spans the assistant wrote. Raises as `encode` does."""
    own = _render(messages, chat, chat.own, tools, is_prompt)[0] if chat.own else None
    for template in chat.templates:
        text, spans = _render(messages, chat, template, tools, is_prompt)
        if own is None or text == own:
            return text, spans
    raise ValueError(
        "the checkpoint's chat template has no {% generation %} block and renders these messages unlike the training "
        f"templates of mmfn ({', '.join(TEMPLATES)}); give a template with generation blocks"
    )


def _render(
    messages: Sequence[Mapping[str, Any]],
    chat: Chat,
    template: str,
    tools: Sequence[Mapping[str, Any]] | None,
    is_prompt: bool,
) -> tuple[str, list[tuple[int, int]]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    has_blocks = bool(_GENERATION.search(template))
    try:
        with _RENDERER:
            texts, spans = render_jinja_template(
                conversations=[[{k: v for k, v in m.items() if v is not None} for m in messages]],
                tools=list(tools) if tools else None,
                chat_template=template,
                return_assistant_tokens_mask=has_blocks,
                add_generation_prompt=is_prompt,
                **chat.tokenizer.special_tokens_map,
            )
    except Exception as error:  # a template is a program: it may divide by zero, recurse, miss a key
        raise ValueError(
            f"the chat template rejects these messages ({error}); correct their roles and order, or the template"
        ) from error
    return texts[0], [(start, end) for start, end in spans[0]] if has_blocks else []


def _expand_videos(
    text: str, spans: Sequence[tuple[int, int]], num_images: int, videos: Sequence[VideoText]
) -> tuple[str, list[tuple[int, int]]]:
    """Replace each video placeholder by its timed frame groups, one pad each; spans move along."""
    matches = list(_PLACEHOLDER.finditer(text))
    places = [m for m in matches if m.lastgroup == "video"]
    for kind, found, given in (("image", len(matches) - len(places), num_images), ("video", len(places), len(videos))):
        if found != given:
            raise ValueError(
                f"the rendered text holds {found} {kind} placeholders for {given} {kind}s; mark each {kind} once, in a "
                "turn of the user, and keep the placeholder token itself out of the text"
            )
    pieces, growth, last = [], [], 0
    for match, video in zip(places, videos, strict=True):
        groups = "".join(f"<{time:.1f} seconds>{VISION_START}{VIDEO_PAD}{VISION_END}" for time in video.times)
        pieces += [text[last : match.start()], groups]
        growth.append((match.end(), len(groups) - len(match.group())))
        last = match.end()

    def moved(position: int) -> int:
        return position + sum(extra for end, extra in growth if end <= position)

    return "".join([*pieces, text[last:]]), [(moved(start), moved(end)) for start, end in spans]
