"""`Recorder`: what a step allocates, computes and communicates, operator by operator, while it runs.

It stands under the step as a dispatch mode, around its ops as labels, and at the ends of its collectives as the
transport. On shapes alone nothing has values and no rank but this one exists; on real tensors it only watches.
"""

import gc
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmfn.ops import Ops, flops, kernels
from mmfn.ops.kernel import Formula, Whole
from mmfn.parallel.mesh.axis import ALL_TO_ALL
from mmfn.parallel.planning import fake_tensors as shapes
from mmfn.parallel.planning.account import Account, Entry
from mmfn.parallel.weights.host_memory import HOST
from mmfn.torch_private import EagerMode, autograd_node, local_tensor, next_node_number, node_number, storage_key

FORWARD, BACKWARD, UPDATE = "forward", "backward", "update"
CATEGORIES = (
    "parameters",
    "optimizer",
    "batch",
    "gradients",
    "activations",
    "gathered weights",
    "logits",
    "communication",
    "temporaries",
)
_NOT_LABELLED = ("layer", "stack", "logit_bytes", "notes")
_OF_SITE = {
    "communication": "communication",
    "weights": "gathered weights",
    "head": "logits",
    "offloaded": "activations",
    "optimizer": "optimizer",
    "parameters": "parameters",
}
_NAMES = {
    "gather": "weights",
    "gather_head": "weights",
    "linear_cross_entropy": "head",
}  # sites of ops that are not called as the op is

_COUNTED = torch.ops.mmfn.counted_empty.default  # an operator whose last argument is the site of what it makes

Mark = tuple[str, int, int]  # (phase, micro-batch, index of the call of `ops.layer` in it)


@dataclass(slots=True)
class Allocation:
    """One storage. `born`, `died`: places in the order of events (`died` -1: never)."""

    num_bytes: int
    site: str
    phase: str
    born: int
    died: int = -1


@dataclass(frozen=True)
class Key:
    """A kind of collective call."""

    phase: str
    site: str
    axis: str
    op: str


