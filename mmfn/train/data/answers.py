"""What the assistant said in a rendered text, and what of it is learned. Spans count characters."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmfn.errors import UserError
from mmfn.models.data.chat import ChatFormat, Marks
from mmfn.train.chat_options import ChatOptions
from mmfn.train.data.entries import show
from mmfn.train.data.render import BEGIN, END, Message, Spans


def find_answers(text: str, marks: Marks) -> Spans:
    """The answers in a text that no generation block tells: from behind each header to the end that is learned.

    An answer that another turn cuts off ends before it, and the last one may end with the text.
    """
    spans, boundary = [], marks.boundary
    place = text.find(marks.header)
    while place >= 0:
        start = place + len(marks.header)
        match = boundary.search(text, start)
        after = len(text) if match is None else match.start()
        spans.append((start, match.end("end") if match and match["end"] is not None else after))
        place = text.find(marks.header, after)
    return spans


def close(text: str, answers: Spans, messages: Sequence[Message], marks: Marks) -> tuple[str, Spans]:
    """Append what ends the last answer where a template leaves it open: without it a model would never learn to stop.

    Of GLM-4.5V, whose turns end with the role of the next: "...<|assistant|>\\nyes" becomes "...yes<|user|>".
    """
    end = marks.closing[bool(messages[-1].get("tool_calls"))] if messages and _is_answer(messages[-1]) else ""
    if not end or not answers or answers[-1][1] != len(text) or text.endswith(marks.stops):
        return text, answers
    return text + end, [*answers[:-1], (answers[-1][0], len(text) + len(end))]


def learned(
    text: str,
    answers: Spans,
    messages: Sequence[Message],
    chat_format: ChatFormat,
    options: ChatOptions,
    *,
    only_last: bool = False,
) -> Spans:
    """The spans that are learned, by the options and each message's own `loss`, or the last one alone.

    Raises ValueError where a choice between answers is asked for but the template does not tell them apart.
    """
    if only_last:
        return _without_blocks(text, answers[-1:], chat_format, options)
    flags = [message.get("loss") for message in messages]
    if options.train_on_prompt:
        if any(flag is not None for flag in flags):
            raise UserError("a message has 'loss' but data.train_on_prompt learns all of them; remove one of the two")
        return [(0, len(text))]
    places = [place for place, message in enumerate(messages) if _is_answer(message)]
    first = _last_question(messages) if options.mask_history else -1
    choice = [place > first and flags[place] is not False for place in places]
    if not all(choice):
        if len(answers) != len(places):
            raise UserError(
                f"the chat template has {len(answers)} generation blocks for {len(places)} answers, which cannot be "
                "told apart; put one block around each, or remove 'loss' and data.mask_history"
            )
        answers = [span for span, is_learned in zip(answers, choice, strict=True) if is_learned]
    return _without_blocks(text, answers, chat_format, options)


def _without_blocks(text: str, answers: Spans, chat_format: ChatFormat, options: ChatOptions) -> Spans:
    if options.train_empty_thinking or chat_format.marks is None:
        return answers
    block = chat_format.marks.empty_thought
    return [(match.end() if (match := block.match(text, start, end)) else start, end) for start, end in answers]


def check_marks(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, chat_format: ChatFormat
) -> None:
    """Raise ValueError for what would be taken for a turn, or a medium, that is none."""
    marks = [BEGIN, END, *chat_format.tokens.values()]
    marks += (*chat_format.marks.tokens, *chat_format.marks.stops) if chat_format.marks else ()
    items = {f"message {place}": message for place, message in enumerate(messages)}
    for name, item in (items | {"a tool": tools} if tools else items).items():
        text = json.dumps(item, ensure_ascii=False, default=str)
        for mark in marks:
            if mark in text:
                raise UserError(
                    f"{name} holds {mark!r}, which only the chat template may write, for a turn or a medium; remove it "
                    "or write it otherwise"
                )


def check_whole(text: str, answers: Spans, messages: Sequence[Message], marks: Marks | None) -> None:
    """Raise ValueError for what a template has dropped: every text of a message must stand where its turn is.

    White space at both ends may go, and thoughts of answers before the last question, which thinking models forget.
    """
    question, num_answers = _last_question(messages), sum(map(_is_answer, messages))
    turns = answers if len(answers) == num_answers else []
    place = index = 0
    for number, message in enumerate(messages):
        is_turn = bool(turns) and _is_answer(message)
        if is_turn:
            place, limit = turns[index]
            index += 1
        else:
            limit = turns[index][0] if index < len(turns) else len(text)
        for piece, is_thought in _pieces(message, marks.thinking if marks else None):
            if is_thought and number < question:
                continue
            found = text.find(piece, place, limit)  # the leftmost, so that what follows is never missed
            if found < 0:
                what = "thought" if is_thought else "text"
                raise UserError(
                    f"message {number}: the chat template drops the {what} {show(piece)}; remove it, or set "
                    "data.template to one that writes it"
                )
            place = found + len(piece)
        place = limit if is_turn else place


def _pieces(message: Message, thinking: tuple[str, str] | None) -> Iterator[tuple[str, bool]]:
    """The texts of a message in the order in which they are written, and whether each is a thought."""
    content = message.get("content") or ""
    texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    pieces = [(text, False) for text in texts]
    if _is_answer(message):
        thought = message.get("reasoning_content") or ""
        if len(texts) == 1 and thinking is not None:
            pieces = _thought_and_words(texts[0], thinking, is_elsewhere=bool(thought))
        pieces = [(thought, True), *pieces]
        pieces += [(call["function"]["name"], False) for call in message.get("tool_calls") or ()]
    yield from ((text.strip(), is_thought) for text, is_thought in pieces if text.strip())


def _thought_and_words(text: str, thinking: tuple[str, str], *, is_elsewhere: bool) -> list[tuple[str, bool]]:
    """An answer whose thought stands before the end of the first think block, or all of it `is_elsewhere`."""
    marks = re.compile("|".join(map(re.escape, thinking)))
    before, mark, after = text.partition(thinking[1])
    if not mark or is_elsewhere:
        return [(piece, False) for piece in marks.split(text)]
    outside, opening, inside = before.partition(thinking[0])
    pieces = [(outside, False), (inside, True)] if opening else [(before, True)]
    return pieces + [(piece, False) for piece in marks.split(after)]


def _last_question(messages: Sequence[Message]) -> int:
    return max((place for place, message in enumerate(messages) if message["role"] == "user"), default=-1)


def _is_answer(message: Message) -> bool:
    return bool(message["role"] == "assistant")
