"""Learning-rate schedules: pure functions of a 0-D step tensor, traceable, without state.

The step is the number of completed steps (0 at the first). It lives on the host like everything computed from it
alone, so rates are float64 and reading one never waits for a device.
"""

import math
from collections.abc import Callable
from difflib import get_close_matches

import torch
from torch import Tensor

from mmfn.errors import UserError

Schedule = Callable[[Tensor], Tensor]  # step, 0-D integer -> learning rate, 0-D float64


def constant(progress: Tensor) -> Tensor:
    """1 throughout; `final_scale` has no influence."""
    return torch.ones_like(progress)


def linear(progress: Tensor) -> Tensor:
    """From 1 down to 0 in a straight line. Source: `get_linear_schedule_with_warmup` (transformers 5.23)."""
    return 1 - progress


def cosine(progress: Tensor) -> Tensor:
    """From 1 down to 0 along half a cosine. Source: Loshchilov & Hutter 2017, equation 5, without restarts."""
    return 0.5 * (1 + torch.cos(math.pi * progress))


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {"constant": constant, "linear": linear, "cosine": cosine}


def schedule(kind: str, *, peak: float, num_steps: int, warmup_steps: int = 0, final_scale: float = 0.0) -> Schedule:
    """`rate(step)`: linear from 0 to `peak` over `warmup_steps`, then a shape of `SHAPES` over what remains.

    `peak * (final_scale + (1 - final_scale) * shape(progress))`, progress running from 0 to 1 at `num_steps` and
    staying there. The last step is number `num_steps - 1` and runs one step's decay above `peak * final_scale`, as in
    transformers: of 10 steps of a cosine to 0.1 it has 0.122 of the peak. Raises ValueError for an unknown kind (naming
    the nearest) and for values out of range.

    >>> schedule("cosine", peak=1e-4, num_steps=1000, warmup_steps=100)(torch.tensor(50)).item()
    5e-05
    """
    if kind not in SHAPES:
        near = get_close_matches(kind, SHAPES, n=1, cutoff=0.0)
        raise UserError(f"schedule {kind!r} is unknown; nearest is {near[0]!r}, known: {', '.join(SHAPES)}")
    _check(peak, num_steps, warmup_steps, final_scale)
    shape = SHAPES[kind]

    def rate(step: Tensor) -> Tensor:
        now = step.to(torch.float64)
        progress = ((now - warmup_steps) / (num_steps - warmup_steps)).clamp(0.0, 1.0)
        decayed = final_scale + (1 - final_scale) * shape(progress)
        return peak * torch.where(now < warmup_steps, now / max(1, warmup_steps), decayed)

    return rate


def _check(peak: float, num_steps: int, warmup_steps: int, final_scale: float) -> None:
    if not (math.isfinite(peak) and peak >= 0):
        raise UserError(f"peak learning rate must be finite and not negative, got {peak}; use for example 1e-5")
    if not 0 <= warmup_steps < num_steps:
        raise UserError(
            f"warmup_steps must be at least 0 and below num_steps, got {warmup_steps} of {num_steps}; shorten it"
        )
    if not 0 <= final_scale <= 1:
        raise UserError(
            f"final_scale must lie in [0, 1], got {final_scale}; it is the share of the peak that the rate decays to"
        )
