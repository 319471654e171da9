"""Chats: a conversation becomes tokens and the mask of what is learned of it.

The text is the one that the checkpoint's own template renders. What the assistant said stands in generation blocks, or
else between the marks that the model's family knows: an answer and its end are learned, the header before it is not.
Legend: T tokens.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import itemgetter
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mmfn.batch import TEXT
from mmfn.errors import UserError
from mmfn.models.data.chat import ChatFormat, TextsByKind, read_template
from mmfn.train.chat_options import PUBLISHED, ChatOptions
from mmfn.train.data.answers import check_marks, check_whole, close, find_answers, learned
from mmfn.train.data.render import Message, Spans, has_blocks, plain_messages, roles_of_lists, run_template, with_marks
from mmfn.train.data.tokenizer import Tokenizer, own_template, token_id


@dataclass(frozen=True, kw_only=True)
class Chat:
    """How conversations become tokens.

    `format`: what the model's family says of it. `kinds`: int64[T] tokens -> int64[T], the kind of each. `template`:
    jinja source; `program`: the same as it is run (`render.with_marks`), with `variables`. `lists`: roles whose content
    it takes as a list of parts alone.
    """

    tokenizer: Tokenizer
    format: ChatFormat
    kinds: Callable[[Tensor], Tensor]
    options: ChatOptions
    template: str
    program: str
    variables: Mapping[str, Any]
    lists: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """`tokens_T`: int64[T]. `supervised_T`: bool[T], what is learned. `kinds_T`: int64[T] (see mmfn.batch)."""

    tokens_T: Tensor
    supervised_T: Tensor
    kinds_T: Tensor


def make_chat(
    tokenizer: Tokenizer,
    format: ChatFormat,
    kinds: Callable[[Tensor], Tensor],
    template: str = "",
    options: ChatOptions = PUBLISHED,
) -> Chat:
    """`template` (jinja source), or else the tokenizer's own, or else the family's first, made ready for training.

    The tokenizer cuts and pads nothing from then on. Raises ValueError when there is no template, it says nowhere what
    the assistant wrote, an option has no effect, or a token of `format` is none of the tokenizer.
    """
    source = template or own_template(tokenizer) or (read_template(format.templates[0]) if format.templates else "")
    if not source:
        raise UserError("the tokenizer has no chat template; give one with {% generation %} blocks as data.template")
    if format.marks is None and not has_blocks(source):
        raise UserError("the chat template has no {% generation %} block; put one around the assistant's content")
    _check_options(source, format, options)
    for token in format.tokens.values():
        token_id(tokenizer, token)
    tokenizer.backend_tokenizer.no_truncation()  # a file may ask for both; the library undoes them at each call
    tokenizer.backend_tokenizer.no_padding()
    if not options.video_outer_marks:
        format = replace(format, placeholders={**format.placeholders, **format.bare})
    thinking = {} if options.enable_thinking is None else {"enable_thinking": options.enable_thinking}
    program, variables = with_marks(source), {**tokenizer.special_tokens_map, **thinking}
    return Chat(
        tokenizer=tokenizer,
        format=format,
        kinds=kinds,
        options=options,
        template=source,
        program=program,
        variables=variables,
        lists=roles_of_lists(program, variables),
    )


def encode(
    messages: Sequence[Message],
    chat: Chat,
    *,
    texts: TextsByKind = MappingProxyType({}),
    tools: Sequence[Mapping[str, Any]] | None = None,
    is_prompt: bool = False,
    only_last: bool = False,
) -> Encoded:
    """Tokens of a conversation in the messages format (`role`, `content` as a string or list of parts, `loss`).

    `texts`: what is written for the media of each kind, in order. `is_prompt` appends the header of an answer to be
    generated, and nothing is learned; `only_last`: the last answer is, whatever its `loss`. Raises ValueError when the
    template rejects the messages, drops a part of them or does not tell the answers apart, or the text does not hold
    one placeholder per medium.
    """
    text, answers = render(messages, chat, tools=tools, is_prompt=is_prompt)
    spans = [] if is_prompt else learned(text, answers, messages, chat.format, chat.options, only_last=only_last)
    text, both, counts = _insert_media(text, [*spans, *answers], chat, texts)
    spans, starts = both[: len(spans)], [start for start, _ in both[len(spans) :]]
    ids, offsets = _tokenize(text, starts, chat.tokenizer)
    tokens_T = torch.tensor(ids, dtype=torch.int64)
    supervised_T = torch.zeros(tokens_T.shape, dtype=torch.bool)
    for start, end in spans:  # all tokens that touch it: offsets ascend
        first = bisect_right(offsets, start, key=itemgetter(1))
        supervised_T[first : bisect_left(offsets, end, key=itemgetter(0))] = True
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
    places_T = torch.repeat_interleave(counts_T)
    tokens_T, supervised_T, kinds_T = tokens_T[places_T], supervised_T[places_T], kinds_T[places_T]
    return Encoded(tokens_T=tokens_T, supervised_T=supervised_T & (kinds_T == TEXT), kinds_T=kinds_T)


def render(
    messages: Sequence[Message],
    chat: Chat,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    is_prompt: bool = False,
) -> tuple[str, Spans]:
    """The text of a conversation and the spans of its answers, each with its end. Raises as `encode` does."""
    check_marks(messages, tools, chat.format)
    _check_place(messages, tools, chat.template)
    messages = plain_messages(messages, chat.lists)
    text, answers = run_template(chat.program, messages, tools=tools, is_prompt=is_prompt, variables=chat.variables)
    marks = chat.format.marks
    if marks is not None and not has_blocks(chat.template):
        answers = find_answers(text, marks)[: -1 if is_prompt else None]
        num_answers = sum(message["role"] == "assistant" for message in messages)
        if len(answers) != num_answers:
            raise UserError(
                f"the chat template writes {marks.header!r} {len(answers)} times for {num_answers} answers; put "
                "{% generation %} blocks around the assistant's content"
            )
    if marks is not None and not is_prompt:
        text, answers = close(text, answers, messages, marks)
    check_whole(text, answers, messages, marks)
    return text, answers


def _check_options(template: str, chat_format: ChatFormat, options: ChatOptions) -> None:
    if options.enable_thinking is not None and "enable_thinking" not in template:
        raise UserError("data.enable_thinking has no effect: the chat template does not read it; remove it")
    if not options.train_empty_thinking and not (chat_format.marks and chat_format.marks.thinking):
        raise UserError("data.train_empty_thinking has no effect: the model has no think blocks; remove it")
    if not options.video_outer_marks and not chat_format.bare:
        raise UserError("data.video_outer_marks has no effect: the model's videos have one pair of marks; remove it")


def _check_place(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, template: str) -> None:
    """What a template does not even mention it would drop without a word."""
    said = {key for message in messages for key in ("reasoning_content", "tool_calls") if message.get(key)}
    for key in sorted(said | ({"tools"} if tools else set())):
        if key not in template:
            raise UserError(
                f"the chat template has no place for {key!r} and would drop it; write it into the content as the model "
                "writes it, or give a template that has one"
            )


def _tokenize(text: str, starts: Sequence[int], tokenizer: Tokenizer) -> tuple[list[int], Spans]:
    """(ids, the span of each) of a text in which no token stands across one of `starts`, the beginnings of answers.

    A tokenizer joins the line end of a header with those that an answer begins with. A model is asked with the header
    alone, so that it could never write such a token: the tokens of a prompt are the beginning of its sample's.
    """

    def encode_piece(first: int, last: int) -> tuple[list[int], Spans]:
        encoding = tokenizer.backend_tokenizer.encode(text[first:last], add_special_tokens=False)
        return encoding.ids, [
            (start + first, end + first) for start, end in encoding.offsets
        ] if first else encoding.offsets

    ids, offsets = encode_piece(0, len(text))
    crossed = [bisect_right(offsets, start, key=itemgetter(1)) for start in starts]
    cuts = [start for start, i in zip(starts, crossed, strict=True) if i < len(offsets) and offsets[i][0] < start]
    if not cuts:
        return ids, offsets
    pieces = [encode_piece(*ends) for ends in pairwise([0, *cuts, len(text)])]
    return [token for piece in pieces for token in piece[0]], [span for piece in pieces for span in piece[1]]


def _insert_media(text: str, spans: Spans, chat: Chat, texts: TextsByKind) -> tuple[str, Spans, list[int]]:
    """Replace each placeholder by the text of its medium; spans move along. Also the counts of all texts, in order."""
    matches = list(chat.format.pattern.finditer(text))
    for kind in dict.fromkeys((*chat.format.placeholders, *texts)):
        num_places, num_media = sum(match.lastgroup == kind for match in matches), len(texts.get(kind, ()))
        if num_places != num_media:
            raise UserError(
                f"the rendered text holds {num_places} {kind} placeholders for {num_media} {kind}s; mark each {kind} "
                "once, in a turn of the user, with a chat template that writes it, and keep the placeholder token "
                "itself out of the text"
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
