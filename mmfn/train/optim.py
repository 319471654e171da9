"""Optimizers as `Transform(init, update)` pairs: `chain(clip_by_global_norm(1.0), adamw(weight_decay=0.1))`.

A chain makes one pass over memory: `clip_by_global_norm` only sets `Update.scale`, and the transform that writes
parameters (`adamw`) folds it in. Leaves are keyed by slash path throughout, so optimizer state needs no second
structure: `state["m"]["text/embed/weight"]`.

Donation: the tensors of `Update.params`, `Update.grads` and of the state given to an update function are consumed;
it may overwrite and return them. `mmfn.train.step.make_step` is the one place that decides whether a caller's
tensors are given away.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mmfn import tree
from mmfn.tree import Tree

Leaves = dict[str, Tensor]  # slash path -> tensor
Rules = Sequence[tuple[str, float]]  # (regex over paths, value); first full match wins


@dataclass(frozen=True, kw_only=True)
class Update:
    """One update on its way through a chain.

    `params`, `grads`: tensors by path; gradients have the dtype of their parameter or wider. `norm`: 0-D, the global
    gradient norm. `finite`: 0-D bool; where false, parameters and state stay as they are. `lr`: 0-D learning rate.
    `scale`: 0-D factor the gradients are still to be multiplied with (None: 1). `kernel`: how leaves are written, a
    name in `KERNELS`; the caller's choice, never found out here.
    """

    params: Leaves
    grads: Leaves
    norm: Tensor
    finite: Tensor
    lr: Tensor
    scale: Tensor | None = None
    kernel: str = "fused"


PIECE = 65_536  # values per partial sum of the gradient norm
KERNELS = ("fused", "traced", "reference")
"""Fused in-place kernels; the same as operators `torch.compile` can put into a graph; the written formulas."""

UpdateFn = Callable[[Update, Tree], tuple[Update, Tree]]  # (update, state) -> (update, state)


@dataclass(frozen=True, kw_only=True)
class Transform:
    """`init(params: Leaves) -> state`; `update(paths) -> UpdateFn`.

    `update` takes what is static first, the paths of the leaves, so that patterns are resolved (and misspelt ones
    refused) once, outside of any graph.
    """

    init: Callable[[Leaves], Tree]
    update: Callable[[Sequence[str]], UpdateFn]


def chain(*transforms: Transform) -> Transform:
    """Apply transforms left to right; the state is the list of their states. Raises ValueError when there are none."""
    if not transforms:
        raise ValueError("chain() received no transform; give at least one, such as adamw()")

    def update(paths: Sequence[str]) -> UpdateFn:
        fns = [t.update(paths) for t in transforms]

        def run(u: Update, state: Tree) -> tuple[Update, Tree]:
            new = []
            for fn, own in zip(fns, state, strict=True):
                u, own = fn(u, own)
                new.append(own)
            return u, new

        return run

    return Transform(init=lambda params: [t.init(params) for t in transforms], update=update)


def masked(transform: Transform, patterns: Sequence[str]) -> Transform:
    """Restrict `transform` to the leaves whose path fully matches one of the regexes; others pass untouched.

    Several masked transforms in a chain update different leaves by different rules. The global norm stays that of all
    leaves. Raises ValueError, at `init` and `update`, for a pattern that matches no path.
    """

    def init(params: Leaves) -> Tree:
        return transform.init({p: params[p] for p in _select(list(params), patterns)})

    def update(paths: Sequence[str]) -> UpdateFn:
        chosen = _select(paths, patterns)
        inner = transform.update(chosen)

        def run(u: Update, state: Tree) -> tuple[Update, Tree]:
            part = replace(u, params={p: u.params[p] for p in chosen}, grads={p: u.grads[p] for p in chosen})
            done, state = inner(part, state)
            return replace(u, params={**u.params, **done.params}), state

        return run

    return Transform(init=init, update=update)


def clip_by_global_norm(max_norm: float) -> Transform:
    """Scale all gradients by `min(1, max_norm / (norm + 1e-6))`, without touching them: the factor goes to `scale`.

    Raises ValueError when `max_norm` is not positive. Source: `torch.nn.utils.clip_grad_norm_` (torch 2.13).
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}; leave clip_by_global_norm out for no clipping")

    def run(u: Update, state: Tree) -> tuple[Update, Tree]:
        factor = (max_norm / (u.norm + 1e-6)).clamp(max=1.0)
        return replace(u, scale=factor if u.scale is None else u.scale * factor), state

    return Transform(init=lambda params: {}, update=lambda paths: run)


