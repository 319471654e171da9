"""Answers to prompts: what a model is asked, how the answer is chosen and where it ends, and its text."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mmfn.batch import Sample
from mmfn.errors import UserError
from mmfn.train.data import Processor, encode_sample
from mmfn.train.data.media import MediaReader
from mmfn.train.data.records import parse_record
from mmfn.train.data.tokenizer import Tokenizer
from mmfn.train.forward import Forward
from mmfn.train.generate import end_nothing, generate
from mmfn.train.sampling import GREEDY, Sampling
from mmfn.train.text_stream import TextStream

MARKS = {"image": "<image>", "video": "<video>", "audio": "<audio>"}
OnText = Callable[[int, str], None]
"""(row, by number, and the text that is new of it), called while rows are on their way."""


def ignore_text(row: int, text: str) -> None:
    """Of a caller that waits for the whole answers."""


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """How answers are chosen and where they end: behind `max_new_tokens`, with one of `eos_token_ids`, or ahead of the
    first of the texts `stops`. Raises ValueError for an empty stop."""

    max_new_tokens: int
    eos_token_ids: Sequence[int]
    sampling: Sampling = GREEDY
    stops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if "" in self.stops:
            raise UserError("a text that ends answers is empty, and would end all of them at once; give one character")


def answer_prompts(
    forward: Forward,
    tokenizer: Tokenizer,
    prompts: Sequence[Sample],
    settings: AnswerSettings,
    *,
    rows: Sequence[int] | None = None,
    on_text: OnText = ignore_text,
    check_finite: bool = True,
) -> list[str]:
    """The answer to every prompt, without the token that ends it and without what `settings.stops` cut off.

    `rows`: the numbers of the prompts, from which what is drawn follows; default their places. Of several ranks all
    call this together, those without a prompt too. Raises ValueError as `generate` does.
    """
    numbers = list(range(len(prompts))) if rows is None else list(rows)
    streams = {number: TextStream(partial(text_of, tokenizer=tokenizer), settings.stops) for number in numbers}
    texts = dict.fromkeys(numbers, "")

    def say(row: int, text: str) -> None:
        texts[row] += text
        if text:
            on_text(row, text)

    def on_step(rows: Sequence[int], tokens: Sequence[int]) -> Collection[int]:
        for row, token in zip(rows, tokens, strict=True):
            say(row, streams[row].finish() if token in settings.eos_token_ids else streams[row].push(token))
        return [row for row in rows if streams[row].has_ended]

    is_read = bool(settings.stops) or on_text is not ignore_text  # while it comes
    answers = generate(
        forward,
        forward.pack(prompts),
        settings.max_new_tokens,
        eos_token_ids=settings.eos_token_ids,
        sampling=settings.sampling,
        rows=numbers or None,
        on_step=on_step if is_read else end_nothing,
        is_idle=not prompts,
        check_finite=check_finite,
    )
    for number, tokens in zip(numbers, answers, strict=False):  # an idle row is nobody's answer
        if not is_read:
            texts[number] = text_of(tokens, tokenizer, settings.eos_token_ids)
        elif tokens[-1] not in settings.eos_token_ids:
            say(number, streams[number].finish())
    return list(texts.values())


def text_of(tokens: Sequence[int], tokenizer: Tokenizer, eos_token_ids: Sequence[int] = ()) -> str:
    """The text of an answer: its tokens up to the first that ends it, special tokens included."""
    end = next((i for i, token in enumerate(tokens) if token in eos_token_ids), len(tokens))
    text: str = tokenizer.decode(list(tokens[:end]), skip_special_tokens=False)
    return text


def encode_prompt(
    processor: Processor,
    prompt: str,
    *,
    images: Sequence[str] = (),
    videos: Sequence[str] = (),
    audios: Sequence[str] = (),
    reader: MediaReader | None = None,
) -> Sample:
    """One message of the user and its media as the prompt of an answer.

    `images`, `videos`, `audios`: paths, in the order of their marks in `prompt` (`<image>` and so on); those of a kind
    without marks stand in front of it. `reader`: how media are read, default `MediaReader(processor.media)`. Raises
    ValueError when numbers differ or a file does not decode.
    """
    paths = {"image": list(images), "video": list(videos), "audio": list(audios)}
    ahead = [mark * len(paths[kind]) for kind, mark in MARKS.items() if mark not in prompt]
    message = {"role": "user", "content": "".join(ahead) + prompt}
    record = parse_record({"messages": [message], **{f"{kind}s": of_kind for kind, of_kind in paths.items()}}, "prompt")
    media = (reader or MediaReader(processor.media)).read(record, Path)
    return encode_sample(record.messages, processor, media, is_prompt=True, id=record.id)
