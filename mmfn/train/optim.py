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
    `scale`: 0-D factor the gradients are still to be multiplied with (None: 1). `fused`: use the fused in-place
    kernels; otherwise plain formulas, which `torch.compile` traces and fuses.
    """

    params: Leaves
    grads: Leaves
    norm: Tensor
    finite: Tensor
    lr: Tensor
    scale: Tensor | None = None
    fused: bool = True


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
            kernel = _adamw_fused_ if u.fused else _adamw_plain_
            for hyper, members in groups.items():
                kernel(u, state, members, hyper)
            return u, state

        return run

    return Transform(init=init, update=update)


def global_norm(grads: Leaves) -> Tensor:
    """0-D norm of all leaves together, accumulated in float32 or wider, in one pass over the gradients."""
    if not grads:
        return torch.zeros(())
    leaves = list(grads.values())
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in leaves) else torch.float32
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(leaves, 2, dtype=dtype)))
    return norm


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to accumulate in: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _adamw_fused_(u: Update, state: Tree, paths: Sequence[str], hyper: _AdamW) -> None:
    """torch's fused kernel with the clip folded in: it divides by `grad_scale`, overwrites the gradients, and writes
    nothing where `found_inf` is 1."""
    params = [u.params[p] for p in paths]
    m, v = [state["m"][p] for p in paths], [state["v"][p] for p in paths]
    grads = _own(m, [u.grads[p] for p in paths])
    inverse = None
    if u.scale is not None and u.scale.dtype == torch.float64:  # the kernel reads its scale as float32
        torch._foreach_mul_(grads, u.scale)
    elif u.scale is not None:
        inverse = u.scale.float().reciprocal()

    def kernel_(params: list[Tensor], grads: list[Tensor], m: list[Tensor], v: list[Tensor]) -> None:
        torch._fused_adamw_(
            params,
            grads,
            m,
            v,
            [],
            [state["count"]] * len(params),
            lr=u.lr * hyper.lr_scale,
            beta1=hyper.betas[0],
            beta2=hyper.betas[1],
            weight_decay=hyper.decay,
            eps=hyper.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=inverse,
            found_inf=(~u.finite).float(),
        )

    if all(p.dtype == x.dtype and p.is_contiguous() for p, x in zip(params, m, strict=True)):
        return kernel_(params, grads, m, v)
    for param, *rest in zip(params, grads, m, v, strict=True):  # one dtype and layout only: widen leaf by leaf
        widened = torch.empty_like(rest[1]).copy_(param)
        kernel_([widened], *([x] for x in rest))
        param.copy_(widened)
    return None


def _adamw_plain_(u: Update, state: Tree, paths: Sequence[str], hyper: _AdamW) -> None:
    """The written formula; under `torch.compile` one pass, the copies being stores into the donated inputs."""
    beta1, beta2 = hyper.betas
    for path in paths:
        param, m, v = u.params[path], state["m"][path], state["v"][path]
        p, g = param.to(m.dtype), u.grads[path].to(m.dtype)
        if u.scale is not None:
            g = g * u.scale.to(m.dtype)
        lr = (u.lr * hyper.lr_scale).to(device=param.device, dtype=m.dtype)
        new_m = m + (g - m) * (1 - beta1)
        new_v = v * beta2 + g * g * (1 - beta2)
        m_hat = new_m / _correction(beta1, state["count"], m.dtype)
        v_hat = new_v / _correction(beta2, state["count"], m.dtype)
        new_p = p - lr * hyper.decay * p - lr * m_hat / (v_hat.sqrt() + hyper.eps)
        param.copy_(torch.where(u.finite, new_p, p))
        m.copy_(torch.where(u.finite, new_m, m))
        v.copy_(torch.where(u.finite, new_v, v))


def _correction(beta: float, count: Tensor, dtype: torch.dtype) -> Tensor:
    """`1 - beta**count`; by expm1, since in float32 the direct form loses four digits at the first steps."""
    if beta == 0.0:
        return torch.ones((), dtype=dtype, device=count.device)
    return -torch.expm1(count.to(dtype) * math.log(beta))


def _own(like: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Gradients with the dtype and layout of `like`, no two sharing memory: the kernel walks raw memory and overwrites.

    Autograd may return one tensor for two leaves, an expanded one, or a transposed one.
    """
    seen: set[int] = set()
    out = []
    for x, g in zip(like, grads, strict=True):
        if g.dtype != x.dtype or g.stride() != x.stride() or g.data_ptr() in seen:
            g = torch.empty_like(x).copy_(g)
        seen.add(g.data_ptr())
        out.append(g)
    return out


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
