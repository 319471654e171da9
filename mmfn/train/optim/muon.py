"""Muon: momentum, orthogonalised by Newton-Schulz iterations, for the matrices of a model.

A matrix is a leaf [rows, columns] or, of stacked experts, one of [experts, rows, columns]; of a fused projection
(`ParamSpec.parts`) each part is a matrix. Sharded matrices are orthogonalised whole, each by one rank
(`mmfn.parallel.weights.matrix_owners`). Embeddings, the head, norms and biases are not for Muon: `with_others`.

Legend: N matrices, R rows, C columns.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor

from mmfn import tree
from mmfn.dtypes import wide
from mmfn.errors import UserError
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.weights.matrix_owners import on_owners
from mmfn.spec import ParamSpec, has_experts
from mmfn.train.optim.transform import Facts, Transform, Update, UpdateFn, chain, masked, zeros_like
from mmfn.tree import Tree

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, chosen for its slope at zero
EPS = 1e-7  # least norm a matrix is divided by
TABLES = {"vocab", "positions"}  # axes whose rows are looked up or compared one by one: no matrix that maps vectors


def muon(
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.1,
    num_iterations: int = 5,
    adjust_lr: str = "original",
    compute: torch.dtype = torch.bfloat16,
) -> Transform:
    """`b = momentum * b + (1 - momentum) * g; p -= lr * (adjusted * orthogonalize(direction) + weight_decay * p)`.

    The direction is b or, with `nesterov`, `momentum * b + (1 - momentum) * g`. `adjust_lr`: "original" multiplies by
    `sqrt(max(1, R / C))`, "match_rms_adamw" by `0.2 * sqrt(max(R, C))`, which makes an update as large as AdamW's, so
    that its learning rate and decay serve both. `compute`: dtype of the iterations, and of what ranks exchange.
    State: `momentum`, float32 or wider. Raises ValueError for values out of range and, from `update`, for a leaf that
    is no matrix. Source: Jordan et al. 2024; Liu et al. 2025 (arXiv:2502.16982), equation 4; `torch.optim.Muon`.
    """
    if not 0 <= momentum < 1:
        raise UserError(f"momentum must lie in [0, 1), got {momentum}; the usual choice is 0.95")
    if not weight_decay >= 0:
        raise UserError(f"weight_decay must not be negative, got {weight_decay}; use 0 for none")
    if num_iterations < 1:
        raise UserError(f"num_iterations must be at least 1, got {num_iterations}; the usual choice is 5")
    if adjust_lr not in FACTORS:
        raise UserError(f"adjust_lr {adjust_lr!r} is unknown; use one of {', '.join(FACTORS)}")

    def update(facts: Mapping[str, Facts]) -> UpdateFn:
        for path, known in facts.items():
            if len(known.shape) not in (2, 3):
                raise UserError(f"muon got {path} of shape {known.shape} but takes matrices only; use with_others")
        chunks = _chunks(facts)

        def run(u: Update, state: Tree) -> tuple[Update, Tree]:
            point_, orthogonal, descend_ = _TRACED if u.kernel == "traced" else _PLAIN
            for chunk in chunks:
                if not (members := [p for p in chunk if p in u.params]):
                    continue
                known = facts[members[0]]
                grads, buffers = ([of[p] for p in members] for of in (u.grads, state["momentum"]))
                points = [torch.empty_like(buffer, dtype=compute) for buffer in buffers]
                point_(points, grads, buffers, u.scale, u.finite, momentum, nesterov)
                steps = _on_whole(partial(orthogonal, parts=known.parts, num_iterations=num_iterations), points, known)
                factor = FACTORS[adjust_lr](known.shape[-2] // known.parts, known.shape[-1])
                for path, step in zip(members, steps, strict=True):
                    decay = weight_decay if facts[path].is_decayed else 0.0
                    descend_(u.params[path], step, facts[path].rate.at(u), u.finite, factor, decay)
            return u, state

        return run

    return Transform(init=lambda params: {"momentum": zeros_like(params)}, update=update, stage="write")


FACTORS: dict[str, Callable[[int, int], float]] = {
    "original": lambda num_rows, num_columns: sqrt(max(1.0, num_rows / num_columns)),
    "match_rms_adamw": lambda num_rows, num_columns: 0.2 * sqrt(max(num_rows, num_columns)),
}


def with_others(matrices: Transform, others: Transform, specs: Tree) -> Transform:
    """`matrices` (Muon) for the matrices among the leaves that are trained, `others` (AdamW) for the rest.

    A matrix has two dims of at least two values, behind a dim of experts if there is one, and is no table: neither an
    embedding nor the head. The choice is made by patterns with the numbers of layers left open, so it holds for any
    depth of the model.
    """
    patterns: dict[bool, dict[str, None]] = {True: {}, False: {}}
    for path, spec in tree.items(specs):
        if not spec.is_frozen:
            patterns[is_matrix(spec)][re.sub(r"/\d+(?=/)", r"/\\d+", re.escape(path))] = None
    both = [(matrices, patterns[True]), (others, patterns[False])]
    return chain(*(masked(transform, list(found)) for transform, found in both if found))


def is_matrix(spec: ParamSpec) -> bool:
    """Whether a leaf is for Muon (see `with_others`)."""
    num_dims = len(spec.shape) - has_experts(spec)
    return num_dims == 2 and min(spec.shape[-2:]) > 1 and not TABLES & set(spec.axes)


def orthogonalize(x_NRC: Tensor, parts: int, num_iterations: int) -> Tensor:
    """The nearest orthogonal matrix of each (of each of its `parts`, stacked along R), roughly: singular values between
    0.7 and 1.2. In the dtype of x.

    Source: `torch.optim.Muon` (torch 2.13), whose iterations these are.
    """
    N, R, C = x_NRC.shape
    a, b, c = COEFFICIENTS
    x = x_NRC.reshape(N * parts, R // parts, C)
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).reshape(N, R, C).contiguous()


def _point_(
    points: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    scale: Tensor | None,
    finite: Tensor,
    momentum: float,
    nesterov: bool,
) -> None:
    """Update the momentum and write the directions to `points`: a graph takes no operator that writes and returns."""
    for point, grad, buffer in zip(points, grads, buffers, strict=True):
        g = grad.to(buffer.dtype)
        if scale is not None:
            g = g * scale.to(g.dtype)
        new = momentum * buffer + (1 - momentum) * g
        point.copy_(momentum * new + (1 - momentum) * g if nesterov else new)
        buffer.copy_(torch.where(finite, new, buffer))


def _descend_(param: Tensor, step: Tensor, lr: Tensor, finite: Tensor, factor: float, decay: float) -> None:
    """Write a parameter. `lr` may stay on the host: torch hands a 0-D tensor to a kernel by value, without waiting."""
    p = param.to(wide(param.dtype))
    param.copy_(torch.where(finite, p - lr * (factor * step.to(p.dtype) + decay * p), p))


_point_traced_ = torch.library.custom_op("mmfn::muon_point_", _point_, mutates_args=("points", "buffers"))
_orthogonalize_traced = torch.library.custom_op("mmfn::orthogonalize", orthogonalize, mutates_args=())
_descend_traced_ = torch.library.custom_op("mmfn::muon_descend_", _descend_, mutates_args=("param",))


@_orthogonalize_traced.register_fake
def _(x_NRC: Tensor, parts: int, num_iterations: int) -> Tensor:
    return x_NRC.new_empty(x_NRC.shape)


_PLAIN = (_point_, orthogonalize, _descend_)
_TRACED = (_point_traced_, _orthogonalize_traced, _descend_traced_)  # few nodes in a graph, as for AdamW


def _chunks(facts: Mapping[str, Facts]) -> list[list[str]]:
    """Leaves that are treated together: alike, and as many as give every rank a matrix."""
    alike: dict[Any, list[str]] = {}
    for path, known in facts.items():
        places = tuple((dim, axis.name) for dim, axis in known.cuts)
        alike.setdefault((known.shape, known.parts, places), []).append(path)
    chunks = []
    for members in alike.values():
        known = facts[members[0]]
        each = prod(-(-known.shape[dim] // _axis(known, dim).size) for dim in range(len(known.shape) - 2))
        size = max(1, _axis(known, len(known.shape) - 2).size * known.copies.size // each)
        chunks += [members[i : i + size] for i in range(0, len(members), size)]
    return chunks


def _on_whole(fn: Callable[[Tensor], Tensor], shards: list[Tensor], known: Facts) -> list[Tensor]:
    """`fn` of whole matrices of which this rank holds shards; the shards of the results."""
    stacks = [x.reshape(prod(x.shape[:-2]), *x.shape[-2:]) for x in shards]
    rows = _axis(known, len(known.shape) - 2)
    out_NRC = on_owners(fn, torch.cat(stacks), known.shape[-2], rows, known.copies, "muon")
    parts = torch.split(out_NRC, [x.shape[0] for x in stacks])
    return [part.reshape(x.shape) for part, x in zip(parts, shards, strict=True)]


def _axis(known: Facts, dim: int) -> Axis:
    """The axis that cuts a dim, one of a single rank where none does."""
    return dict(known.cuts).get(dim, Axis(name="whole"))
