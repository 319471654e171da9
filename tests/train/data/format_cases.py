"""One conversation with an image and one with tools, in the words of every format."""

import json
from pathlib import Path
from typing import Any

from mmfn.train.data.records import Record, Records, parse_record
from mmfn.train.data.sources import open_source
from mmfn.train.dialect import Dialect, check_dialect

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"name": "add", "arguments": {"a": 1, "b": "ö"}}
FULL_CALL = {"type": "function", "function": CALL}
CALL_TEXT = json.dumps(CALL)
PLAIN = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>What?"},
        {"role": "assistant", "content": "A cat."},
    ],
    "images": ["a.png"],
}
WITH_TOOLS = {
    "messages": [
        {"role": "user", "content": "Add"},
        {"role": "assistant", "content": "I look.", "tool_calls": [FULL_CALL, FULL_CALL]},
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "3 and 4"},
    ],
    "tools": [TOOL],
}
VLM = {
    "columns": {"messages": "messages"},
    "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
}
URL_PART = {"type": "image_url", "image_url": {"url": "a.png"}}


def turns(*pairs: tuple[str, Any], keys: tuple[str, str] = ("from", "value")) -> list[dict[str, Any]]:
    return [dict(zip(keys, pair, strict=True)) for pair in pairs]


def read(entry: Any, format: str = "auto", **names: Any) -> Record:
    dialect = Dialect(format=format, **names)
    check_dialect(dialect)
    return parse_record(entry, "0", dialect)


ASKED = ("human", "<image>What?"), ("gpt", "A cat.")
SYSTEM_TURN = ("system", "Be brief.")
TOOL_TURNS = ("human", "Add"), ("gpt", "I look."), ("function_call", CALL_TEXT), ("function_call", CALL_TEXT)
SHAREGPT_TOOLS = turns(*TOOL_TURNS, ("observation", "3"), ("observation", "4"), ("gpt", "3 and 4"))
NAMES = {"human": "user", "gpt": "assistant", "function_call": "tool_call", "observation": "tool_response"}
ROLE_TOOLS = [{"role": NAMES[turn["from"]], "content": turn["value"]} for turn in SHAREGPT_TOOLS]
ALPACA = {"instruction": "<image>What?", "input": "", "output": "A cat.", "system": "Be brief.", "image": "a.png"}


def read_records(path: Path, dialect: Dialect | None = None, max_samples: int | None = None) -> list[Record]:
    """All entries of a file."""
    records = Records(open_source(path), dialect, max_samples)
    return [records[index] for index in range(len(records))]
