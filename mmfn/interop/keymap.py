"""`KeyMap`: tree paths <-> Hugging Face tensor names, as data. Both directions are derived from one list."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from mmfn import tree
from mmfn.spec import ParamSpec
from mmfn.tree import Tree

_HOLE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """`path` <-> `name`. A hole `{i}` stands for one component and is the same on both sides.

    `disk_shape`: the shape on disk where it differs from the leaf's (same elements in the same order).
    """

    path: str
    name: str
    disk_shape: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class KeyMap:
    """Ordered entries; the first that matches wins.

    `copies`: stored names that may repeat a leaf (a tied head): accepted when equal to it, never written.
    `architecture`: the transformers class that reads these names.
    """

    entries: tuple[Entry, ...]
    architecture: str
    copies: Mapping[str, str] = field(default_factory=dict)

    def stored(self, specs: Tree) -> dict[str, "Stored"]:
        """`{Hugging Face name: Stored}` of all leaves of a spec tree (or any tree of that structure), in path order.

        Raises ValueError when a path has no entry or two paths get one name.
        """
        result: dict[str, Stored] = {}
        for path, leaf in tree.items(specs):
            entry, name = self._translate(path)
            if name in result:
                raise ValueError(f"paths {result[name].path!r} and {path!r} both map to {name!r}; correct the key map")
            shape = entry.disk_shape or tuple(leaf.shape)
            result[name] = Stored(path=path, shape=shape, leaf=leaf)
        return result

    def _translate(self, path: str) -> tuple[Entry, str]:
        for entry, pattern in self._patterns:
            if match := pattern.fullmatch(path):
                return entry, entry.name.format(**match.groupdict())
        raise ValueError(f"path {path!r} has no Hugging Face name; add an entry to the family's key map")

    @cached_property
    def _patterns(self) -> list[tuple[Entry, re.Pattern[str]]]:
        return [(e, re.compile(_HOLE.sub(r"(?P<\1>[^/]+)", e.path))) for e in self.entries]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor on disk: the path of its leaf, its shape on disk, and its spec."""

    path: str
    shape: tuple[int, ...]
    leaf: ParamSpec
