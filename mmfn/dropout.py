"""Dropout whose mask depends on what it masks, not on where that lies: any layout, packing or recomputation agrees.

Whether an element is kept is a hash of (salt, id of its row, column), worked out in integers that every device computes
alike. A salt is one mask of one step; an id says which token or input a row is, wherever it lies.

Legend: T rows, C input features, R output features, A masks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfn.ops.custom import Context, function
from mmfn.ops.eager import is_eager

LOW = 2**32 - 1  # the lower half of an int64
PART = 2**22  # elements whose hashes, 8 bytes each, are held at a time in eager execution: few launches, little memory
PART_CPU = 2**16  # the same on the CPU: what its cache holds, several times as fast


def mix(x: Tensor) -> Tensor:
    """A bijection of [0, 2**32) in which every bit of x flips every bit of the result half of the time.

    `x`: int64. Factors are below 2**31, so no product exceeds 63 bits. Source: C. Wellons, hash-prospector, the 32-bit
    function "16 21f0aaad 15 735a2d97 15".
    """
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & LOW
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & LOW
    return x ^ (x >> 15)


def salts(keys_A: Tensor, step: Tensor) -> Tensor:
    """int64[A], a salt in [0, 2**63) of each mask in one step. `keys_A`: int64[A], of a run; `step`: 0-D int64."""
    low_A = mix((keys_A & LOW) ^ mix(step & LOW))
    high_A = mix((keys_A >> 32) ^ low_A)
    return (high_A >> 1 << 32) | low_A


def keep_mask(ids_T: Tensor, salt: Tensor, num_columns: int, rate: float) -> Tensor:
    """bool[T, C], false with probability `rate`: what a row keeps. `ids_T`: int64[T]; `salt`: 0-D int64."""
    row_T = mix((ids_T & LOW) ^ (salt & LOW))
    row_T = mix(mix(row_T ^ ((ids_T >> 32) & LOW)) ^ (salt >> 32))
    column_C = mix(torch.arange(num_columns, device=ids_T.device))
    least = int(rate * 2**32)
    num_held = PART_CPU if row_T.device.type == "cpu" else PART
    num_rows = num_held // num_columns if is_eager(row_T) else row_T.numel()  # a compiler fuses all of it
    parts = [mix(part_T[:, None] ^ column_C) >= least for part_T in torch.split(row_T, max(1, num_rows))]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def masked_linear(x_TC: Tensor, weight_RC: Tensor, keep_TC: Tensor) -> Tensor:
    """`(x where it is kept, else 0) @ weight.T`: floating[T, R]. Only x, the weight and the mask are kept for backward.

    `x_TC` and `weight_RC`: one floating dtype; `keep_TC`: bool.
    """
    if is_eager(x_TC):
        y_TR: Tensor = _eager_masked_linear(x_TC, weight_RC, keep_TC)
        return y_TR
    return F.linear(torch.where(keep_TC, x_TC, 0.0), weight_RC)


def _masked_linear(ctx: Context, x_TC: Tensor, weight_RC: Tensor, keep_TC: Tensor) -> Tensor:
    ctx.save_for_backward(x_TC, weight_RC, keep_TC)
    return F.linear(torch.where(keep_TC, x_TC, 0.0), weight_RC)


def _masked_linear_grad(ctx: Context, dy_TR: Tensor) -> tuple[Tensor | None, ...]:
    """Masks x again: several layers that drop from one x keep it once."""
    x_TC, weight_RC, keep_TC = ctx.saved_tensors
    needs_dx, needs_dw, _ = ctx.needs_input_grad
    dx_TC = torch.where(keep_TC, dy_TR @ weight_RC, 0.0) if needs_dx else None
    dw_RC = dy_TR.T @ torch.where(keep_TC, x_TC, 0.0) if needs_dw else None
    return dx_TC, dw_RC, None


_eager_masked_linear = function(_masked_linear, _masked_linear_grad)
