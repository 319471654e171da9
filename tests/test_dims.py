"""Suffixes of tensor names are letters of one table."""

import ast
import re
from pathlib import Path

from mmfn.dims import DIMS

SUFFIX = re.compile(r"[a-z][a-z0-9_]*_([0-9A-Z]*[A-Z][0-9A-Z]*)")


def names(path: Path) -> set[str]:
    """Every variable, argument and attribute of a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        found |= {
            getattr(node, field) for field in ("id", "arg", "attr") if isinstance(getattr(node, field, None), str)
        }
    return found


def test_every_letter_of_a_suffix_is_in_the_table_and_every_letter_of_the_table_is_used() -> None:
    root = Path(__file__).parents[1] / "mmfn"
    used: dict[str, str] = {}
    for path in root.rglob("*.py"):
        for name in names(path):
            if match := SUFFIX.fullmatch(name):
                used |= {letter: f"{path.relative_to(root)}: {name}" for letter in match[1] if letter.isalpha()}
    assert {letter: where for letter, where in used.items() if letter not in DIMS} == {}
    assert set(DIMS) == set(used)