@dataclass(frozen=True, kw_only=True)
class _AdamW:
    """Hyperparameters that leaves of one group share."""

    betas: tuple[float, float]
    eps: float
    decay: float
    lr_scale: float


def adamw(
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    no_decay: Sequence[str] = (),
    lr_scales: Rules = (),
) -> Transform:
    """AdamW with decoupled weight decay: `p -= lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p)`.

    `no_decay`: regexes of paths without decay. `lr_scales`: (regex, factor) rules that multiply the learning rate.
    State: `count`, 0-D float32 number of applied updates, and the moments `m` and `v`, float32 (float64 for float64
    parameters) whatever the dtype of the parameters. Raises ValueError for values out of range here, and from `update`
    for a pattern that matches no path. Source: Loshchilov & Hutter 2019, algorithm 2; `torch.optim.AdamW` (torch 2.13).
    """
    _check_adamw(betas, eps, weight_decay)

    def init(params: Leaves) -> Tree:
        zeros = {p: torch.zeros(x.shape, dtype=wide(x.dtype), device=x.device) for p, x in params.items()}
        device = next((x.device for x in params.values()), None)
        return {
            "count": torch.zeros((), device=device),
            "m": zeros,
            "v": {p: torch.zeros_like(z) for p, z in zeros.items()},
        }

    def update(paths: Sequence[str]) -> UpdateFn:
        decays = _values(paths, [(pattern, 0.0) for pattern in no_decay], weight_decay)
        lr_scale = _values(paths, lr_scales, 1.0)
        groups: dict[_AdamW, list[str]] = {}
        for path in paths:
            hyper = _AdamW(betas=betas, eps=eps, decay=decays[path], lr_scale=lr_scale[path])
            groups.setdefault(hyper, []).append(path)

        def run(u: Update, state: Tree) -> tuple[Update, Tree]:
            state = {**state, "count": state["count"] + u.finite}
            for hyper, members in groups.items():
                _adamw_(u, state, members, hyper)
            return u, state

        return run

    return Transform(init=init, update=update)


def global_norm(grads: Leaves) -> Tensor:
    """0-D norm of all leaves together, float32 or wider, in one pass over the gradients.

    Large leaves are summed in pieces: torch adds up a whole float32 tensor in a handful of lanes on the CPU, which is
    off by 2e-4 at 8 million values and grows with the size.
    """
    is_double = any(g.dtype == torch.float64 for g in grads.values())
    dtype = torch.float64 if is_double else torch.float32
    norms: list[Tensor] = []
    rest: list[Tensor] = []
    for grad in grads.values():
        whole = grad.numel() // PIECE * PIECE
        if whole:
            flat = grad.reshape(-1)
            norms.append(torch.linalg.vector_norm(flat[:whole].view(-1, PIECE), dim=1, dtype=dtype))
            grad = flat[whole:]
        if grad.numel():
            rest.append(grad)
    if rest:
        norms.append(torch.stack(torch._foreach_norm(rest, 2, dtype=dtype)))
    norm: Tensor = torch.linalg.vector_norm(torch.cat(norms)) if norms else torch.zeros((), dtype=dtype)
    return norm


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to accumulate in: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def own(grads: Sequence[Tensor]) -> list[Tensor]:
    """`grads`, each dense in its own memory, copied where needed: kernels walk raw memory and overwrite it.

    Autograd may return one tensor for two leaves, an expanded one, or a transposed one.
    """
    seen: set[tuple[int, int]] = set()
    out = []
    for grad in grads:
        owned = grad.clone(memory_format=torch.contiguous_format) if _place(grad) in seen else grad.contiguous()
        seen.add(_place(owned))
        out.append(owned)
    return out


