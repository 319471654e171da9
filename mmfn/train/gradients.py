"""Gradients of the leaves that are trained, of one micro-batch and summed over several."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from mmfn import tree
from mmfn.batch import Batch
from mmfn.dtypes import wide
from mmfn.grad import value_and_grad
from mmfn.models import Family
from mmfn.parallel.program import Program
from mmfn.parallel.weights.hosted import handles
from mmfn.parallel.weights.sharding import local
from mmfn.spec import trained_paths
from mmfn.train.objective import Objective, loss_fn
from mmfn.train.optim import Leaves
from mmfn.tree import Tree

Metrics = dict[str, Tensor]
Gradients = Callable[[Tree, Batch], tuple[Leaves, Metrics]]
"""(params, weighed micro-batch) -> (gradients by path, this rank's shares of metrics)."""


def gradients_of(family: Family, cfg: Any, program: Program, objective: Objective) -> Gradients:
    """The gradients of a lowered program's trained leaves: autograd knows of no others.

    So nothing is kept for what lies before them. Of a leaf on a mesh: this rank's shard.
    """
    paths = trained_paths(program.specs)
    places = [i for i, leaf in enumerate(tree.leaves(program.specs)) if not leaf.is_frozen]

    def loss(trained: Sequence[Tensor], params: Tree, values: Tree, batch: Batch) -> tuple[Tensor, Metrics]:
        leaves, structure = tree.flatten(params)
        for i, leaf in zip(places, trained, strict=True):
            leaves[i] = leaf
        given = program.enter(tree.unflatten(structure, leaves), values)
        return loss_fn(given, batch, family, cfg, program.ops, objective)

    differentiate = value_and_grad(loss, has_aux=True)

    def gradients(params: Tree, batch: Batch) -> tuple[Leaves, Metrics]:
        stands = handles(params, batch.tokens_T.device) if program.weights.is_hosted else params
        leaves = tree.leaves(stands)
        (_, metrics), grads = differentiate([leaves[i] for i in places], stands, params, batch)
        return {path: local(grad) for path, grad in zip(paths, grads, strict=True)}, metrics

    return gradients


def scan_gradients(gradients: Gradients, params: Tree, microbatches: Sequence[Batch]) -> tuple[Leaves, Metrics]:
    """Sum `gradients(params, batch) -> (leaves, metrics)` over micro-batches, in float32 or wider if there are several.

    The running sum is built leaf by leaf, freeing each gradient behind it; out of place, since autograd may return one
    tensor for two leaves.
    """
    total, sums = gradients(params, microbatches[0])
    for batch in microbatches[1:]:
        more, metrics = gradients(params, batch)
        for path, grad in total.items():
            dtype = wide(grad.dtype)
            total[path] = grad.to(dtype) + more.pop(path).to(dtype)
        sums = {name: value + metrics[name] for name, value in sums.items()}
    return total, sums
