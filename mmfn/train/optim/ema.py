"""Exponential moving average of parameters, as a transform."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmfn import tree
from mmfn.dtypes import wide
from mmfn.errors import UserError
from mmfn.parallel.weights.sharding import like, local
from mmfn.train.optim.transform import Facts, Leaves, Transform, Update, UpdateFn
from mmfn.tree import Tree


def ema(decay: float) -> Transform:
    """Keep `decay * ema + (1 - decay) * parameter`; placed behind what updates the parameters, inside of `master`.

    State: `{"ema": averages by path}`, float32 or wider, at first the parameters. Nothing is averaged in a step that is
    skipped. Raises ValueError when `decay` is outside of [0, 1).
    """
    if not 0 <= decay < 1:
        raise UserError(f"decay of the average must lie in [0, 1), got {decay}; the usual choice is 0.999")

    def init(params: Leaves) -> Tree:
        return {"ema": {p: x.to(wide(x.dtype), copy=True) for p, x in params.items()}}

    def update(facts: Mapping[str, Facts]) -> UpdateFn:
        def run(u: Update, state: Tree) -> tuple[Update, Tree]:
            average_ = _average_traced_ if u.kernel == "traced" else _average_
            paths = [p for p in facts if p in u.params]
            average_([state["ema"][p] for p in paths], [u.params[p] for p in paths], u.finite, decay)
            return u, state

        return run

    return Transform(init=init, update=update, stage="read")


def ema_params(state: Mapping[str, Any]) -> Tree:
    """The averaged parameters of a training state, in the dtypes and placements of its parameters.

    Leaves that are not trained are the parameters themselves. Raises ValueError for a state without averages.
    """
    found = _find(state["opt"])
    if found is None:
        raise UserError("the optimizer's state has no averages of parameters; train with optimizer.ema_decay")

    def average(path: str, leaf: Tensor) -> Tensor:
        if path not in found:
            return leaf
        on_device = local(found[path]).to(local(leaf).device)  # first: copies to the host may be under way (`on_host`)
        return like(on_device.to(leaf.dtype), leaf)

    return tree.map_with_path(average, state["params"])


def _find(opt: Tree) -> dict[str, Tensor] | None:
    """The averages in an optimizer's state, at any depth."""
    if isinstance(opt, Mapping) and "ema" in opt:
        return dict(opt["ema"])
    inner = opt.values() if isinstance(opt, Mapping) else opt if isinstance(opt, list) else ()
    return next((found for part in inner if (found := _find(part)) is not None), None)


def _average_(averages: list[Tensor], params: list[Tensor], finite: Tensor, decay: float) -> None:
    for average, param in zip(averages, params, strict=True):
        weight = (1 - decay) * finite.to(average.dtype)  # 0 behind a skipped step, which left the parameters finite
        average.lerp_(param.to(average.dtype), weight)


_average_traced_ = torch.library.custom_op("mmfn::ema_", _average_, mutates_args=("averages",))
