"""`Plan`: what one rank holds, computes and communicates in one step, as a value that prints, saves and compares."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from mmfn import tree
from mmfn.errors import UserError
from mmfn.ops.flops import FORMULAS
from mmfn.parallel.mesh.layout import Layout, Mesh
from mmfn.parallel.planning.devices import Device
from mmfn.parallel.planning.time_model import MODEL, Time, Transfer, predict, ranks_in_node, wire_bytes
from mmfn.parallel.planning.trace import CATEGORIES, Trace
from mmfn.parallel.weights.sharding import local, sharding_of
from mmfn.tree import Tree

BEGINNING = '{\n "title": '  # of a plan as JSON


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One parameter on this rank: its whole shape, where it is cut, its shard and the bytes of what belongs to it."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    placement: str
    local_shape: tuple[int, ...]
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int


@dataclass(frozen=True, kw_only=True)
class Collective:
    """All calls of one kind. `sent_bytes`: what the rank gives; `wire_bytes`: what crosses its links; `exposed`: how
    many of the calls are waited for without work since they were sent; `size`: ranks of the axis, `node_size` of them
    in the node of this one."""

    phase: str
    site: str
    axis: str
    op: str
    count: int
    sent_bytes: int
    wire_bytes: int
    exposed: int
    size: int
    node_size: int

    @property
    def is_inside_node(self) -> bool:
        """True where all ranks are in one node."""
        return self.node_size == self.size

    @property
    def transfers(self) -> list[Transfer]:
        """What is exposed and what runs beside work, calls being taken to be of equal size."""
        parts = {False: self.exposed, True: self.count - self.exposed}
        return [
            Transfer(
                op=self.op,
                count=num_calls,
                wire_bytes=self.wire_bytes * num_calls / self.count,
                size=self.size,
                node_size=self.node_size,
                is_ahead=is_ahead,
            )
            for is_ahead, num_calls in parts.items()
            if num_calls
        ]


@dataclass(frozen=True, kw_only=True)
class Work:
    """Floating-point operations of one kind."""

    phase: str
    site: str
    flops: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One step of one rank. `peak_parts`: bytes by category when most bytes are alive, at the stretch `peak_at`.

    `peak_flops`, `memory_bytes`: of the device. `host_bytes`: what is kept on the host beside it. `balance`:
    of what the ranks of a batch compute, the part that is real work. `model_flops`: this rank's part of what the model
    needs; `work` is what is computed, some of it again or for padding. `assumptions` say what is not known to a plan;
    `notes` what each transform did.
    """

    title: str
    layout: dict[str, int]
    rank: int
    device: str
    peak_flops: float
    memory_bytes: int
    tokens: int
    leaves: tuple[Leaf, ...]
    collectives: tuple[Collective, ...]
    work: tuple[Work, ...]
    peak_bytes: int
    peak_at: str
    peak_parts: dict[str, int]
    phase_peaks: dict[str, int]
    host_bytes: int = 0
    time: Time
    model_flops: int
    balance: dict[str, float]
    notes: tuple[str, ...]
    assumptions: tuple[str, ...]

    @property
    def flops(self) -> int:
        """All of this rank's."""
        return sum(w.flops for w in self.work)

    @property
    def mfu(self) -> float:
        """The share of the device's peak that the model's FLOPs are, in the predicted time."""
        peak = self.time.total_s * self.peak_flops
        return self.model_flops / peak if peak else 0.0

    @property
    def exposed(self) -> int:
        """Calls of collectives that the rank waits for without work since it sent them."""
        return sum(c.exposed for c in self.collectives)

    @property
    def fits(self) -> bool:
        """True where the peak is below the device's memory."""
        return self.peak_bytes <= self.memory_bytes

    def total(self, name: str) -> int:
        """The sum over leaves of "parameter", "gradient" or "optimizer" bytes."""
        return sum(getattr(leaf, f"{name}_bytes") for leaf in self.leaves)

    def to_json(self) -> str:
        """The plan as text that `from_json` reads; it begins with `BEGINNING`."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def make_plan(
    trace: Trace,
    leaves: Sequence[Leaf],
    mesh: Mesh,
    *,
    title: str,
    rank: int,
    device: Device,
    tokens: int,
    model_flops: int,
    balance: Mapping[str, float],
    notes: Sequence[str],
    assumptions: Sequence[str],
    is_fused: bool = False,
) -> Plan:
    """A plan from what was traced and what is known of the leaves. `is_fused`: elementwise work as a compiler runs
    it."""
    mark = max(trace.peaks, key=lambda m: trace.peaks[m].total)
    peak = trace.peaks[mark]
    phases = {phase: 0 for phase, *_ in trace.peaks}
    for (phase, *_), stretch in trace.peaks.items():
        phases[phase] = max(phases[phase], stretch.total)
    collectives = _collectives(trace, mesh, device, rank)
    return Plan(
        title=title,
        layout=asdict(mesh.layout),
        rank=rank,
        device=device.name,
        peak_flops=device.flops,
        memory_bytes=device.memory_bytes,
        tokens=tokens,
        leaves=tuple(leaves),
        collectives=tuple(collectives),
        work=tuple(Work(phase=p, site=s, flops=n) for (p, s), n in sorted(trace.flops.items())),
        peak_bytes=peak.total,
        peak_at=f"{mark[0]} of block {mark[2]}, micro-batch {mark[1]}",
        peak_parts={name: peak.parts[name] for name in CATEGORIES if peak.parts.get(name)},
        phase_peaks=phases,
        host_bytes=trace.host_bytes,
        time=predict(
            trace.account,
            [transfer for c in collectives for transfer in c.transfers],
            device,
            is_fused=is_fused,
            stashed_bytes=trace.stashed_bytes,
            hosted_bytes=trace.hosted_bytes,
        ),
        model_flops=model_flops,
        balance=dict(balance),
        notes=tuple(notes),
        assumptions=tuple(assumptions),
    )


def _collectives(trace: Trace, mesh: Mesh, device: Device, rank: int) -> list[Collective]:
    """All calls, by kind."""
    return [
        Collective(
            phase=key.phase,
            site=key.site,
            axis=key.axis,
            op=key.op,
            count=count,
            sent_bytes=trace.sent_bytes[key],
            exposed=trace.exposed[key],
            wire_bytes=round(wire_bytes(key.op, trace.sent_bytes[key], mesh[key.axis].size)),
            size=mesh[key.axis].size,
            node_size=ranks_in_node(mesh.layout, key.axis, device, rank),
        )
        for key, count in sorted(trace.count.items(), key=lambda item: str(item[0]))
    ]


def plan_leaves(params: Tree, opt: Tree, specs: Tree, mesh: Mesh, gradient_itemsize: int | None = None) -> list[Leaf]:
    """Every leaf of this rank's state. `opt`: keyed by paths; `gradient_itemsize`: default that of the leaf."""
    sizes: dict[str, int] = {}
    paths = set(tree.paths(specs))
    for key, value in tree.items(opt):
        parts = key.split("/")
        path = next((p for i in range(len(parts)) if (p := "/".join(parts[i:])) in paths), "")
        sizes[path] = sizes.get(path, 0) + local(value).nbytes
    found = []
    for (path, leaf), spec in zip(tree.items(params), tree.leaves(specs), strict=True):
        own = local(leaf)
        found.append(
            Leaf(
                path=path,
                shape=spec.shape,
                dtype=str(own.dtype).removeprefix("torch."),
                placement=str(sharding_of(spec, mesh)) if mesh.layout.world > 1 else "whole",
                local_shape=tuple(own.shape),
                parameter_bytes=own.nbytes,
                gradient_bytes=0 if spec.is_frozen else own.numel() * (gradient_itemsize or own.element_size()),
                optimizer_bytes=sizes.get(path, 0),
            )
        )
    return found


