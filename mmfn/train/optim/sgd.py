"""Stochastic gradient descent with momentum: torch's fused kernel, and the written formula beside it."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from mmfn import torch_private
from mmfn.dtypes import wide
from mmfn.errors import UserError
from mmfn.train.optim.transform import Facts, Leaves, Rate, Transform, Update, UpdateFn, own, zeros_like
from mmfn.tree import Tree


def sgd(*, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0) -> Transform:
    """`b = momentum * b + g; p -= lr * ((g + momentum * b if nesterov else b) + weight_decay * p)`.

    Weight decay is decoupled, as in the other optimizers, so that it means the same for all and does not enter the
    momentum; `torch.optim.SGD` adds it to the gradient. State: `momentum`, float32 or wider, and nothing when it is 0.
    Raises ValueError for values out of range. Source: Sutskever et al. 2013; `torch.optim.SGD` (torch 2.13).
    """
    if not 0 <= momentum < 1:
        raise UserError(f"momentum must lie in [0, 1), got {momentum}; the usual choice is 0.9")
    if nesterov and momentum == 0:
        raise UserError("nesterov needs momentum, got 0; the usual choice is 0.9")
    if not weight_decay >= 0:
        raise UserError(f"weight_decay must not be negative, got {weight_decay}; use 0 for none")

    def init(params: Leaves) -> Tree:
        return {"momentum": zeros_like(params)} if momentum else {}

    def update(facts: Mapping[str, Facts]) -> UpdateFn:
        groups: dict[tuple[Rate, float], list[str]] = {}
        for path, known in facts.items():
            groups.setdefault((known.rate, weight_decay if known.is_decayed else 0.0), []).append(path)

        def run(u: Update, state: Tree) -> tuple[Update, Tree]:
            kernels: dict[str, Callable[..., None]] = {"fused": _fused_, "traced": _traced_, "reference": _reference_}
            for (rate, decay), leaves in groups.items():
                if not (members := [p for p in leaves if p in u.params]):
                    continue
                params, grads = [u.params[p] for p in members], [u.grads[p] for p in members]
                buffers = [state["momentum"][p] for p in members] if momentum else []
                kernels[u.kernel](params, grads, buffers, rate.at(u), u.scale, u.finite, momentum, nesterov, decay)
            return u, state

        return run

    return Transform(init=init, update=update, stage="write")


def _fused_(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    lr: Tensor,
    scale: Tensor | None,
    finite: Tensor,
    momentum: float,
    nesterov: bool,
    decay: float,
) -> None:
    """torch's fused kernel, which writes nothing where `found_inf` is 1, behind the decay, then a factor of 1."""
    grads = own(grads)
    factor = None if scale is None else scale.to(grads[0].device)
    fused_ = partial(
        torch_private.fused_sgd_,
        weight_decay=0.0,
        momentum=momentum,
        lr=lr,
        dampening=0.0,
        nesterov=nesterov,
        maximize=False,
        is_first_step=False,
        found_inf=(~finite).float(),
    )
    kept = torch.where(finite, 1 - lr.to(finite.device) * decay, 1.0)
    if all(p.dtype == g.dtype == wide(p.dtype) and p.is_contiguous() for p, g in zip(params, grads, strict=True)):
        if factor is not None:
            torch_private.foreach_mul_(grads, factor)
        torch_private.foreach_mul_(params, kept)
        fused_(params, grads, buffers)
        return
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):  # the kernel takes one dtype: widen by leaf
        dtype = wide(param.dtype)
        widened, g = param.to(dtype).contiguous() * kept.to(dtype), grad.to(dtype)
        fused_([widened], [g if factor is None else g * factor.to(dtype)], buffers[i : i + 1])
        param.copy_(widened)


_traced_ = torch.library.custom_op("mmfn::sgd_", _fused_, mutates_args=("params", "grads", "buffers"))


def _reference_(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    lr: Tensor,
    scale: Tensor | None,
    finite: Tensor,
    momentum: float,
    nesterov: bool,
    decay: float,
) -> None:
    """The written formula."""
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        dtype = wide(param.dtype)
        p, g = param.to(dtype), grad.to(dtype)
        direction = g = g if scale is None else g * scale.to(dtype)
        if buffers:
            b = momentum * buffers[i] + g
            direction = g + momentum * b if nesterov else b
            buffers[i].copy_(torch.where(finite, b, buffers[i]))
        new_p = p - lr.to(device=p.device, dtype=dtype) * (direction + decay * p)
        param.copy_(torch.where(finite, new_p, p))
