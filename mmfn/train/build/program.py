"""From a config to a program: the mesh's sizes and the transforms that lay a model out over it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from mmfn.models import Family
from mmfn.ops import Ops
from mmfn.parallel.mesh.layout import Mesh
from mmfn.parallel.program import Program, pipe
from mmfn.parallel.program import Transform as ProgramTransform
from mmfn.parallel.transforms.compiled import compiled
from mmfn.parallel.transforms.context_parallel import context_parallel
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.expert_parallel import expert_parallel
from mmfn.parallel.transforms.offload import OFFLOAD_KINDS, offload
from mmfn.parallel.transforms.precision import precision
from mmfn.parallel.transforms.remat import remat
from mmfn.parallel.transforms.vocabulary_parallel import vocabulary_parallel
from mmfn.train.build.kernels import build_ops
from mmfn.train.build.model import model_specs, stacks_of, trained_note
from mmfn.train.config.layout import LayoutSection, RematStack
from mmfn.train.config.schema import Config
from mmfn.tree import Tree


def build_program(
    config: Config, family: Family, cfg: Any, mesh: Mesh, specs: Tree | None = None, ops: Ops | None = None
) -> Program:
    """How a rank of `mesh` runs a model under a config.

    `specs` are by default those of `model_specs`, `ops` the table of `model.kernels` and `model.kernel_packages`.
    Raises ValueError for a layout the model cannot take, and as `model_specs` does.
    """
    section, specs = config.layout, specs or model_specs(config, family, cfg)
    transforms = [
        context_parallel(
            kind=section.kind,
            num_heads=cfg.decoder.num_heads,
            num_kv_heads=cfg.decoder.num_kv_heads,
            towers=family.towers(cfg),
            is_recurrent=family.is_recurrent(cfg),
        ),
        expert_parallel(
            "dropless" if section.capacity is None else "capacity",
            capacity=section.capacity,
            fused=section.fused_exchange,
            num_chosen=family.experts_per_token(cfg),
        ),
        *build_remat(section, list(stacks_of(specs))),
        *(offload(what) for what in section.offload if what in OFFLOAD_KINDS),
        data_parallel(
            prefetch=section.prefetch,
            keep_gathered=section.keep_gathered,
            reshard_after_forward=section.reshard_after_forward,
            sums_under_way=section.sums_under_way,
        ),
        compiled(config.train.compile),
        *build_precision(config),
    ]
    if section.head == "sharded":
        transforms.append(vocabulary_parallel())
    ops = ops or build_ops(config.model)
    return pipe(replace(Program.of(specs, ops, mesh), notes=trained_note(specs)), *transforms)


def build_precision(config: Config) -> list[ProgramTransform]:
    """The dtypes of computation and of gradient sums, where they are not those of the parameters."""
    section, rules = config.layout, config.layout.compute_rules
    narrow = "bfloat16" if config.model.dtype == "bfloat16" else None  # of which what is sensitive is in float32 too
    names = (section.compute_dtype or narrow, section.reduce_dtype)
    compute, reduce = (None if name is None else getattr(torch, name) for name in names)
    if compute is None and reduce is None and rules is None:
        return []
    dtypes = None if rules is None else {pattern: getattr(torch, name) for pattern, name in rules.items()}
    return [precision(compute=compute, reduce=reduce, rules=dtypes)]


def build_remat(section: LayoutSection, stacks: Sequence[str]) -> list[ProgramTransform]:
    """What is computed again: one policy for all stacks, or one for each of a model's `stacks`."""

    def build(policy: RematStack, where: str) -> ProgramTransform:
        save = [op for op in policy.save if section.ep > 1 or op != "exchange"] if policy.kind == "selective" else []
        kind = "full" if policy.kind == "selective" and not save else policy.kind
        return remat(kind, save=save, every=policy.every, num_layers=policy.layers, where=where)

    if not section.remat_stacks:
        return [build(section.remat_of(""), "all")]
    return [build(section.remat_of(name), name) for name in stacks]
