"""`Watch`: stands around the ops of a program and says which was the first that went wrong, where, and how.

Every op is called as it would be, with nodes of autograd around it that hand on what they are given: numbers stay the
same, bit for bit. What is looked at is kept by nobody: memory is that of the program, and of one op at a time.

Where an op stands is said by the block it is called in and the parameters it is given; both are known by the paths of
the parameters themselves, which are followed from the whole tree through `Program.enter` and `ops.gather`.
"""

import os.path
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfn import tree
from mmfn.ops import Ops, kernels
from mmfn.ops.kernel import Kernel
from mmfn.parallel.program import Program
from mmfn.parallel.weights.gather import BlockWeights
from mmfn.parallel.weights.prefetch import on_gradient
from mmfn.parallel.weights.recompute import Recomputed
from mmfn.torch_private import autograd_node
from mmfn.train.run.replay.compare import Error
from mmfn.train.run.replay.judge import Judge, results
from mmfn.tree import Tree

SHOWN = 5  # findings that are kept
LOGARITHMS = {"attention_block": 1}  # results that are logarithms of sums, -inf where there is nothing to sum


@dataclass(frozen=True, kw_only=True)
class Site:
    """A call of an op: the `block` it is in ("" outside of blocks), which of its calls there, with which parameters."""

    block: str
    op: str
    call: int
    params: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " / ".join(part for part in (self.block, self.op, ", ".join(self._own())) if part)

    def _own(self) -> list[str]:
        if not self.params:
            return [f"call {self.call}"]
        return [path.removeprefix(f"{self.block}/") for path in self.params]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A tensor of a call that is wrong, the first of it: `error` is None where it is not finite.

    `tensor`: "output", "input 1", "gradient of input 0"; `at`: where the first number that is not finite stands.
    """

    site: Site
    pass_: str
    tensor: str
    dtype: str
    shape: tuple[int, ...]
    at: tuple[int, ...]
    error: Error | None = None

    def __str__(self) -> str:
        what = f"{self.site}, {self.pass_}, {self.tensor} {self.dtype}{list(self.shape)}"
        if self.error is None:
            return f"{what} is not finite at {list(self.at)}"
        e = self.error
        return (
            f"{what}: largest error {e.largest:.2g} at {list(self.at)} ({e.ulp:.3g} ulp; {e.relative:.2g} of the norm) "
            f"where {self.dtype} explains {e.explained:.2g}"
        )


class Watch:
    """What a rank watches in one or more passes. `judge`: what ops are held against; None: only whether all is finite.

    `findings`: the first few, in the order they happened. `worst`: of the errors that the dtype explains the one that
    comes closest to what passes; `num_calls`: of ops that were looked at.
    """

    def __init__(self, judge: Judge | None = None) -> None:
        self.judge = judge
        self.findings: list[Finding] = []
        self.worst: Finding | None = None
        self.num_calls = 0
        self._block = ""
        self._calls: Counter[str] = Counter()
        self._paths: dict[int, tuple[weakref.ref[Any], str]] = {}

    def table(self, ops: Ops) -> Ops:
        """The table with its ops watched: the one that transforms are applied to."""
        around: dict[str, Any] = {name: self._wrap(name, op) for name, op in kernels(ops).items()}
        return replace(ops, **around)

    def program(self, program: Program) -> Program:
        """A lowered program whose blocks and parameters are known by their paths."""
        ops = program.ops
        gather, head = partial(self._gather, ops.gather), partial(self._gather, ops.gather_head)
        ops = replace(ops, gather=gather, gather_head=head, stack=partial(self._stack, ops.stack))
        return replace(program, ops=ops, enter=partial(self._enter, program.enter, tree.paths(program.specs)))

    # ---- where a call is

    def _enter(self, inner: Callable[..., Tree], paths: Sequence[str], params: Tree, *given: Any) -> Tree:
        entered = inner(params, *given)
        for path, leaf in zip(paths, tree.leaves(entered), strict=True):
            self._remember(leaf, path)
        return entered

    def _gather(self, inner: Callable[[Any], Tree], params: Any) -> Tree:
        out = inner(params)
        for source, leaf in zip(_sources(params), tree.leaves(out), strict=True):
            if (path := self._path(source)) is not None:
                self._remember(leaf, path)
        return out

    def _stack(self, inner: Any, run: Any, block: Any, layers: Any, x: Tensor, *xs: Any, **kwargs: Any) -> Any:
        def run_block(block: Any, params: Any, x: Tensor, *xs: Any) -> Any:
            paths = [path for source in _sources(params) if (path := self._path(source)) is not None]
            label = os.path.commonpath(paths) if len(paths) > 1 else ""
            if isinstance(block, Recomputed):
                labelled: Any = replace(block, block=partial(self._in_block, label, block.block))
            else:
                labelled = partial(self._in_block, label, block)
            x, out = run(labelled, params, on_gradient(x, partial(self._pass, "")), *xs)
            return on_gradient(x, partial(self._pass, label)), out

        return inner(run_block, block, layers, x, *xs, **kwargs)

    def _in_block(self, label: str, block: Any, *args: Any) -> Any:
        with self._label(label):
            return block(*args)

    def _pass(self, label: str) -> None:
        """The backward comes to a block, or to what lies before it."""
        self._block, self._calls = label, Counter()

    @contextmanager
    def _label(self, label: str) -> Iterator[None]:
        around = self._block, self._calls
        self._block, self._calls = label, Counter()
        try:
            yield
        finally:
            self._block, self._calls = around

    def _remember(self, leaf: Any, path: str) -> None:
        self._paths[id(leaf)] = weakref.ref(leaf), path

    def _path(self, leaf: Any) -> str | None:
        reference, path = self._paths.get(id(leaf), (None, None))
        return path if reference is not None and reference() is leaf else None

    # ---- a call

    def _wrap(self, name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        fn = partial(self._call, name, op)
        return replace(op, fn=fn) if isinstance(op, Kernel) else fn

    def _call(self, name: str, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        leaves, structure = tree.flatten([list(args), kwargs])
        params = tuple(path for leaf in leaves if (path := self._path(leaf)) is not None)
        self._calls[name] += 1
        call = _Call(watch=self, site=Site(block=self._block, op=name, call=self._calls[name], params=params))
        is_backward = autograd_node() is not None
        is_first = not is_backward or not torch.is_grad_enabled()  # and not in a block that is computed again
        call.pass_ = "backward" if is_backward else "forward"
        if is_first:
            self.num_calls += 1
            call.look(call.pass_, "input", leaves)
        inside = list(leaves)
        if torch.is_grad_enabled():
            for i, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    inside[i] = _Into.apply(call, i, leaf)  # type: ignore[no-untyped-call]
        positional, named = tree.unflatten(structure, inside)
        out = op(*positional, **named)
        outs = results(out)
        if is_first:
            call.look(call.pass_, "output", outs)
            if self.judge is not None:
                call.hold_outputs([list(args), kwargs], outs)
        if any(one.requires_grad for one in outs):
            call.structure = structure
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            call.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            call.is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
            call.inputs = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
            handed = _OutOf.apply(call, len(tensors), *tensors, *outs)  # type: ignore[no-untyped-call]
            outs = list(handed)
        return tuple(outs) if isinstance(out, tuple) else outs[0]

    def add(self, finding: Finding) -> None:
        """Keep a finding, where it is one of the first."""
        if len(self.findings) < SHOWN:
            self.findings.append(finding)


class _Call:
    """One call on its way: what its backward needs to know of it, and what is expected of its gradients."""

    pass_: str
    structure: Any
    inputs: list[int]
    others: list[Any]
    is_tensor: list[bool]

    def __init__(self, *, watch: Watch, site: Site) -> None:
        self.watch, self.site = watch, site
        self.expected: dict[int, Callable[[Tensor], Error]] = {}

    def look(self, pass_: str, what: str, tensors: Sequence[Any]) -> None:
        """Note the first tensor that is not finite."""
        for i, x in enumerate(tensors):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                continue
            is_fine = torch.isfinite(x.detach())  # detached, for else it would be kept for a backward
            if what == "output" and LOGARITHMS.get(self.site.op) == i:
                is_fine |= torch.isneginf(x.detach())
            if not bool(is_fine.all()):
                at = tuple((~is_fine).nonzero()[0].tolist())
                self.note(pass_, what if len(tensors) == 1 else f"{what} {i}", x, at, None)
                return

    def hold_outputs(self, args: Tree, outs: Sequence[Tensor]) -> None:
        """Compare results with those expected."""
        judge = self.watch.judge
        assert judge is not None
        outs = [out.detach() for out in outs]
        for i, (out, error) in enumerate(zip(outs, judge.outputs(self.site.op, args, outs), strict=True)):
            if error is not None:
                self.note(self.pass_, "output" if len(outs) == 1 else f"output {i}", out, error.at, error)

    def leave(self, tensors: Sequence[Tensor], outs: Sequence[Tensor], douts: Sequence[Tensor | None]) -> None:
        """What the gradients of the results are: the backward of the op comes next."""
        self.look("backward", "gradient of output", douts)
        judge = self.watch.judge
        if judge is None or not self.inputs:
            return
        rest = iter(tensors)
        leaves = [next(rest) if yes else other for yes, other in zip(self.is_tensor, self.others, strict=True)]
        args = tree.unflatten(self.structure, leaves)
        judges = judge.gradients(self.site.op, args, self.inputs, outs, douts)
        self.expected = dict(zip(self.inputs, judges, strict=True))

    def enter(self, i: int, grad: Tensor) -> None:
        """The gradient that the backward of the op gave for its input i."""
        if not bool(torch.isfinite(grad).all()):
            at = tuple((~torch.isfinite(grad)).nonzero()[0].tolist())
            self.note("backward", f"gradient of input {i}", grad, at, None)
        elif i in self.expected:
            error = self.expected.pop(i)(grad)
            self.note("backward", f"gradient of input {i}", grad, error.at, error)

    def note(self, pass_: str, tensor: str, x: Tensor, at: tuple[int, ...], error: Error | None) -> None:
        """Keep what is wrong, and the worst of what is not."""
        finding = Finding(
            site=self.site,
            pass_=pass_,
            tensor=tensor,
            dtype=str(x.dtype).removeprefix("torch."),
            shape=tuple(x.shape),
            at=at,
            error=error,
        )
        if error is None or not error.ratio <= 1:
            self.watch.add(finding)
        elif self.watch.worst is None or error.ratio > self.watch.worst.error.ratio:  # type: ignore[union-attr]
            self.watch.worst = finding


class _Into(torch.autograd.Function):
    """Before an input of a call: the identity, whose backward sees the gradient that this call alone gave."""

    @staticmethod
    def forward(ctx: Any, call: _Call, i: int, x: Tensor) -> Tensor:
        ctx.call, ctx.i = call, i
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ctx.call.enter(ctx.i, grad)
        return None, None, grad


class _OutOf(torch.autograd.Function):
    """Behind the results of a call: the identity, whose backward sees their gradients, with the inputs at hand."""

    @staticmethod
    def forward(ctx: Any, call: _Call, num_inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call, ctx.num_inputs = call, num_inputs
        outs = tuple(x.view_as(x) for x in tensors[num_inputs:])
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*(x for x in outs if not x.is_floating_point()))
        return outs

    @staticmethod
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        ctx.call.leave(saved[: ctx.num_inputs], saved[ctx.num_inputs :], douts)
        return None, None, *[None] * ctx.num_inputs, *douts


def _sources(params: Any) -> list[Any]:
    """The leaves of a block as a program is given them, under way or not."""
    members = params if isinstance(params, list) else [params]
    return [x for one in members for x in (one.weights if isinstance(one, BlockWeights) else tree.leaves(one))]
