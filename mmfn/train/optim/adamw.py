"""AdamW: torch's fused kernel with the clip folded in, and the written formula beside it."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mmfn import torch_private
from mmfn.dtypes import wide
from mmfn.errors import UserError
from mmfn.train.optim.rounding import round_
from mmfn.train.optim.transform import Facts, Leaves, Rate, Transform, Update, UpdateFn, own, zeros_like
from mmfn.tree import Tree

PIECE_VALUES = 2**19  # of a leaf that is widened for the kernel


@dataclass(frozen=True, kw_only=True)
class _Group:
    """What the leaves of one call of a kernel share."""

    decay: float
    rate: Rate


def adamw(
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    moments_dtype: torch.dtype | None = None,
) -> Transform:
    """AdamW with decoupled weight decay: `p -= lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p)`.

    State: `count`, 0-D float32 number of applied updates, and the moments `m` and `v`, float32 (float64 for float64
    parameters) whatever the dtype of the parameters, or else `moments_dtype`: bfloat16, in which they are rounded up or
    down at random (see `rounding.round_`), since to nearest `v` would stand still: a step of `1 - 0.999` is less than
    half a unit in its last place. Raises ValueError for values out of range. Source: Loshchilov & Hutter 2019,
    algorithm 2; `torch.optim.AdamW` (torch 2.13).
    """
    _check(betas, eps, weight_decay, moments_dtype)

    def moment(params: Leaves) -> Leaves:
        return {p: z if moments_dtype is None else z.to(moments_dtype) for p, z in zeros_like(params).items()}

    def init(params: Leaves) -> Tree:
        device = next((x.device for x in params.values()), None)
        return {"count": torch.zeros((), device=device), "m": moment(params), "v": moment(params)}

    def update(facts: Mapping[str, Facts]) -> UpdateFn:
        groups: dict[_Group, list[str]] = {}
        for path, known in facts.items():
            group = _Group(decay=weight_decay if known.is_decayed else 0.0, rate=known.rate)
            groups.setdefault(group, []).append(path)

        def run(u: Update, state: Tree) -> tuple[Update, Tree]:
            state = {**state, "count": state["count"] + u.finite}
            for group, leaves in groups.items():
                if members := [p for p in leaves if p in u.params]:
                    _apply_(u, state, members, group.rate.at(u), *betas, eps, group.decay)
            return u, state

        return run

    return Transform(init=init, update=update, stage="write")


def _apply_(u: Update, state: Tree, paths: Sequence[str], lr: Tensor, *numbers: float) -> None:
    """Update the leaves of one group by the kernel the caller asked for, by the formula where the device has none."""
    kernels: dict[str, Callable[..., None]] = {"fused": _fused_, "traced": _traced_, "reference": _reference_}
    has_none = u.kernel == "fused" and not torch_private.has_fused_adamw(u.params[paths[0]].device)
    kernels["reference" if has_none else u.kernel](
        [u.params[p] for p in paths],
        [u.grads[p] for p in paths],
        [state["m"][p] for p in paths],
        [state["v"][p] for p in paths],
        state["count"],
        lr,
        u.scale,
        u.finite,
        *numbers,
    )


def _fused_(
    params: list[Tensor],
    grads: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    count: Tensor,
    lr: Tensor,
    scale: Tensor | None,
    finite: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> None:
    """torch's fused kernel with the clip folded in: it divides by `grad_scale`, overwrites the gradients, and writes
    nothing where `found_inf` is 1."""
    for param, grad, moment in zip(params, grads, m, strict=True):
        assert param.shape == grad.shape == moment.shape, f"{param.shape}, {grad.shape}, {moment.shape}"
    grads, inverse = own(grads), None
    if scale is not None and scale.dtype == torch.float64:  # the kernel reads its scale as float32
        torch_private.foreach_mul_(grads, scale)
    elif scale is not None:
        inverse = scale.float().reciprocal()
    fused_ = partial(
        torch_private.fused_adamw_,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=inverse,
        found_inf=(~finite).float(),
    )
    if all(p.dtype == g.dtype == x.dtype and p.is_contiguous() for p, g, x in zip(params, grads, m, strict=True)):
        fused_(params, grads, m, v, [], [count] * len(params))
        return
    for leaf in zip(params, grads, m, v, strict=True):  # the kernel takes one dtype: widen what differs, by pieces
        for param, grad, *moments in _pieces(*leaf):
            p, *widened = (x.to(wide(param.dtype)).contiguous() for x in (param, *moments))
            fused_([p], [grad.to(p.dtype)], *([x] for x in widened), [], [count])
            if p is not param:
                param.copy_(p)
            for moment, new in zip(moments, widened, strict=True):
                if new is not moment:
                    round_(moment, new, count)


def _pieces(*leaf: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """A parameter and what belongs to it, in pieces: what is wide for a while is small, and stays in a CPU's cache."""
    if not all(x.is_contiguous() for x in leaf):
        return [leaf]
    values = PIECE_VALUES if leaf[0].device.type == "cpu" else 32 * PIECE_VALUES
    return zip(*(torch.split(x.view(-1), values) for x in leaf), strict=True)


_traced_ = torch.library.custom_op(
    "mmfn::adamw_", _fused_, mutates_args=("params", "grads", "m", "v")
)  # one node per group: the written formula takes minutes to compile for a few hundred leaves and runs no faster


def _reference_(
    params: list[Tensor],
    grads: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    count: Tensor,
    lr: Tensor,
    scale: Tensor | None,
    finite: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> None:
    """The written formula."""
    for param, grad, narrow_m, narrow_v in zip(params, grads, m, v, strict=True):
        dtype = wide(param.dtype)
        p, g, old_m, old_v = (x.to(dtype) for x in (param, grad, narrow_m, narrow_v))
        if scale is not None:
            g = g * scale.to(dtype)
        new_m = beta1 * old_m + (1 - beta1) * g
        new_v = beta2 * old_v + (1 - beta2) * g * g
        m_hat, v_hat = new_m / _correction(beta1, count, dtype), new_v / _correction(beta2, count, dtype)
        new_p = p - lr.to(device=p.device, dtype=dtype) * (m_hat / (v_hat.sqrt() + eps) + decay * p)
        param.copy_(torch.where(finite, new_p, p))
        round_(narrow_m, torch.where(finite, new_m, old_m), count)
        round_(narrow_v, torch.where(finite, new_v, old_v), count)


def _correction(beta: float, count: Tensor, dtype: torch.dtype) -> Tensor:
    """`1 - beta**count`; by expm1, since in float32 the direct form loses four digits at the first steps."""
    if beta == 0.0:
        return torch.ones((), dtype=dtype, device=count.device)
    return -torch.expm1(count.to(dtype) * math.log(beta))


def _check(betas: tuple[float, float], eps: float, weight_decay: float, moments_dtype: torch.dtype | None) -> None:
    if not all(0.0 <= b < 1.0 for b in betas):
        raise UserError(f"betas must lie in [0, 1), got {betas}; the usual choice is (0.9, 0.999)")
    if not eps > 0:
        raise UserError(f"eps must be positive, got {eps}; the usual choice is 1e-8")
    if not weight_decay >= 0:
        raise UserError(f"weight_decay must not be negative, got {weight_decay}; use 0 for none")
    if moments_dtype not in (None, torch.bfloat16):
        raise UserError(f"moments_dtype must be bfloat16 or None, for float32 or wider, got {moments_dtype}; use one")