def from_json(text: str, source: str = "the plan") -> Plan:
    """The plan of `Plan.to_json`. Raises ValueError for other text."""
    try:
        found: Plan = _typed(Plan, json.loads(text), "plan")
        Layout(**found.layout)
        return found
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{source} is no plan ({error}); write one with mmfn plan CONFIG --json FILE") from error


def read_plan(path: str) -> Plan:
    """A plan's file. Raises ValueError for a file that cannot be read or holds no plan."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"plan {path!r} cannot be read: {error}; give a file of mmfn plan --json") from error
    return from_json(text, repr(path))


def diff(a: Plan, b: Plan) -> str:
    """What differs between two plans, one figure per line: `name: value of a -> value of b`."""
    lines = []

    def compare(name: str, x: Any, y: Any, show: Any = str) -> None:
        if x != y:
            change = f"  ({(y - x) / x:+.1%})" if isinstance(x, int | float) and x else ""
            lines.append(f"{name}: {show(x)} -> {show(y)}{change}")

    compare("title", a.title, b.title)
    compare("layout", *(str(Layout(**p.layout)) for p in (a, b)))
    compare("device", a.device, b.device)
    compare("tokens per rank", a.tokens, b.tokens)
    compare("peak", a.peak_bytes, b.peak_bytes, size)
    for name in CATEGORIES:
        compare(f"  {name}", a.peak_parts.get(name, 0), b.peak_parts.get(name, 0), size)
    compare("host", a.host_bytes, b.host_bytes, size)
    compare("exposed calls", a.exposed, b.exposed, lambda n: f"{n:,}")
    compare("TFLOPs", a.flops, b.flops, lambda n: f"{n / 1e12:,.2f}")
    compare("model TFLOPs", a.model_flops, b.model_flops, lambda n: f"{n / 1e12:,.2f}")
    for name in (f.name for f in fields(Time) if f.name != "classes"):
        compare(f"time {name}", getattr(a.time, name), getattr(b.time, name), lambda x: f"{x:.4g}")
    for name in {**a.time.classes, **b.time.classes}:
        compare(f"  {name}", a.time.classes.get(name, 0.0), b.time.classes.get(name, 0.0), lambda x: f"{x:.4g}")
    calls = [{(c.phase, c.site, c.axis, c.op): c for c in p.collectives} for p in (a, b)]
    for key in sorted({**calls[0], **calls[1]}):
        found = [table.get(key) for table in calls]
        for name, what, show in (("calls", "count", str), ("sent", "sent_bytes", size)):
            x, y = (getattr(c, what) if c else 0 for c in found)
            compare(f"{' '.join(key)}, {name}", x, y, show)
    leaves = [{row[0]: row[1:] for row in _leaf_rows(p)} for p in (a, b)]
    for path in sorted({**leaves[0], **leaves[1]}):
        compare(path, *("; ".join(table.get(path, ("absent",))) for table in leaves))
    return "\n".join(lines) or "the plans are equal"


def size(num_bytes: float) -> str:
    """Bytes in the unit that fits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024 or unit == "GiB":
            return f"{num_bytes:,.0f} {unit}" if unit == "B" else f"{num_bytes:,.2f} {unit}"
        num_bytes /= 1024
    raise AssertionError


