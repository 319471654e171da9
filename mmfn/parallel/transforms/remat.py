"""`remat`: what blocks compute is computed again in the backward instead of being kept."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from functools import partial
from itertools import count
from math import lcm
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy

from mmfn.errors import UserError
from mmfn.ops import Ops, kernels
from mmfn.ops.flops import packet
from mmfn.ops.kernel import Kernel, declaration
from mmfn.parallel.program import Program, Transform, noted
from mmfn.parallel.weights.recompute import Recomputed
from mmfn.spec import has_experts, stacks

REMAT_KINDS = ("none", "full", "selective", "uniform", "block")
ALL_TO_ALL = ("_c10d_functional::all_to_all_single", "mmfn::all_to_all")  # of these, only the calls on ep are meant
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
BESIDE_OPS = {"matmul": PRODUCTS, "exchange": (*ALL_TO_ALL, "mmfn::host_copy")}
"""What "selective" can keep besides ops of the table: torch's products of matrices, and the exchange of expert rows."""
PARTS = {"attention": ("attention", "attention_block")}  # the second is what the first becomes over several ranks


def remat(kind: str, *, save: Sequence[str] = (), every: int = 1, num_layers: int = 1, where: str = "all") -> Transform:
    """Compute blocks of the stacks again in the backward instead of keeping what they compute.

    Kinds: "full", all blocks, each from its own input; "selective", the same but for the results of ops named in
    `save`; "uniform", groups of `num_layers` blocks, each from the input of its first (groups end where something
    happens between two blocks, as features that are added); "block", only the first `num_layers` blocks; "none".
    `save` names ops of the table that declare results (`mmfn.ops.kernel`), such as "attention" and "experts"; "matmul"
    is every product of two matrices; "exchange" is what arrives by the all-to-alls of ep, and the host's read of how
    many rows: so none of them is repeated. "experts" beside it spares the products whose results are sent back (an
    operator that exchanges rows and multiplies them is kept for either).
    `every`: of so many blocks only the first is computed again ("full" and "selective"). `where`: the stack it is for,
    by the path of its parameters; "all" for every one. Transforms for different stacks go side by side.

    Placements do not change. A block gathers its weights in its first line, so they are gathered again as well and
    never kept (`data_parallel(keep_gathered=True)` keeps them); the gradient is reduced once, as without.
    Raises ValueError for an unknown kind, op or stack, for settings the kind does not use, for an op that declares no
    results or nothing at all, and for "exchange" where nothing is exchanged.
    """
    _check(kind, save, every, num_layers)

    def transform(program: Program) -> Program:
        if kind == "none":
            return program
        if where != "all" and where not in (names := stacks(program.specs or {})):
            has = ", ".join(names) or "none"
            raise UserError(f"remat got where={where!r} but the model has stacks {has}; use one, or 'all'")
        inner, policy = program.ops.stack, _policy_of(save, program, where) if save else None

        def stack(run: Any, block: Any, layers: Sequence[Any], *xs: Any, name: str = "", **kwargs: Any) -> Any:
            if where not in ("all", name):
                return inner(run, block, layers, *xs, name=name, **kwargs)
            if kind == "uniform":
                return _in_groups(inner, num_layers, run, block, layers, *xs, name=name, **kwargs)
            again, index = Recomputed(block, policy), count()

            def run_some(block: Any, *args: Any) -> tuple[Tensor, Any]:
                i = next(index)
                is_chosen = i < num_layers if kind == "block" else i % every == 0
                out: tuple[Tensor, Any] = run(again if is_chosen else block, *args)
                return out

            return inner(run_some, block, layers, *xs, name=name, **kwargs)

        selective = program.is_selective or policy is not None
        done = replace(program, ops=replace(program.ops, stack=stack), is_selective=selective)
        if where in ("all", "text"):
            special = num_layers if kind == "block" else 0
            period = lcm(program.period, every, num_layers if kind == "uniform" else 1)
            done = replace(done, period=period, num_special=max(program.num_special, special))
        settings = {"save": list(save), "every": every, "num_layers": num_layers, "where": where}
        used = "".join(f", {name}={value!r}" for name, value in settings.items() if value not in ([], 1, "all"))
        return noted(done, f"remat({kind!r}{used})")

    return transform


