"""`KeyMap`: tree paths <-> Hugging Face tensor names, as data. Loading, saving and slices are derived from one list.

Some families are stored in several layouts: "hub", that of the published checkpoints, "transformers", in which the
library holds a model and may save it again, and others that are only read (an older generation of names).

Legend: E experts, F ffn width, D model width.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from mmfn import tree
from mmfn.errors import UserError
from mmfn.models.disk_tensor import DiskTensor, whole
from mmfn.spec import ParamSpec
from mmfn.tree import Tree

_HOLE = re.compile(r"\{(\w+)\}")
BUFFERS = (r"(.*\.)?rotary\w*\.inv_freq",)
"""Stored by early releases of transformers, computed anew by all later ones."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """`path` <-> `name`. A hole `{i}` stands for one component and is the same on both sides.

    A hole of the name alone numbers the leaf's first dim: one tensor per index, without that dim. Several names lie
    one behind the other along the leaf's dim `join`, in equal parts or with `sizes` along it. Both together, a leaf
    `gate_up` [E, 2F, D] from two tensors [F, D] per expert:

    >>> names = ("layers.{i}.experts.{e}.gate_proj.weight", "layers.{i}.experts.{e}.up_proj.weight")
    >>> Entry(path="layers/{i}/experts/gate_up", name=names, join=1)

    `dims`: the leaf's dims in the order they have on disk, `disk_shape`: the shape on disk of the elements in that
    order, of each tensor; None where they are the leaf's own.
    """

    path: str
    name: str | tuple[str, ...]
    dims: tuple[int, ...] | None = None
    disk_shape: tuple[int, ...] | None = None
    join: int = 0
    sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.names or len(self.sizes or self.names) != len(self.names):
            raise UserError(f"entry {self.path!r} has names {self.names} and sizes {self.sizes}; give one per name")
        numbers = {frozenset(_HOLE.findall(name)) - set(_HOLE.findall(self.path)) for name in self.names}
        if len(numbers) > 1 or len(next(iter(numbers))) > 1:
            raise UserError(f"entry {self.path!r} has other holes in {self.names}; a name may have one, in every name")
        if self.number and len(self.names) > 1 and self.join == 0:
            raise UserError(f"entry {self.path!r} numbers dim 0 by {{{self.number}}}; join its names along another dim")

    @property
    def names(self) -> tuple[str, ...]:
        """The names as a tuple, also where it is one."""
        return (self.name,) if isinstance(self.name, str) else self.name

    @property
    def number(self) -> str:
        """The hole of the name alone, or ""."""
        return next((hole for hole in _HOLE.findall(self.names[0]) if f"{{{hole}}}" not in self.path), "")


@dataclass(frozen=True, kw_only=True)
class KeyMap:
    """Ordered entries; the first that matches wins.

    `layouts`: the entries in which a layout differs; they stand before `entries`. `architecture`: the transformers
    class that reads these names. Every stored name is one of these or refused:

    - a name of a leaf;
    - `copies`: names that may repeat a leaf (a tied head), with its path: accepted when equal to it, never written;
    - `ignore`: regexes of names that are not read and not written (buffers that transformers computes);
    - `verbatim`: regexes of names that are not read but copied, byte for byte, into a checkpoint that is saved (parts
      of a model that are not trained here). `signs`: of some of these the regex of a name that must be there too, which
      tells such a part from one that the config forgot.
    """

    entries: tuple[Entry, ...]
    architecture: str
    layouts: Mapping[str, tuple[Entry, ...]] = field(default_factory=lambda: {"hub": (), "transformers": ()})
    copies: Mapping[str, str] = field(default_factory=dict)
    ignore: tuple[str, ...] = BUFFERS
    verbatim: tuple[str, ...] = ()
    signs: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if absent := {"hub", "transformers"} - set(self.layouts):
            raise UserError(
                f"key map has layouts {list(self.layouts)} but not {min(absent)!r}; add it, () if it is plain"
            )

    def disk_tensors(self, specs: Tree, layout: str = "hub") -> dict[str, DiskTensor]:
        """`{Hugging Face name: DiskTensor}` of the leaves of a spec tree (or a tree of that structure), in path order.

        Raises ValueError for an unknown layout, when a path has no entry, two tensors get one name, or a leaf is no sum
        of the sizes of its entry.
        """
        if layout not in self.layouts:
            raise UserError(f"layout {layout!r} is unknown; use one of {', '.join(self.layouts)}")
        result: dict[str, DiskTensor] = {}
        for path, leaf in tree.items(specs):
            for name, tensor in self._tensors(path, leaf, layout):
                if name in result:
                    raise UserError(
                        f"paths {result[name].path!r} and {path!r} both map to {name!r}; correct the key map"
                    )
                result[name] = tensor
        return result

    def is_ignored(self, name: str) -> bool:
        """Whether a stored name, that of no leaf, is not read."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignore)

    def verbatim_of(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of all stored names of no leaf that are copied as they are: what their `signs` say is such a part."""
        signs = {pattern: self.signs.get(pattern, pattern) for pattern in self.verbatim}
        there = [pattern for pattern, sign in signs.items() if any(re.fullmatch(sign, name) for name in names)]
        return tuple(name for name in names if any(re.fullmatch(pattern, name) for pattern in there))

    def _tensors(self, path: str, leaf: ParamSpec, layout: str) -> Iterator[tuple[str, DiskTensor]]:
        for entry, pattern in self._patterns[layout]:
            if match := pattern.fullmatch(path):
                return _split(entry, path, match.groupdict(), leaf)
        raise UserError(f"path {path!r} has no Hugging Face name; add an entry to the family's key map")

    @cached_property
    def _patterns(self) -> dict[str, list[tuple[Entry, re.Pattern[str]]]]:
        return {
            layout: [(e, re.compile(_HOLE.sub(r"(?P<\1>[^/]+)", e.path))) for e in (*first, *self.entries)]
            for layout, first in self.layouts.items()
        }


def _split(entry: Entry, path: str, holes: Mapping[str, str], leaf: ParamSpec) -> Iterator[tuple[str, DiskTensor]]:
    """`(name, tensor)` of everything a leaf is stored in."""
    number, dims = entry.number, entry.dims or tuple(range(len(leaf.shape)))
    cuts = [None] if len(entry.names) == 1 else _cuts(entry, path, leaf.shape[entry.join])
    for i in range(leaf.shape[0]) if number else [None]:
        for name, cut in zip(entry.names, cuts, strict=True):
            ranges = list(whole(leaf.shape))
            if cut is not None:
                ranges[entry.join] = cut
            if i is not None:
                ranges[0] = (i, i + 1)
            shape = tuple(ranges[d][1] - ranges[d][0] for d in dims if i is None or d != 0)
            yield (
                name.format(**holes, **{number: i}),
                DiskTensor(path=path, ranges=tuple(ranges), dims=dims, shape=entry.disk_shape or shape, leaf=leaf),
            )


def _cuts(entry: Entry, path: str, size: int) -> list[tuple[int, int]]:
    """The range of each name along the dim that they share."""
    count = len(entry.names)
    sizes = entry.sizes or (size // count,) * count
    if sum(sizes) != size:
        raise UserError(f"leaf {path!r} has {size} along dim {entry.join}, not the sum of {list(sizes)}; correct sizes")
    return [(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(count)]
