"""`Account`: what operators do by class, as a model of time needs it: products, attention, memory traffic, launches.

A kernel (a product, attention, an operator of this package) reads its arguments and writes its results. What runs
between two kernels, elementwise operators and sums, is counted twice: as eager execution runs it, each operator by
itself, and fused, as a compiler does: a group of them reads once what was made outside of it, and writes what is there
when it ends. Views, and what only copies between ranks or to the host, count nothing. Neither do integers and single
numbers.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmfn.ops import flops
from mmfn.torch_private import UNSAFE_VIEW, local_tensor, storage_key
from mmfn.torch_private import schema as schema_of

LARGE, NARROW, GROUPED, NARROW_GROUPED, ATTENTION, MEMORY = CLASSES = (
    "products",
    "narrow products",
    "grouped products",
    "narrow grouped products",
    "attention",
    "memory",
)
"""Classes of operators. "memory": elementwise ones, sums, copies, look-ups; what they take is reading and writing."""
FLOPS, BYTES, LAUNCHES, FUSED_BYTES, FUSED_LAUNCHES = (
    "flops",
    "bytes",
    "launches",
    "fused bytes",
    "fused launches",
)
LEAST_WIDE = 1024  # of m, k and n of a product that is not narrow

Entry = tuple[str, str, str]  # phase, class, what is counted
Storage = tuple[int, int]  # key, number

_aten = torch.ops.aten
_PRODUCTS = frozenset({_aten.mm, _aten.bmm, _aten.addmm, _aten.addmm_, _aten.baddbmm})
_EMPTY = frozenset({_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided})
_OVERWRITES = frozenset({_aten.copy_, _aten.fill_, _aten.zero_})
_PICKS = frozenset({_aten.embedding, _aten.index_select, _aten.index, _aten.gather})
"""They read as much as they return."""
_PUTS = frozenset({_aten.index_add_, _aten.index_put_, _aten.scatter_add_, _aten.scatter_})
"""They read and write, of what they change, as much as they are given."""


class _Kind(NamedTuple):
    packet: Any
    is_free: bool  # it moves nothing
    is_kernel: bool  # a compiler does not fuse it
    written: tuple[int | str, ...]  # arguments that it writes
    reads_written: bool
    name: str


class Account:
    """Counts of a step, in `work`: (phase, class, what is counted) -> how much. One group is open at a time.

    `alive`: the storages that are there, by `storage_key`, each with a number that no other has had.
    """

    def __init__(self, alive: Mapping[int, tuple[int, Any]]) -> None:
        self.work: Counter[Entry] = Counter()
        self._alive = alive
        self._kinds: dict[int, _Kind] = {}  # by the id of an operator, whose hash is slow
        self._fresh: dict[Storage, int] = {}  # made in the group -> bytes written to it
        self._seen: set[tuple[Storage, int, bool]] = set()  # (storage, offset, is written) made outside of it
        self._where: tuple[str, tuple[int, int]] = ("", (1, 1))  # phase, and what the work counts for
        self._is_open = False

    def note(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        out: Any,
        *,
        work: int,
        where: tuple[str, tuple[int, int]],
        is_grouped: bool = False,
    ) -> None:
        """One operator that has run. `work`: its FLOPs; `where`: its phase, and (rows, rows that are traced)."""
        if where != self._where:
            self.end_group()
            self._where = where
        kind = self._kinds.get(id(func))
        if kind is None:
            kind = self._kinds[id(func)] = _kind(func)
        if kind.is_free:
            for x in _floats((out,)) if kind.packet in _EMPTY else ():
                self._fresh.setdefault(self._storage(x), 0)
            return
        found = [kwargs[w] if isinstance(w, str) else args[w] for w in kind.written] or (out,)
        results, arguments = list(_floats(found)), list(_floats(args))
        if not results and not arguments:
            return
        if kind.packet in _PICKS:
            arguments = results
        elif kind.packet in _PUTS:
            arguments, results = arguments[1:] * 2, arguments[1:]
        elif not kind.reads_written:
            arguments = arguments[1:]
        if kind.is_kernel:
            self._kernel(class_of(kind, args, work, is_grouped=is_grouped), work, (*arguments, *results))
        else:
            self._fusible(arguments, results, is_new=kind.written == ())

    def end_group(self) -> None:
        """What was made in the group and is there is written now."""
        if self._is_open:
            alive = self._alive
            self._add(
                MEMORY, FUSED_BYTES, sum(n for (key, made), n in self._fresh.items() if _number(alive, key) == made)
            )
            self._add(MEMORY, FUSED_LAUNCHES, 1)
        self._fresh.clear()
        self._seen.clear()
        self._is_open = False

    def end(self) -> Counter[Entry]:
        """All that was counted."""
        self.end_group()
        return self.work

    def _kernel(self, name: str, work: int, moved: Sequence[Tensor]) -> None:
        self.end_group()
        num_bytes = sum(map(_bytes, moved))
        self._add(name, FLOPS, work)
        for bytes_of, launches_of in ((BYTES, LAUNCHES), (FUSED_BYTES, FUSED_LAUNCHES)):
            self._add(name, bytes_of, num_bytes)
            self._add(name, launches_of, 1)

    def _fusible(self, arguments: Sequence[Tensor], results: Sequence[Tensor], *, is_new: bool) -> None:
        self._is_open = True
        self._add(MEMORY, BYTES, sum(map(_bytes, (*arguments, *results))))
        self._add(MEMORY, LAUNCHES, 1)
        for x in arguments:
            self._once(x, is_written=False)
        for x in results:
            storage = self._storage(x)
            if is_new:
                self._fresh[storage] = _bytes(x)
            elif storage in self._fresh:
                self._fresh[storage] = min(self._fresh[storage] + _bytes(x), x.untyped_storage().nbytes())
            else:
                self._once(x, is_written=True)

    def _once(self, x: Tensor, *, is_written: bool) -> None:
        """Count what a group reads, or writes, of memory that was made outside of it."""
        storage = self._storage(x)
        place = storage, int(x.storage_offset()), is_written
        if storage not in self._fresh and place not in self._seen:
            self._seen.add(place)
            self._add(MEMORY, FUSED_BYTES, _bytes(x))

    def _storage(self, x: Tensor) -> Storage:
        key = storage_key(x.untyped_storage())
        return key, _number(self._alive, key)

    def _add(self, name: str, what: str, amount: int) -> None:
        phase, (rows, traced_rows) = self._where
        if amount:
            self.work[phase, name, what] += amount * rows // traced_rows


def _number(alive: Mapping[int, tuple[int, Any]], key: int) -> int:
    """That of a storage, -1 where it is not there."""
    return alive[key][0] if key in alive else -1


def class_of(kind: _Kind, args: Sequence[Any], work: int, *, is_grouped: bool) -> str:
    """The class of a kernel. A product is narrow where m, k or n is below `LEAST_WIDE`, one of groups (experts) where
    the width of its rows or of its results is."""
    if "attention" in kind.name:
        return ATTENTION
    matrices = [x for x in args if isinstance(x, Tensor) and x.ndim > 1]
    if kind.packet in _PRODUCTS:
        a, b = matrices[-2:]
        is_wide = min(*a.shape[-2:], b.shape[-1]) >= LEAST_WIDE
    elif is_grouped := "grouped" in kind.name:
        is_wide = min(n for x in matrices for n in x.shape[1:]) >= LEAST_WIDE
    else:
        return NARROW if work else MEMORY
    if is_grouped:
        return GROUPED if is_wide else NARROW_GROUPED
    return LARGE if is_wide else NARROW


@cache
def _kind(func: Any) -> _Kind:
    schema = schema_of(func)
    packet, name = func.overloadpacket, schema.name.partition("::")[2]
    is_own = func.namespace == "mmfn"
    moves = is_own and name in flops.MOVES
    alias = [r.alias_info for r in schema.returns if r.alias_info is not None]
    is_view = packet is UNSAFE_VIEW or any(not info.is_write for info in alias)
    named = [(i, x) for i, x in enumerate(schema.arguments) if x.alias_info is not None and x.alias_info.is_write]
    written = tuple(x.name if x.kwarg_only else i for i, x in named)
    is_kernel = is_own or packet in _PRODUCTS or "attention" in name
    return _Kind(
        packet=packet,
        is_free=moves or is_view or packet in _EMPTY,
        is_kernel=is_kernel and not moves,
        written=written,
        reads_written=packet not in _OVERWRITES,
        name=name,
    )


def _floats(values: Sequence[Any]) -> Iterator[Tensor]:
    """The floating-point tensors of a dimension or more, those of lists too, this rank's part of each."""
    for x in values:
        if isinstance(x, Tensor):
            x = local_tensor(x) if isinstance(x, DTensor) else x
            if x.is_floating_point() and x.ndim:
                yield x
        elif isinstance(x, list | tuple):
            yield from _floats(x)


def _bytes(x: Tensor) -> int:
    """Of what is expanded, as much as there is; nothing of a single number."""
    there, size = x.untyped_storage().nbytes(), x.element_size()
    return min(x.numel() * size, there) if there > size else 0
