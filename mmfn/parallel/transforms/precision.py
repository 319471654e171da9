"""`precision`: the dtypes of computation and of gradient sums, beside the dtype parameters are kept in."""

import re
from collections.abc import Mapping
from dataclasses import replace

import torch

from mmfn import tree
from mmfn.dtypes import at_least
from mmfn.errors import UserError
from mmfn.parallel.program import Program, Transform, noted
from mmfn.spec import EXPERTS, ParamSpec
from mmfn.tree import Tree

SENSITIVE = r"(.*/)?((router|\w*norm)/.*|dt_bias)"
"""Paths of routers, norms and biases of decay: few values, read by all tokens, of which a rounding moves discrete
choices (the experts of a token), whole rows, or a product over all tokens. What else a family computes in a dtype of
its own (an exponent) its specs declare."""
UNCAST = {"vocab", EXPERTS}
"""Axes of the embedding, whose dtype what flows through the text has, and of what takes that without a cast."""


def precision(
    *,
    compute: torch.dtype | None = None,
    reduce: torch.dtype | None = None,
    rules: Mapping[str, torch.dtype] | None = None,
) -> Transform:
    """Compute in `compute` (default: the leaves' own dtype), and sum gradients over ranks in `reduce`.

    `reduce` is float32 by default (float64 where a leaf is computed in that): a sum in bfloat16 rounds once for every
    rank, which is off by 0.4 % over 8 ranks and by 1 % over 64, where one rounding of the sum is off by 0.17 %. It
    takes twice the bytes of bfloat16 to send.

    Parameters stay in their dtype, the master copy: `gather` casts shards before they travel, and the gradient's sum to
    the leaf's dtype. Placements do not change. `rules`: regexes over paths and the dtype those leaves are computed in
    instead, the first match wins; default: with a `compute` narrower than float32 what is `SENSITIVE` stays float32. A
    leaf without a rule whose spec declares a wider dtype is computed in that. A norm's or linear layer's result has the
    dtype of its input, whatever that of its parameters and adapter; a router's probabilities keep float32. What the
    embedding gives is cast for a head of its own, but not for experts (their adapters included): these must be computed
    in one dtype. Leaves of another dtype than `compute` travel in a bucket of their own. `Program.enter` hands them to
    `gather`.

    Raises ValueError for a dtype that is not floating-point and, when applied, for a rule that matches no path and one
    that tells apart what must have one dtype.
    """
    chosen = {"compute": compute, "reduce": reduce, **{f"rules[{name!r}]": d for name, d in (rules or {}).items()}}
    for name, dtype in chosen.items():
        if dtype is not None and not dtype.is_floating_point:
            raise UserError(f"precision got {name}={dtype} but it must be floating-point, such as torch.bfloat16")
    is_narrow = compute is not None and compute.itemsize < torch.float32.itemsize

    def transform(program: Program) -> Program:
        wanted = list((rules or {}).items())
        if rules is None and is_narrow and any(re.fullmatch(SENSITIVE, path) for path in tree.paths(program.specs)):
            wanted = [(SENSITIVE, torch.float32)]
        note = f"precision: compute {compute or 'as stored'}, gradient sums {reduce or 'in float32 or wider'}"
        note += "".join(f", {dtype} for {pattern}" for pattern, dtype in wanted)
        program = replace(program, weights=replace(program.weights, compute=compute, reduce=reduce))
        dtypes = tree.mask(program.specs, wanted, default=False)

        def computed(leaf: ParamSpec, dtype: torch.dtype | None) -> ParamSpec:
            declared = None if leaf.dtype is None or compute is None else at_least(leaf.dtype, compute)
            return replace(leaf, compute=dtype or leaf.compute or declared)

        specs = tree.map(computed, program.specs, dtypes)
        _check_uncast(specs, wanted, compute)
        return noted(replace(program, specs=specs), note)

    return transform


def _check_uncast(specs: Tree, rules: list[tuple[str, torch.dtype]], compute: torch.dtype | None) -> None:
    """Raise ValueError for a rule with which not all leaves of `UNCAST` axes, but for the head, have one dtype."""
    leaves = {p: leaf for p, leaf in tree.items(specs) if UNCAST & set(leaf.axes) and not p.startswith("head/")}
    dtypes = {path: leaf.compute or compute or torch.float32 for path, leaf in leaves.items()}
    for pattern, dtype in rules:
        same = [path for path in dtypes if dtypes[path] == dtype and re.fullmatch(pattern, path)]
        others = [path for path in dtypes if dtypes[path] != dtype]
        if same and others:
            raise UserError(
                f"precision's rule {pattern!r} computes {same[0]!r} in {dtype} but {others[0]!r} is computed in "
                f"{dtypes[others[0]]} and nothing casts between embedding and experts; give all of them one dtype"
            )