def _place(x: Tensor) -> tuple[int, int]:
    """Where a tensor's memory starts; unlike an address it is also known on the meta device."""
    return x.untyped_storage()._cdata, int(x.storage_offset())


def _adamw_(u: Update, state: Tree, paths: Sequence[str], hyper: _AdamW) -> None:
    """Update the leaves of one group by the kernel the caller asked for."""
    kernels: dict[str, Callable[..., None]] = {
        "fused": _adamw_fused_,
        "traced": _adamw_traced_,
        "reference": _adamw_reference_,
    }
    kernel_ = kernels[u.kernel]
    kernel_(
        [u.params[p] for p in paths],
        [u.grads[p] for p in paths],
        [state["m"][p] for p in paths],
        [state["v"][p] for p in paths],
        state["count"],
        u.lr * hyper.lr_scale,
        u.scale,
        u.finite,
        *hyper.betas,
        hyper.eps,
        hyper.decay,
    )


def _adamw_fused_(
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
        torch._foreach_mul_(grads, scale)
    elif scale is not None:
        inverse = scale.float().reciprocal()
    fused_ = partial(
        torch._fused_adamw_,
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
    for param, grad, *moments in zip(params, grads, m, v, strict=True):  # the kernel takes one dtype: widen by leaf
        widened = torch.empty_like(moments[0]).copy_(param)
        fused_([widened], [grad.to(widened.dtype)], *([x] for x in moments), [], [count])
        param.copy_(widened)


_adamw_traced_ = torch.library.custom_op(
    "mmfn::adamw_", _adamw_fused_, mutates_args=("params", "grads", "m", "v")
)  # one node per group: the written formula takes minutes to compile for a few hundred leaves and runs no faster


def _adamw_reference_(
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
    for param, grad, old_m, old_v in zip(params, grads, m, v, strict=True):
        dtype = old_m.dtype
        p, g = param.to(dtype), grad.to(dtype)
        if scale is not None:
            g = g * scale.to(dtype)
        new_m = beta1 * old_m + (1 - beta1) * g
        new_v = beta2 * old_v + (1 - beta2) * g * g
        m_hat, v_hat = new_m / _correction(beta1, count, dtype), new_v / _correction(beta2, count, dtype)
        new_p = p - lr.to(device=p.device, dtype=dtype) * (m_hat / (v_hat.sqrt() + eps) + decay * p)
        for old, new in ((param, new_p), (old_m, new_m), (old_v, new_v)):
            old.copy_(torch.where(finite, new, old))


def _correction(beta: float, count: Tensor, dtype: torch.dtype) -> Tensor:
    """`1 - beta**count`; by expm1, since in float32 the direct form loses four digits at the first steps."""
    if beta == 0.0:
        return torch.ones((), dtype=dtype, device=count.device)
    return -torch.expm1(count.to(dtype) * math.log(beta))


def _select(paths: Sequence[str], patterns: Sequence[str]) -> list[str]:
    chosen = _values(paths, [(pattern, 1.0) for pattern in patterns], 0.0)
    return [p for p in paths if chosen[p]]


def _values(paths: Sequence[str], rules: Rules, default: float) -> dict[str, float]:
    """`tree.mask` over paths: the value of each leaf; a rule that matches nothing raises ValueError."""
    values: dict[str, float] = tree.mask(dict.fromkeys(paths, 0), rules, default)
    return values


def _check_adamw(betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    if not all(0.0 <= b < 1.0 for b in betas):
        raise ValueError(f"betas must lie in [0, 1), got {betas}; the usual choice is (0.9, 0.999)")
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}; the usual choice is 1e-8")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}; use 0 for none")