@dataclass(frozen=True)
class Peak:
    """The most bytes alive on the device within one stretch of a step, and all categories at that time."""

    total: int
    parts: dict[str, int]

    @staticmethod
    def of(parts: dict[str, int]) -> "Peak":
        """The peak of known parts; those on the host are not the device's."""
        return Peak(sum(n for name, n in parts.items() if name != HOST), parts)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What one step of one rank did.

    `count`, `sent_bytes` (what the rank gives) by kind of collective, and how many of the calls are `exposed`: waited
    for without work since they were sent; `flops` by (phase, site); `account` by (phase, class, what is counted);
    `peaks` by stretch: a stretch starts where a block starts, forward or backward. Stretches are in the order of time.
    """

    count: Counter[Key]
    sent_bytes: Counter[Key]
    exposed: Counter[Key]
    flops: Counter[tuple[str, str]]
    account: Counter[Entry]
    peaks: dict[Mark, Peak]

    @property
    def peak(self) -> Peak:
        """The largest of all stretches."""
        return max(self.peaks.values(), key=lambda p: p.total)

    @property
    def host_bytes(self) -> int:
        """The most bytes on the host; buffers there are kept."""
        return max(p.parts.get(HOST, 0) for p in self.peaks.values())

    @property
    def hosted_bytes(self) -> int:
        """Bytes of state on the host: what is there before the first block."""
        return self.peaks[FORWARD, 0, -1].parts.get(HOST, 0)

    @property
    def stashed_bytes(self) -> int:
        """Bytes of activations that were sent to the host, over all micro-batches; those of one are there at once."""
        num_batches = 1 + max(batch for _, batch, _ in self.peaks)
        return num_batches * (self.host_bytes - self.hosted_bytes)


class Recorder(EagerMode):
    """Watches everything that runs inside of it. `is_fake`: run on shapes alone (`planning.fake_tensors`)."""

    is_eager = True  # hand-written Functions run as in plain eager execution

    def __init__(self, *, is_fake: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_fake = is_fake
        self.phase = FORWARD
        self.allocations: list[Allocation] = []
        self.count: Counter[Key] = Counter()
        self.sent_bytes: Counter[Key] = Counter()
        self.exposed: Counter[Key] = Counter()
        self.flops: Counter[tuple[str, str]] = Counter()
        self._declared: dict[Any, Formula | None] = {}
        self._formulas: dict[int, Formula | None] = {}  # by the id of an operator, whose hash is slow
        self._collects = False
        self._under_way: dict[int, tuple[Key, int]] = {}  # by storage, with the number of operators that worked before
        self._num_worked = 0
        self._events = 0
        self._marks: list[tuple[int, Mark]] = []
        self._alive: dict[int, tuple[int, Any]] = {}
        self._sites: list[str] = []
        self._site_of_node: dict[int, str] = {}
        self._place = (0, 0)  # micro-batch, layer
        self._times = (1, 1)
        self._ends: list[int] = []  # where forwards end
        self._turns: list[int] = []  # where backwards end
        self.account = Account(self._alive)

    def __enter__(self) -> "Recorder":
        """Python's collector of cycles rests meanwhile: memory is freed where the program frees it, at every run."""
        self._collects = gc.isenabled()
        gc.disable()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        if self._collects:
            gc.enable()

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Run one operator and note what it did."""
        kwargs = kwargs or {}
        self._turn()
        is_shaped = self.is_fake and func is not ALL_TO_ALL  # a transport's own work: noted by it, at every call
        out = shapes.run(func, types, args, kwargs) if is_shaped else func(*args, **kwargs)
        formula = None if types else self._formula(func)
        work = formula(*args, **kwargs, out_val=out) if formula is not None else 0
        if work:
            self.flops[self.phase, self.site] += work * self._times[0] // self._times[1]
            self._num_worked += 1
        site = args[2] if func is _COUNTED else "exchanged" if func is ALL_TO_ALL else None
        for x in (out,) if isinstance(out, Tensor) else out if isinstance(out, Sequence) else ():
            if isinstance(x, Tensor):
                self.allocate(x, site)
        if self.site != "communication":
            where = self.phase, self._times
            self.account.note(func, args, kwargs, out, work=work, where=where, is_grouped=self.site == "experts")
        if isinstance(formula, Whole):
            self._pass(workspace(formula.body, shapes.freeze(args)))
        return out

    @property
    def site(self) -> str:
        """The op whose work is being done, forward or backward; "layers" for what belongs to none."""
        if self._sites:
            return self._sites[-1]
        node = autograd_node()
        site = "layers" if node is None else self._site_of_node.get(node_number(node), "layers")
        return "communication" if site == "weights" else site  # the backward of a gather packs gradients

    def allocate(self, x: Tensor, site: str | None = None) -> None:
        """Count the memory of a tensor for a site, unless it is a view of memory that is counted."""
        if isinstance(x, DTensor):  # whose own storage would count the whole
            x = local_tensor(x)
        storage = x.untyped_storage()
        key = storage_key(storage)
        if key in self._alive or (num_bytes := storage.nbytes()) == 0:
            return
        index = len(self.allocations)
        self.allocations.append(Allocation(num_bytes, site or self.site, self.phase, self._events))
        self._events += 1

        def free(_: Any) -> None:
            del self._alive[key]
            self.allocations[index].died = self._events
            self._events += 1

        self._alive[key] = index, weakref.ref(storage, free)

    def _pass(self, num_bytes: int) -> None:
        """Count bytes that were alive within the operator that has just run."""
        self.allocations.append(Allocation(num_bytes, self.site, self.phase, self._events, self._events + 1))
        self._events += 2

    def hold(self, phase: str, tensors: Iterable[Any]) -> None:
        """Count tensors that were made outside, under the name of a phase."""
        self.phase = phase
        for x in tensors:
            if isinstance(x, Tensor):
                self.allocate(x, phase)

    def begin(self) -> None:
        """The step starts here: what is alive is its state, and peaks are counted from now on."""
        self.phase, self.account = FORWARD, Account(self._alive)
        self._marks = [(self._events, (FORWARD, 0, -1))]

    def watch(self, ops: Ops) -> Ops:
        """The table with every op labelled by its name, and every block marked where it starts.

        Raises ValueError for an op that is not declared: its operators could not be counted.
        """
        self._declared, self._formulas = flops.of_table(kernels(ops)), {}
        named: dict[str, Any] = {
            f.name: self._labelled(getattr(ops, f.name), _NAMES.get(f.name, f.name))
            for f in fields(ops)
            if f.name not in _NOT_LABELLED
        }
        inner = ops.layer

        def layer(block: Any, params: Any, *xs: Any) -> tuple[Tensor, Any]:
            self._start_forward()
            batch, index = self._place
            self._place = (batch, index + (len(params) if isinstance(params, list) else 1))  # a list: a group of blocks
            self._mark(FORWARD, batch, index)
            x, out = inner(block, params, *xs)
            if x.grad_fn is not None:
                x.grad_fn.register_prehook(lambda _: self._mark(BACKWARD, batch, index))
            return x, out

        return replace(ops, **named, layer=layer)

    @contextmanager
    def labelled(self, site: str) -> Iterator[None]:
        """What is allocated or computed within belongs to a site, and so does its backward."""
        first = next_node_number()
        self._sites.append(site)
        try:
            yield
        finally:
            self._sites.pop()
            for number in range(first, next_node_number()):
                self._site_of_node.setdefault(number, site)

    @contextmanager
    def standing_for(self, rows: int, traced_rows: int) -> Iterator[None]:
        """Work within was done for `traced_rows` rows and counts as that for `rows`."""
        self._times = (rows, traced_rows)
        try:
            yield
        finally:
            self._times = (1, 1)

    def called(self, axis: str, op: str, site: str, x: Tensor) -> Key:
        """Note one collective that this rank gives `x` to."""
        self._turn()
        self.account.end_group()
        key = Key(self.phase, site, axis, op)
        self.count[key] += 1
        self.sent_bytes[key] += x.numel() * x.element_size()
        return key

    def sent(self, key: Key, out: Tensor) -> None:
        """Note that `out` is under way from here on."""
        self._under_way[storage_key(out.untyped_storage())] = key, self._num_worked

    def waited(self, out: Tensor) -> None:
        """Note that `out` is waited for: exposed, if nothing has worked meanwhile."""
        call = self._under_way.pop(storage_key(out.untyped_storage()), None)  # None: kept from the forward, not sent
        if call is not None and call[1] == self._num_worked:
            self.exposed[call[0]] += 1

    def trace(self) -> Trace:
        """Everything so far."""
        return Trace(
            count=self.count,
            sent_bytes=self.sent_bytes,
            exposed=self.exposed,
            flops=self.flops,
            account=self.account.end(),
            peaks=self._peaks(),
        )

    def _formula(self, func: Any) -> Formula | None:
        try:
            return self._formulas[id(func)]
        except KeyError:
            formula = self._formulas[id(func)] = flops.formula_of(func, self._declared)
            return formula

    def _labelled(self, fn: Callable[..., Any], site: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._start_forward()
            with self.labelled(site):
                return fn(*args, **kwargs)

        return run

    def _start_forward(self) -> None:
        """An op called outside of a backward pass: a forward, of the next micro-batch if a backward came before."""
        self._turn()
        if self.phase == UPDATE and autograd_node() is None:
            self.phase, self._place = FORWARD, (self._place[0] + 1, 0)
            self._mark(FORWARD, self._place[0], -1)

    def _turn(self) -> None:
        """Notice where a forward turns into a backward, and a backward into an update."""
        is_backward = autograd_node() is not None
        if is_backward and self.phase != BACKWARD:
            self._ends.append(self._events)
            self._mark(BACKWARD, self._place[0], self._place[1])
            self.phase = BACKWARD
        elif self.phase == BACKWARD and not is_backward:
            self._turns.append(self._events)
            self._mark(UPDATE, self._place[0], 0)
            self.phase = UPDATE

    def _mark(self, phase: str, batch: int, index: int) -> None:
        self._marks.append((self._events, (phase, batch, index)))

    def _peaks(self) -> dict[Mark, Peak]:
        """Bytes alive over time, in one pass over births and deaths, with the largest of every stretch."""
        changes = [(0, "")] * self._events  # each event is one birth or death
        for a in self.allocations:
            category = self._category(a)
            changes[a.born] = (a.num_bytes, category)
            if a.died >= 0:
                changes[a.died] = (-a.num_bytes, category)
        alive: Counter[str] = Counter()
        total, found = 0, {}
        for (start, mark), (end, _) in pairwise([(0, None), *self._marks, (self._events, None)]):
            most, parts = total, dict(alive)
            for num_bytes, category in changes[start:end]:
                alive[category] += num_bytes
                total += num_bytes if category != HOST else 0
                if total > most:
                    most, parts = total, dict(alive)
            if mark is not None:  # None: before the step
                found[mark] = Peak(most, parts)
        return found

    def _category(self, a: Allocation) -> str:
        if a.site == HOST:
            return HOST
        if a.phase not in (FORWARD, BACKWARD, UPDATE):  # held before the step
            return a.phase
        later = self._turns if a.phase == BACKWARD else self._ends
        place = bisect_right(later, a.born)
        outlives = place < len(later) and (a.died < 0 or a.died >= later[place])  # its own backward, or the forward
        if outlives and a.phase != FORWARD:
            return "gradients"
        if a.site in _OF_SITE:
            return _OF_SITE[a.site]
        if a.site == "exchanged" and not outlives:
            return "communication"
        return "activations" if outlives else "temporaries"


@lru_cache(maxsize=2**12)
def workspace(body: Callable[..., Any], args: tuple[Any, ...]) -> int:
    """The most bytes that an operator's body holds beside its arguments (`fake_tensors.freeze`) and its results."""
    tensors = shapes.thaw(args)
    with Recorder(is_fake=True) as recorder:
        recorder.hold("batch", tensors)
        recorder.begin()
        out = body(*tensors)
        remains = sum(a.num_bytes for a in recorder.allocations if a.died < 0)
        del out
    return recorder.trace().peak.total - remains
