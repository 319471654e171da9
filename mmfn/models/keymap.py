"""`KeyMap`: tree paths <-> Hugging Face tensor names, as data. Both directions are derived from one list.

Some families are stored in two layouts: "hub", that of the published checkpoints, and "transformers", in which the
library holds a model and may save it again.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from mmfn import tree
from mmfn.spec import ParamSpec
from mmfn.tree import Tree

_HOLE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """`path` <-> `name`. A hole `{i}` stands for one component and is the same on both sides.

    `dims`: the leaf's dims in the order they have on disk, `disk_shape`: the shape on disk of the elements in that
    order; None where they are the leaf's own.
    """

    path: str
    name: str
    dims: tuple[int, ...] | None = None
    disk_shape: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class KeyMap:
    """Ordered entries; the first that matches wins.

    `layouts`: the entries in which a layout differs; they stand before `entries`. `copies`: stored names that may
    repeat a leaf (a tied head): accepted when equal to it, never written. `architecture`: the transformers class that
    reads these names.
    """

    entries: tuple[Entry, ...]
    architecture: str
    layouts: Mapping[str, tuple[Entry, ...]] = field(default_factory=lambda: {"hub": (), "transformers": ()})
    copies: Mapping[str, str] = field(default_factory=dict)

    def stored(self, specs: Tree, layout: str = "hub") -> dict[str, "Stored"]:
        """`{Hugging Face name: Stored}` of all leaves of a spec tree (or any tree of that structure), in path order.

        Raises ValueError for an unknown layout, when a path has no entry or two paths get one name.
        """
        if layout not in self.layouts:
            raise ValueError(f"layout {layout!r} is unknown; use one of {', '.join(self.layouts)}")
        result: dict[str, Stored] = {}
        for path, leaf in tree.items(specs):
            entry, name = self._translate(path, layout)
            if name in result:
                raise ValueError(f"paths {result[name].path!r} and {path!r} both map to {name!r}; correct the key map")
            dims = entry.dims or tuple(range(len(leaf.shape)))
            shape = entry.disk_shape or tuple(leaf.shape[d] for d in dims)
            result[name] = Stored(path=path, dims=dims, shape=shape, leaf=leaf)
        return result

    def _translate(self, path: str, layout: str) -> tuple[Entry, str]:
        for entry, pattern in self._patterns[layout]:
            if match := pattern.fullmatch(path):
                return entry, entry.name.format(**match.groupdict())
        raise ValueError(f"path {path!r} has no Hugging Face name; add an entry to the family's key map")

    @cached_property
    def _patterns(self) -> dict[str, list[tuple[Entry, re.Pattern[str]]]]:
        return {
            layout: [(e, re.compile(_HOLE.sub(r"(?P<\1>[^/]+)", e.path))) for e in (*own, *self.entries)]
            for layout, own in self.layouts.items()
        }


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor on disk: the path of its leaf, the order of the leaf's dims, its shape on disk, and the spec."""

    path: str
    dims: tuple[int, ...]
    shape: tuple[int, ...]
    leaf: ParamSpec

    def to_disk(self, leaf: Tensor) -> Tensor:
        """The leaf as it is on disk: a view, where its strides allow one."""
        return leaf.permute(self.dims).reshape(self.shape)

    def from_disk(self, tensor: Tensor) -> Tensor:
        """Inverse of `to_disk`: a view of a contiguous tensor."""
        inverse = sorted(range(len(self.dims)), key=self.dims.__getitem__)
        return tensor.reshape([self.leaf.shape[d] for d in self.dims]).permute(inverse)
