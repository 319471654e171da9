"""`mmfn data convert`: a data set of any format as messages."""

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmfn.errors import UserError
from mmfn.train.data.records import Record, read_forms
from mmfn.train.dialect import Dialect, check_dialect
from mmfn.train.run.folder import write_text


def run(args: argparse.Namespace, say: Callable[..., None]) -> None:
    """`mmfn data convert IN OUT`: every entry is checked as for training, and OUT appears complete or not at all."""
    source, out = Path(args.source), Path(args.out)
    dialect = Dialect(
        format=args.format,
        columns=_pairs("--column", args.column),
        tags=_pairs("--tag", args.tag),
        ignore=tuple(args.ignore),
    )
    check_dialect(dialect)
    _check_out(out)
    lines = [_line(form, record) for form, record in read_forms(source, dialect)]
    if not lines:
        raise UserError(f"dataset {args.source!r} is empty; it must hold at least one conversation")
    try:
        write_text(out, "".join(lines))
    except OSError as error:
        raise UserError(f"OUT {args.out!r} cannot be written ({error.strerror}); choose another place") from error
    say(f"wrote {len(lines)} entries to {args.out}")
    if out.parent.resolve() != source.parent.resolve():
        say(f"paths of media are unchanged; set data.root={source.parent} to train on it")


def _check_out(out: Path) -> None:
    if out.suffix != ".jsonl":
        raise UserError(f"OUT is {str(out)!r} but one line is written for each entry; end its name in .jsonl")
    if not out.parent.is_dir():
        raise UserError(f"the folder of OUT {str(out)!r} does not exist; make it or choose another")
    if os.path.lexists(out):
        raise UserError(f"OUT {str(out)!r} exists; remove it or choose another name")


def _line(form: Mapping[str, Any], record: Record) -> str:
    """An entry as JSON; what it leaves open (null, calls as strings) is written out, text stays as it is."""
    entry = {key: value for key, value in form.items() if key != "tools"}
    entry["messages"] = [
        {**parsed, "content": "" if raw.get("content") is None else raw["content"]}
        for raw, parsed in zip(form["messages"], record.messages, strict=True)
    ]
    if record.tools:
        entry["tools"] = list(record.tools)
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{option} {text!r} has no '='; write it as NAME=VALUE")
        if name in pairs:
            raise UserError(f"{option} {name!r} is given twice; keep one of them")
        pairs[name] = value
    return pairs
