"""What dtypes numbers are computed in."""

import torch


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype for sums and whatever else must not be narrow: float32, or float64 where one of `dtypes` is."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def at_least(least: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or what it takes to hold both where a `least` one is declared: bfloat16 with float32 is float32.

    An integer stays what is declared.
    """
    if least is None or not least.is_floating_point:
        return least or dtype
    return torch.promote_types(least, dtype)
