"""`Judge`: what an op should have given, worked out again by another table of ops, in another dtype, on its inputs.

So no error is counted twice: each op is held against its own inputs, right or wrong as they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmfn import tree
from mmfn.ops import Ops
from mmfn.train.run.replay.compare import Error, measure
from mmfn.tree import Tree

PRODUCTS = 2**24
"""Products that the reference of a linear layer holds at a time; it holds one for every pair of inputs and outputs."""
SLACK = dict.fromkeys(
    ("gated_delta_rule", "gated_delta_piece", "gated_delta_piece_grad", "gated_delta_entry_grad"), 8.0
)
"""Ops whose method costs more digits than the formula: in chunks, decays are differences of sums over a chunk."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """The table that ops are held against, and the dtype it computes in.

    An op whose results are integers as well (a router's choice) is held against the table in its own dtype: which of
    two equal numbers is larger is not for another dtype to say.
    """

    ops: Ops
    dtype: torch.dtype

    def outputs(self, name: str, args: Tree, found: Sequence[Tensor]) -> list[Error | None]:
        """The error of each result of an op; of integers None where they are the same. `args`: [positional, named]."""
        with torch.no_grad():
            noisy = self._call(name, args)
            expected = noisy if self._is_choice(found) else self._call(name, _cast(args, self.dtype))
        slack = SLACK.get(name, 1.0)
        return [_error(*each, slack) for each in zip(found, expected, noisy, strict=True)]

    def gradients(
        self, name: str, args: Tree, places: Sequence[int], found: Sequence[Tensor], douts: Sequence[Tensor | None]
    ) -> list[Callable[[Tensor], Error]]:
        """For each of the inputs at `places` (of the leaves of `args`), what tells the error of a gradient of it.

        `found`: the results of the op, `douts` their gradients.
        """
        dtype = None if self._is_choice(found) else self.dtype
        noisy = self._gradients(name, args, places, douts)
        expected = noisy if dtype is None else self._gradients(name, _cast(args, dtype), places, douts)
        leaves, slack = tree.leaves(args), SLACK.get(name, 1.0)
        sent = sum(_norm(dout) * _norm(out) for dout, out in zip(douts, found, strict=True) if dout is not None)

        def judge(i: int) -> Callable[[Tensor], Error]:
            size = _norm(leaves[places[i]])
            scale = sent / size if size else 0.0

            def error(grad: Tensor) -> Error:
                floor = torch.finfo(grad.dtype).eps * scale
                return measure(grad, expected[i], noisy[i], floor=floor, slack=slack)

            return error

        return [judge(i) for i in range(len(places))]

    def _gradients(self, name: str, args: Tree, places: Sequence[int], douts: Sequence[Tensor | None]) -> list[Tensor]:
        leaves, structure = tree.flatten(args)
        with torch.enable_grad():
            for i in places:
                leaves[i] = leaves[i].detach().requires_grad_()
            outs = self._call(name, tree.unflatten(structure, leaves))
            pairs = [
                (out, dout) for out, dout in zip(outs, douts, strict=True) if dout is not None and out.requires_grad
            ]
            grads = torch.autograd.grad(
                [out for out, _ in pairs],
                [leaves[i] for i in places],
                [dout.to(out.dtype) for out, dout in pairs],
                allow_unused=True,
                materialize_grads=True,
            )
        return list(grads)

    def _call(self, name: str, args: Tree) -> list[Tensor]:
        positional, named = args
        op = getattr(self.ops, name)
        return results(_linear(op, *positional) if name == "linear" else op(*positional, **named))

    def _is_choice(self, found: Sequence[Tensor]) -> bool:
        return not all(out.is_floating_point() for out in found)


def results(out: Any) -> list[Tensor]:
    """The results of an op as a list."""
    return list(out) if isinstance(out, tuple) else [out]


def _error(found: Tensor, expected: Tensor, noisy: Tensor, slack: float) -> Error | None:
    if found.is_floating_point():
        return measure(found, expected, noisy, slack=slack)
    is_same = torch.equal(found, expected)
    return None if is_same else measure(found.double(), expected, expected)


def _cast(args: Tree, dtype: torch.dtype) -> Tree:
    """Floating-point tensors in another dtype."""

    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return tree.map(cast, args)


def _linear(op: Callable[..., Tensor], x_D: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """A linear layer by so many rows at a time as `PRODUCTS` allows, in the backward as well."""
    rows = max(1, PRODUCTS // max(1, weight_FD.numel()))
    parts = [
        checkpoint(op, part, weight_FD, bias_F, use_reentrant=False, preserve_rng_state=False)
        for part in torch.split(x_D.reshape(-1, x_D.shape[-1]), rows)
    ]
    return torch.cat(parts).view(*x_D.shape[:-1], weight_FD.shape[0])


def _norm(x: Tensor | None) -> float:
    return 0.0 if x is None or not x.is_floating_point() else float(x.detach().double().norm())
