"""`mmfn data convert`: a data set of any format as messages; and where `mmfn data check` is."""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmfn.errors import UserError
from mmfn.train.data.bad import BadSample
from mmfn.train.data.records import Record, Records
from mmfn.train.data.sources import media_folder, open_source
from mmfn.train.dialect import Dialect, check_dialect
from mmfn.train.run.folder import write_text


def run(args: argparse.Namespace, say: Callable[..., None]) -> None:
    """`mmfn data ACTION`."""
    if args.action == "check":
        from mmfn.train.commands import data_check  # what it needs of models takes a second to import

        data_check.run(args, say)
    else:
        convert(args, say)


def convert(args: argparse.Namespace, say: Callable[..., None]) -> None:
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
    records = Records(open_source(source, args.index_folder), dialect)
    write_text(out, _lines(records))
    say(f"wrote {len(records)} entries to {args.out}")
    root = media_folder(source)
    if out.parent.resolve() != root.resolve():
        say(f"paths of media are unchanged; set data.root={root} to train on it")


def _check_out(out: Path) -> None:
    if out.suffix != ".jsonl":
        raise UserError(f"OUT is {str(out)!r} but one line is written for each entry; end its name in .jsonl")
    if not out.parent.is_dir():
        raise UserError(f"the folder of OUT {str(out)!r} does not exist; make it or choose another")
    if os.path.lexists(out):
        raise UserError(f"OUT {str(out)!r} exists; remove it or choose another name")


def _lines(records: Records) -> Iterator[str]:
    for index in range(len(records)):
        form, record = records.read(index)
        for name in record.media:
            if records.source.medium(index, name) is not None:
                raise BadSample(
                    record.id,
                    records.source.place(index),
                    f"{name!r} is stored with the entry, for which JSONL has no place; train on the data set as it is",
                )
        yield _line(form, record)


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