def _typed(kind: Any, value: Any, name: str) -> Any:
    """A value of JSON as a dataclass, tuple, dict or scalar of an annotation. Raises ValueError where it is none."""
    if is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        required = {field.name for field in fields(kind) if field.default is MISSING}
        for found, how in ((required - value.keys(), "lacks"), (value.keys() - hints.keys(), "has an unknown")):
            if found:
                raise UserError(f"{name} {how} {min(found)!r}")
        made: Any = kind
        return made(**{key: _typed(hints[key], item, key) for key, item in value.items()})
    origin, inner = get_origin(kind), get_args(kind)
    if origin is tuple and isinstance(value, list):
        return tuple(_typed(inner[0], item, name) for item in value)
    if origin is dict and isinstance(value, dict):
        return {key: _typed(inner[1], item, key) for key, item in value.items()}
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise UserError(f"{name} is {str(value)[:50]!r} but should be of type {getattr(kind, '__name__', kind)}")
    return value


def _lines(p: Plan) -> list[str]:
    t = p.time
    lines = [f"{p.title}: {Layout(**p.layout)} ({_world(p)} ranks), rank {p.rank}, {p.tokens:,} tokens per rank"]
    lines += [f"  {note}" for note in p.notes]
    lines += [f"  assumed: {text}" for text in p.assumptions]
    lines += ["", "parameters (grouped over layers)"]
    lines += _table(("path", "shape", "placement", "this rank", "parameter", "gradient", "optimizer"), _leaf_rows(p))
    totals = ", ".join(f"{name} {size(p.total(name))}" for name in ("parameter", "gradient", "optimizer"))
    lines += [f"  in all: {totals}", "", "collectives"]
    rows = [
        (
            c.phase,
            c.site,
            c.axis,
            c.op,
            f"{c.count:,}",
            f"{c.exposed:,}",
            size(c.sent_bytes),
            size(c.wire_bytes),
            _link(c),
        )
        for c in p.collectives
    ]
    lines += _table(("phase", "site", "axis", "operation", "calls", "exposed", "given", "on the wire", "link"), rows)
    if p.collectives:
        num_calls = sum(c.count for c in p.collectives)
        lines.append(
            f"  exposed: {p.exposed:,} of {num_calls:,} calls are waited for without work since they were sent"
        )
    lines += ["", f"peak of allocated bytes: {size(p.peak_bytes)} ({p.peak_at})"]
    lines += _table(("category", "bytes"), [(name, size(n)) for name, n in p.peak_parts.items()])
    lines += [f"  held on the host: {size(p.host_bytes)}"] * bool(p.host_bytes)
    lines += [
        f"  {p.device}: {size(p.memory_bytes)}, {'fits' if p.fits else 'DOES NOT FIT'}",
        "",
        "floating-point operations",
    ]
    lines += _table(("phase", "site", "TFLOP"), [(w.phase, w.site, f"{w.flops / 1e12:,.3f}") for w in p.work])
    lines += [f"  {name}: {formula}" for name, formula in FORMULAS.items()]
    lines += [
        "",
        f"predicted step on {p.device}: {t.total_s:.4g} s, MFU {p.mfu:.1%}, HFU {t.hfu:.1%}",
        f"  by class: {_classes(t)}",
        f"  compute {t.compute_s:.4g} s beside {t.overlapped_s:.4g} s of transfers, {t.exposed_s:.4g} s of other "
        f"transfers, update {t.update_s:.4g} s",
        "  MFU: model FLOPs over peak times time; HFU: all FLOPs of forward and backward, those computed again too",
        f"  {MODEL}",
        "balance: " + ", ".join(f"{name} {share:.1%}" for name, share in p.balance.items()),
    ]
    return lines


def _classes(time: Time) -> str:
    """What each class of forward and backward takes, the longest first."""
    ranked = sorted(time.classes.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {seconds:.3g} s" for name, seconds in ranked)


def _world(p: Plan) -> int:
    """The number of ranks."""
    return Layout(**p.layout).world


def _link(c: Collective) -> str:
    return "node" if c.is_inside_node else "network"


def _leaf_rows(p: Plan) -> list[tuple[str, ...]]:
    """Leaves that differ in a layer's number only, as one row."""
    groups: dict[tuple[Any, ...], list[Leaf]] = {}
    for leaf in p.leaves:
        pattern = re.sub(r"/\d+(?=/|$)", "/*", leaf.path)
        groups.setdefault((pattern, leaf.shape, leaf.placement, leaf.local_shape, leaf.dtype), []).append(leaf)
    rows = []
    for (pattern, shape, placement, own, dtype), members in groups.items():
        sums = [sum(getattr(m, f"{n}_bytes") for m in members) for n in ("parameter", "gradient", "optimizer")]
        name = pattern + (f" x{len(members)}" if len(members) > 1 else "")
        rows.append((name, f"{dtype}{list(shape)}", placement, str(list(own)), *map(size, sums)))
    return rows


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]
