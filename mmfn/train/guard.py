"""`Guard`: which steps are skipped, decided on the device and counted in the state.

A skipped step changes neither parameters nor the optimizer's state. The counters and the window are tensors of the
training state, so no step waits for them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmfn.errors import UserError
from mmfn.tree import Tree


@dataclass(frozen=True, kw_only=True)
class Guard:
    """A step is skipped when its loss or gradient norm is not finite, and, with a `window`, when it is a spike.

    A spike: the gradient norm exceeds `factor` times the median of the last `window` steps that were taken. The norm,
    since it is what moves the parameters, where a loss also differs with the data of a step; the median, since a mean
    is drawn along by the first spike that gets through. While less than half the window is filled nothing is a spike,
    nor is anything above a median of 0, which no norm is a multiple of.
    Raises ValueError for values out of range.
    """

    window: int = 0
    factor: float = 10.0

    def __post_init__(self) -> None:
        if self.window < 0:
            raise UserError(f"window of a guard must not be negative, got {self.window}; 0 looks for no spikes")
        if not self.factor > 1:
            raise UserError(f"factor of a guard must be above 1, got {self.factor}; the usual choice is 10")

    def init(self, device: torch.device | None) -> Tree:
        """`skipped` and `in_a_row`, 0-D int64 counts of steps; with a window `norms`, float32[window], at first inf."""
        counters = {name: torch.zeros((), dtype=torch.int64, device=device) for name in ("skipped", "in_a_row")}
        if self.window == 0:
            return counters
        return {**counters, "norms": torch.full((self.window,), torch.inf, device=device)}

    def judge(self, state: Tree, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tree]:
        """`(is_taken, state)`: 0-D bool, and the state behind the step. `loss` and `norm`: 0-D, of the whole mesh.

        Raises ValueError for a state that another guard has made.
        """
        if len(state.get("norms", ())) != self.window:
            raise UserError(
                f"the guard looks for spikes in {self.window} steps but its state holds {len(state.get('norms', ()))}; "
                "give init_state the guard that make_step gets"
            )
        is_taken = torch.isfinite(norm) & torch.isfinite(loss)
        window: Tree = {}
        if (norms := state.get("norms")) is not None:
            median = norms.sort().values[(len(norms) - 1) // 2]
            is_taken = is_taken & ((norm <= self.factor * median) | (median == 0))
            window = {"norms": torch.where(is_taken, torch.cat([norms[1:], norm.to(norms.dtype)[None]]), norms)}
        is_skipped = (~is_taken).to(torch.int64)
        counters = {"skipped": state["skipped"] + is_skipped, "in_a_row": (state["in_a_row"] + 1) * is_skipped}
        return is_taken, counters | window


PLAIN = Guard()
"""Skips what is not finite, and nothing else."""