def _in_groups(
    inner: Any,
    size: int,
    run: Any,
    block: Any,
    layers: Sequence[Any],
    x: Tensor,
    *xs: Any,
    each: Sequence[Any] = (),
    between: Mapping[int, Any] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, list[Any], dict[int, Any]]:
    """A stack whose blocks are groups of up to `size` blocks: their parameters are a list. Groups end at `between`."""
    spans, between = _spans(len(layers), size, between or {}), between or {}

    def group(params: Sequence[Any], x: Tensor, *xs: Any) -> tuple[Tensor, list[Any]]:
        xs, owns = (xs[:-1], [(own,) for own in xs[-1]]) if each else (xs, [()] * len(params))
        outs = []
        for own_params, own in zip(params, owns, strict=True):
            x, out = block(own_params, x, *xs, *own)
            outs.append(out)
        return x, outs

    last = {i: end - 1 for i, (_, end) in enumerate(spans)}
    x, outs, taps = inner(
        run,
        Recomputed(group),
        [layers[start:end] for start, end in spans],
        x,
        *xs,
        each=[each[start:end] for start, end in spans] if each else (),
        between={i: between[block_index] for i, block_index in last.items() if block_index in between},
        **kwargs,
    )
    return x, [out for group_outs in outs for out in group_outs], {last[i]: tap for i, tap in taps.items()}


def _spans(num_layers: int, size: int, ends: Container[int]) -> list[tuple[int, int]]:
    """First and last (exclusive) block of each group."""
    spans, start = [], 0
    for i in range(num_layers):
        if i in ends or i + 1 - start == size or i + 1 == num_layers:
            spans.append((start, i + 1))
            start = i + 1
    return spans


def _policy_of(save: Sequence[str], program: Program, where: str) -> Callable[..., CheckpointPolicy]:
    """What is kept of a stack. Raises ValueError for what cannot be kept, as `remat` says."""
    names, ep = [operator for name in save for operator in _results(name, program.ops)], program.mesh["ep"]
    if "exchange" in save:
        if ep.transport is None:
            raise UserError("remat got save 'exchange' but ep is 1, so that no rows are exchanged; leave it out")
        if where != "all" and not has_experts(program.specs[where]):
            raise UserError(f"remat got save 'exchange' but the stack {where!r} has no experts; leave it out")
    exchange = ep.transport.name if ep.transport is not None else ""
    return partial(_policy, _overloads(names), _overloads(ALL_TO_ALL), exchange)


def _results(name: str, ops: Ops) -> tuple[str, ...]:
    """The operators whose results are kept for a name in `save`."""
    if name in BESIDE_OPS:
        entry = {"matmul": "linear", "exchange": "experts_over_ranks"}[name]  # of a table with operators of its own
        return (*BESIDE_OPS[name], *declaration(entry, getattr(ops, entry)).results)
    declared = [declaration(part, getattr(ops, part)).results for part in PARTS.get(name, (name,))]
    if not any(declared):
        can = [n for n, op in kernels(ops).items() if isinstance(op, Kernel) and op.results]
        raise UserError(
            f"remat cannot save {name!r}: the table's op declares no results (Kernel.results); it can save "
            f"{', '.join((*can, *BESIDE_OPS))}"
        )
    return tuple(operator for results in declared for operator in results)


def _policy(
    kept: frozenset[Any], all_to_all: frozenset[Any], exchange: str, ctx: Any, op: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    """`kept`: operators; of those in `all_to_all` only the calls whose transport is named `exchange`."""
    is_kept = op in kept and (op not in all_to_all or args[3] == exchange)
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def _overloads(operators: Sequence[str]) -> frozenset[Any]:
    """The default overloads of those this torch has."""
    packets = [packet(name) for name in operators]
    return frozenset(packet.default for packet in packets if packet is not None)


def _check(kind: str, save: Sequence[str], every: int, num_layers: int) -> None:
    if kind not in REMAT_KINDS:
        raise UserError(f"remat kind {kind!r} is unknown; use one of {', '.join(REMAT_KINDS)}")
    names = [f.name for f in fields(Ops)]
    if unknown := [name for name in save if name not in (*names, *BESIDE_OPS)]:
        near = get_close_matches(unknown[0], (*names, *BESIDE_OPS), n=1, cutoff=0.0)[0]
        raise UserError(f"remat cannot save {unknown[0]!r}, which is no op of the table; nearest is {near!r}")
    if (kind == "selective") != bool(save):
        raise UserError(f"remat kind {kind!r} got save={list(save)}; name what to save, and only for 'selective'")
    for name, value, kinds in (
        ("every", every, ("full", "selective")),
        ("num_layers", num_layers, ("uniform", "block")),
    ):
        if value < 1 or (kind not in kinds and value > 1):
            raise UserError(
                f"remat kind {kind!r} got {name}={value}; it must be at least 1, and is for {' or '.join(kinds)} only"
            )
