"""`precision`: the dtypes of computation and of gradient sums, beside the dtype parameters are kept in."""

from dataclasses import replace

import torch

from mmfn.parallel.program import Program, Transform, noted


def precision(*, compute: torch.dtype | None = None, reduce: torch.dtype | None = None) -> Transform:
    """Compute in `compute` (default: the leaves' own dtype) and sum gradients over ranks in `reduce` (default: that).

    Parameters stay in their dtype, the master copy: `gather` casts shards before they travel, and the gradient's sum to
    the leaf's dtype. Placements do not change. Raises ValueError for a dtype that is not floating-point.
    """
    for name, dtype in (("compute", compute), ("reduce", reduce)):
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"precision got {name}={dtype} but it must be floating-point, such as torch.bfloat16")

    def transform(program: Program) -> Program:
        done = replace(program, compute_dtype=compute, reduce_dtype=reduce)
        return noted(done, f"precision: compute {compute or 'as stored'}, gradient sums {reduce or 'as computed'}")

    return transform
