"""Alpaca: an instruction, its input and the output, with earlier turns as pairs."""

from collections.abc import Mapping
from typing import Any

from mmfn.errors import UserError
from mmfn.train.data.entries import show
from mmfn.train.data.formats.turns import system_message
from mmfn.train.dialect import Names


def read_alpaca(entry: Mapping[str, Any], columns: Names, tags: Names) -> list[dict[str, Any]]:
    """The messages of an entry: the input stands on a line below the instruction.

    `{"instruction": "Add", "input": "1 2", "output": "3", "history": [["hi", "yo"]]}` says hi, yo, "Add\\n1 2", 3.
    Raises ValueError naming the key that is wrong.
    """
    messages = system_message(entry, columns)
    history = entry.get(columns["history"])
    for place, pair in enumerate([] if history is None else _list(history, columns["history"])):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise UserError(
                f"{columns['history']!r} must hold pairs [question, answer], got {show(pair)} at {place}; write both"
            )
        messages += _pair(*pair)
    question = _text(entry, columns["prompt"])
    if entry.get(columns["query"]):
        question = "\n".join(text for text in (question, _text(entry, columns["query"])) if text)
    if not question:
        raise UserError(f"{columns['prompt']!r} is empty; write what is asked")
    return [*messages, *_pair(question, _text(entry, columns["response"]))]


def _pair(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _text(entry: Mapping[str, Any], key: str) -> str:
    text = entry.get(key)
    if not isinstance(text, str):
        raise UserError(f"{key!r} must be a string, got {show(text)}; write the text there")
    return text


def _list(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{key!r} must be a list of pairs [question, answer], got {show(value)}; put it in a list")
    return value
