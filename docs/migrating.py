"""Draws docs/migrating.md from docs/migrating.yaml: what becomes of every setting of MindSpeed-MM. `make migrating`."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

DATA = Path(__file__).with_suffix(".yaml")
PAGE = Path(__file__).with_suffix(".md")

HEAD = """\
# Coming from MindSpeed-MM

What becomes of every setting of its configs of Qwen3-VL, Qwen2.5-VL, Qwen3-Omni, Qwen3.5 and GLM-4.5V, of the native
files, of those for Megatron with FSDP2, and of arguments for Megatron. This page is drawn from `docs/migrating.yaml`
(`make migrating`); what a key of mmfn means is in [config.md](config.md). Where none is named, it is said why.

The shortest way is not to translate: `mmfn suggest MODEL DATA --device 910b --world 16` writes a config with batches
by the lengths of the data and a layout that fits, `configs/` has one for every published size, and `mmfn check CONFIG`
says what is wrong with one.

- **One file.** `data`, `model`, `features`, `parallel` and `training` of a native file are sections of one file here
  as well; a key that is not known is refused, with the nearest one that is.
- **Tokens, not samples.** `micro_batch_size` becomes the largest of `data.token_buckets`: samples are packed, so a
  batch is full whatever they are.
- **Published checkpoints.** Hugging Face safetensors are read and written as they are; there is no step of conversion
  before training or behind it.
"""


class Row(NamedTuple):
    """A setting there, settings and commands here, and how it is carried over, or why not."""

    theirs: str
    ours: tuple[str, ...]
    how: str


def sections() -> Iterator[tuple[str, list[Row]]]:
    """The rows of every part of the page."""
    for title, rows in yaml.safe_load(DATA.read_text(encoding="utf-8")).items():
        yield title, [_row(*row) for row in rows]


def page() -> str:
    """The page as text."""
    lines = [HEAD]
    for title, rows in sections():
        lines += [f"## {title[0].upper()}{title[1:]}", "", "| there | here | how |", "|---|---|---|"]
        for row in rows:
            here = ", ".join(f"`{name}`" for name in row.ours) or "none"
            lines.append(f"| `{row.theirs}` | {here} | {row.how} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _row(theirs: str, ours: str | list[str], how: str) -> Row:
    return Row(theirs, tuple([ours] if isinstance(ours, str) else ours) if ours else (), how)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
