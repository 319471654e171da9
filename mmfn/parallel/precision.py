"""`precision`: the dtypes of computation and of gradient sums, beside the dtype parameters are kept in."""

import re
from collections.abc import Mapping
from dataclasses import replace

import torch

from mmfn import tree
from mmfn.parallel.program import Program, Transform, noted

SENSITIVE = r"(.*/)?((router|\w*norm)/.*|A_log)"
"""Paths of routers, norms and `A_log`: few values, read by all tokens, of which a rounding moves discrete choices (the
experts of a token), whole rows, or an exponent."""


def precision(
    *,
    compute: torch.dtype | None = None,
    reduce: torch.dtype | None = None,
    rules: Mapping[str, torch.dtype] | None = None,
) -> Transform:
    """Compute in `compute` (default: the leaves' own dtype) and sum gradients over ranks in `reduce` (default: that).

    Parameters stay in their dtype, the master copy: `gather` casts shards before they travel, and the gradient's sum to
    the leaf's dtype. Placements do not change. `rules`: regexes over paths and the dtype those leaves are computed in
    instead, the first match wins; default: with a `compute` narrower than float32 what is `SENSITIVE` stays float32. A
    norm's or linear layer's result has the dtype of its input, whatever that of its parameters; a router's
    probabilities keep float32. Experts, embedding and head have no cast of their own: leave them at `compute`.
    Leaves of another dtype travel in a bucket of their own. `Program.enter` hands them to `gather`.

    Raises ValueError for a dtype that is not floating-point and, when applied, for a rule that matches no path.
    """
    chosen = {"compute": compute, "reduce": reduce, **{f"rules[{name!r}]": d for name, d in (rules or {}).items()}}
    for name, dtype in chosen.items():
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"precision got {name}={dtype} but it must be floating-point, such as torch.bfloat16")
    is_narrow = compute is not None and compute.itemsize < torch.float32.itemsize

    def transform(program: Program) -> Program:
        wanted = list((rules or {}).items())
        if rules is None and is_narrow and any(re.fullmatch(SENSITIVE, path) for path in tree.paths(program.specs)):
            wanted = [(SENSITIVE, torch.float32)]
        note = f"precision: compute {compute or 'as stored'}, gradient sums {reduce or 'as computed'}"
        note += "".join(f", {dtype} for {pattern}" for pattern, dtype in wanted)
        if not wanted:
            return noted(replace(program, compute_dtype=compute, reduce_dtype=reduce), note)
        dtypes = tree.mask(program.specs, wanted, default=False)
        specs = tree.map(lambda spec, dtype: replace(spec, compute=dtype or None), program.specs, dtypes)
        return noted(replace(program, specs=specs, compute_dtype=compute, reduce_dtype=reduce), note)

    return transform
