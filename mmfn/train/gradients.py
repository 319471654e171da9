"""Gradients of the leaves that are trained, of one micro-batch and summed over several."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmfn import tree
from mmfn.batch import Batch
from mmfn.dtypes import wide
from mmfn.grad import value_and_grad
from mmfn.models import Family
from mmfn.parallel.program import Program
from mmfn.parallel.weights.gradient_sums import GradientSums
from mmfn.parallel.weights.hosted import handles
from mmfn.parallel.weights.sharding import local
from mmfn.spec import trained_paths
from mmfn.train.objective import Objective, loss_fn
from mmfn.train.optim import Leaves
from mmfn.tree import Tree

Metrics = dict[str, Tensor]
Gradients = Callable[[Tree, Batch, GradientSums | None], tuple[Leaves, Metrics]]
"""(params, weighed micro-batch, sums) -> (gradients by path, but for those that are in the sums; this rank's shares of
metrics)."""


def gradients_of(family: Family, cfg: Any, program: Program, objective: Objective) -> Gradients:
    """The gradients of a lowered program's trained leaves: autograd knows of no others.

    So nothing is kept for what lies before them. Of a leaf on a mesh: this rank's shard.
    """
    paths = trained_paths(program.specs)
    places = [i for i, leaf in enumerate(tree.leaves(program.specs)) if not leaf.is_frozen]

    def loss(
        trained: Sequence[Tensor], params: Tree, values: Tree, batch: Batch, sums: GradientSums | None
    ) -> tuple[Tensor, Metrics]:
        leaves, structure = tree.flatten(params)
        for i, leaf in zip(places, trained, strict=True):
            leaves[i] = leaf
        given = program.enter(tree.unflatten(structure, leaves), values, sums)
        return loss_fn(given, batch, family, cfg, program.ops, objective)

    differentiate = value_and_grad(loss, has_aux=True, materialize=False)

    def gradients(params: Tree, batch: Batch, sums: GradientSums | None = None) -> tuple[Leaves, Metrics]:
        stands = handles(params, batch.tokens_T.device) if program.weights.is_hosted else params
        leaves = tree.leaves(stands)
        trained = [leaves[i] for i in places]
        (_, metrics), grads = differentiate(trained, stands, params, batch, sums)
        found = {}
        for path, leaf, grad in zip(paths, trained, grads, strict=True):
            if grad is not None:
                found[path] = local(grad)
            elif sums is None or path not in sums:
                found[path] = torch.zeros_like(local(leaf), memory_format=torch.contiguous_format)
        return found, metrics

    return gradients


def scan_gradients(
    gradients: Gradients, params: Tree, microbatches: Sequence[Batch], sums: GradientSums | None = None
) -> tuple[Leaves, Metrics]:
    """Sum `gradients(params, batch, sums)` over micro-batches, in float32 or wider if there are several, with those
    that `sums` have in the end.

    The running sum is built leaf by leaf, freeing each gradient behind it; out of place, since autograd may return one
    tensor for two leaves.
    """
    several = len(microbatches) > 1
    total: Leaves = {}
    shares: Metrics = {}
    for i, batch in enumerate(microbatches):
        if sums is not None:
            sums.is_last = i + 1 == len(microbatches)
        grads, metrics = gradients(params, batch, sums)
        for path in list(grads):
            grad = grads.pop(path)
            grad = grad.to(wide(grad.dtype)) if several else grad
            total[path] = total[path] + grad if path in total else grad
        shares = {name: shares[name] + value for name, value in metrics.items()} if shares else metrics
    if sums is not None:
        for path, grad in sums.take(is_wide=several).items():
            total[path] = total[path] + grad if path in total else grad
        total = {path: total[path] for path in tree.paths(params) if path in total}
    return total, shares
