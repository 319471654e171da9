"""What dtypes numbers are computed in."""

import torch


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype for sums and whatever else must not be narrow: float32, or float64 where one of `dtypes` is."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
