"""One pass of a step: the numbers and gradients of its micro-batches, by the program of a run or by a changed one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfn import batch as packing
from mmfn import tree
from mmfn.batch import Batch
from mmfn.dtypes import at_least
from mmfn.lora import salts_of
from mmfn.parallel.mesh.layout import Mesh
from mmfn.parallel.mesh.step_sums import norm_and_sums
from mmfn.parallel.program import Program
from mmfn.parallel.weights.sharding import like, local, whole
from mmfn.train.build.run import Run
from mmfn.train.data import Agreed
from mmfn.train.gradients import gradients_of, scan_gradients
from mmfn.train.objective import weigh_by
from mmfn.train.optim import Leaves, global_norm
from mmfn.train.run.record import numbers_of
from mmfn.train.step import prepare
from mmfn.tree import Tree


def cast_params(params: Tree, specs: Tree, dtype: torch.dtype) -> Tree:
    """Whole parameters in a dtype, or in the wider one that they declare."""
    return tree.map(lambda leaf, spec: leaf.to(at_least(spec.dtype, dtype)), params, specs)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What a pass gave: its numbers, those of all ranks, and this rank's gradients by path."""

    numbers: Mapping[str, float]
    grads: Leaves


def weigh_share(run: Run, share: Agreed, dtype: torch.dtype | None = None) -> list[Batch]:
    """This rank's micro-batches of a step, on its device; with float64, their weights and inputs are too."""
    batches = [packing.to(b, run.place.device) for b in share.microbatches]
    if dtype == torch.float64:
        batches = [_wide(b) for b in batches]
    return weigh_by(batches, run.objective, share.labels_DAN, run.place.host["batch"].index)


@torch.no_grad()
def differentiate(run: Run, program: Program, params: Tree, microbatches: Sequence[Batch], step: Tensor) -> Pass:
    """The pass of a lowered program over weighed micro-batches in step `step` (counted from 0), as a step makes it."""
    mesh, model = run.place.mesh, run.model
    salts = salts_of(program.specs, run.loaded.config.train.seed)
    batches = prepare(microbatches, step, objective=run.objective, mesh=mesh, salts=salts)
    gradients = gradients_of(model.family, model.cfg, program, run.objective)
    with program.compiling():
        graph = program.jit(gradients) if program.compile == "step" else gradients
        grads, sums = scan_gradients(graph, params, batches, program.gradient_sums())
    norm, sums = norm_and_sums(global_norm(grads), sums, mesh)
    sums = {name: x for name, x in sums.items() if name != "tokens"}  # of a record those are others
    return Pass(numbers=numbers_of({**sums, "grad_norm": norm}), grads=grads)


def whole_grads(grads: Leaves, params: Tree, mesh: Mesh, *, is_kept: bool) -> Leaves:
    """Gradients by path, as `whole_copies`; none of a rank that does not keep them."""
    leaves = dict(tree.items(params))
    found: Leaves = whole_copies({path: like(g, leaves[path]) for path, g in grads.items()}, mesh, is_kept=is_kept)
    return found if is_kept else {}


def whole_copies(values: Tree, mesh: Mesh, *, is_kept: bool) -> Tree:
    """Copies of leaves, whole in the host's memory of the rank that keeps them, one after the other; None on others.
    All ranks call it."""
    flat, structure = tree.flatten(values)
    for i, leaf in enumerate(flat):
        full = whole(leaf, mesh)
        flat[i] = full.detach().to("cpu", copy=True) if is_kept else None
    return tree.unflatten(structure, flat) if is_kept else None


def not_finite(values: Tree) -> Iterator[tuple[str, int]]:
    """The floating-point leaves of a tree of tensors, by path, that hold numbers that are not finite, and how many; of
    shards, those of this rank."""
    for path, leaf in tree.items(values):
        if leaf.is_floating_point() and (count := int((~torch.isfinite(local(leaf))).sum())):
            yield path, count


def _wide(batch: Batch) -> Batch:
    def cast(path: str, x: Tensor) -> Tensor:
        is_weight = path.endswith(("weights_T", "aux_weight", "inputs_UF"))
        return x.double() if is_weight else x

    wide: Batch = tree.map_with_path(cast, batch)
    return wide
