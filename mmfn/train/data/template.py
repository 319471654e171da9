"""Chat templates: a conversation becomes tokens and the mask of what the assistant wrote.

The text is the one the template renders, by the library's own sandboxed renderer. What stands between
`{% generation %}` and `{% endgeneration %}` is supervised: the answer and its end mark, not the header before it.
Legend: T tokens.
"""

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mmfn.batch import TEXT
from mmfn.errors import UserError
from mmfn.models.data.chat import ChatFormat, TextsByKind, read_template
from mmfn.train.data.tokenizer import Tokenizer, token_id

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_RENDERER = threading.Lock()  # the renderer of transformers tracks spans in a shared object


@dataclass(frozen=True, kw_only=True)
class Chat:
    """How conversations become tokens.

    `format`: what the model's family says of it. `kinds`: int64[T] tokens -> int64[T], the kind of each. `templates`:
    jinja sources with generation blocks, the first that fits is used. `original`: the checkpoint's template when that
    has no such blocks; a fitting template renders the conversation to the same text. "" when not needed.
    """

    tokenizer: Tokenizer
    format: ChatFormat
    kinds: Callable[[Tensor], Tensor]
    templates: tuple[str, ...]
    original: str


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """`tokens_T`: int64[T]. `supervised_T`: bool[T], what the assistant wrote. `kinds_T`: int64[T] (see mmfn.batch)."""

    tokens_T: Tensor
    supervised_T: Tensor
    kinds_T: Tensor


def make_chat(tokenizer: Tokenizer, format: ChatFormat, kinds: Callable[[Tensor], Tensor], template: str = "") -> Chat:
    """`template` (jinja source) or else the tokenizer's own template, made ready for training.

    A template of the tokenizer without generation blocks is followed to the letter through a training template of the
    family. Raises ValueError when there is no template, `template` has no generation blocks, or a token of `format` is
    none of the tokenizer.
    """
    original = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    if template and not _GENERATION.search(template):
        raise UserError("the chat template given has no {% generation %} block; put one around the assistant's content")
    if not template and not original:
        raise UserError("the tokenizer has no chat template; give one with {% generation %} blocks")
    source = template or (original if _GENERATION.search(original) else "")
    for token in format.tokens.values():
        token_id(tokenizer, token)
    return Chat(
        tokenizer=tokenizer,
        format=format,
        kinds=kinds,
        templates=(source,) if source else tuple(map(read_template, format.templates)),
        original="" if source else original,
    )


def encode(
    messages: Sequence[Mapping[str, Any]],
    chat: Chat,
    *,
    texts: TextsByKind = MappingProxyType({}),
    tools: Sequence[Mapping[str, Any]] | None = None,
    is_prompt: bool = False,
) -> Encoded:
    """Tokens of a conversation in the messages format (`role`, `content` as a string or list of parts).

    `texts`: what is written for the media of each kind, in order. `is_prompt` appends the header of an answer to be
    generated. Raises ValueError when the template rejects the messages, no training template renders them as the
    checkpoint's own does, or the text does not hold one placeholder per medium.
    """
    text, spans = render(messages, chat, tools=tools, is_prompt=is_prompt)
    text, spans, counts = _insert_media(text, spans, chat, texts)
    encoding = chat.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens_T = torch.tensor(encoding["input_ids"], dtype=torch.int64)
    offsets_T2 = torch.tensor(encoding["offset_mapping"], dtype=torch.int64).reshape(-1, 2)
    supervised_T = torch.zeros(tokens_T.shape, dtype=torch.bool)
    for start, end in spans:
        supervised_T |= (offsets_T2[:, 0] < end) & (offsets_T2[:, 1] > start)
    kinds_T = chat.kinds(tokens_T)
    is_media_T = kinds_T != TEXT
    if int(is_media_T.sum()) != len(counts):
        raise UserError(
            f"the media are written with {len(counts)} media tokens but config.json has the ids of "
            f"{int(is_media_T.sum())} of the text's tokens; use the tokenizer of the model"
        )
    # media tokens are special tokens: repeating the token equals repeating the text, without tokenizing it
    counts_T = torch.ones_like(tokens_T)
    counts_T[is_media_T] = torch.tensor(counts, dtype=torch.int64)
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
    _check_place(messages, tools, chat.original or chat.templates[0])
    expected = _render(messages, chat, chat.original, tools, is_prompt)[0] if chat.original else None
    if expected is not None and is_prompt:  # nothing of a prompt is supervised, so its own template is all it takes
        return expected, []
    for template in chat.templates:
        text, spans = _render(messages, chat, template, tools, is_prompt)
        if expected is None or text == expected:
            return text, spans
    raise UserError(
        "the checkpoint's chat template has no {% generation %} block and renders these messages unlike the training "
        f"templates of mmfn ({', '.join(chat.format.templates)}); give a template with generation blocks"
    )


def _check_place(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, template: str
) -> None:
    """What a template does not even mention it would drop without a word."""
    said = {key for message in messages for key in ("reasoning_content", "tool_calls") if message.get(key)}
    for key in sorted(said | ({"tools"} if tools else set())):
        if key not in template:
            raise UserError(
                f"the chat template has no place for {key!r} and would drop it; write it into the content as the model "
                "writes it, or give a template that has one"
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
        raise UserError(
            f"the chat template rejects these messages ({error}); correct their roles and order, or the template"
        ) from error
    return texts[0], [(start, end) for start, end in spans[0]] if has_blocks else []


def _insert_media(
    text: str, spans: Sequence[tuple[int, int]], chat: Chat, texts: TextsByKind
) -> tuple[str, list[tuple[int, int]], list[int]]:
    """Replace each placeholder by the text of its medium; spans move along. Also the counts of all texts, in order."""
    matches = list(chat.format.pattern.finditer(text))
    for kind in dict.fromkeys((*chat.format.placeholders, *texts)):
        num_places, num_media = sum(match.lastgroup == kind for match in matches), len(texts.get(kind, ()))
        if num_places != num_media:
            raise UserError(
                f"the rendered text holds {num_places} {kind} placeholders for {num_media} {kind}s; mark each {kind} "
                "once, in a turn of the user, and keep the placeholder token itself out of the text"
            )
    left = {kind: iter(items) for kind, items in texts.items()}
    pieces: list[str] = []
    counts: list[int] = []
    growth, last = [], 0
    for match in matches:
        medium = next(left[match.lastgroup or ""])
        pieces += [text[last : match.start()], medium.text]
        counts += medium.counts
        growth.append((match.end(), len(medium.text) - len(match.group())))
        last = match.end()

    def shift(position: int) -> int:
        return position + sum(extra for end, extra in growth if end <= position)

    return "".join([*pieces, text[last:]]), [(shift(start), shift(end)) for start, end in spans], counts
