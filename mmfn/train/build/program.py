"""From a config to a program: the mesh's sizes and the transforms that lay a model out over it."""

from dataclasses import replace
from typing import Any

import torch

from mmfn.models import Family
from mmfn.parallel.mesh.layout import Layout, Mesh
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
from mmfn.train.build.model import model_specs, trained_note
from mmfn.train.config.schema import Config, LayoutSection
from mmfn.tree import Tree


def layout_of(section: LayoutSection) -> Layout:
    """The sizes of the mesh. Raises ValueError for sizes that do not fit together."""
    ulysses = {"ulysses": section.cp, "usp": section.ulysses}.get(section.kind, 1)
    return Layout(replicate=section.replicate, dp=section.dp, cp=section.cp, ulysses=ulysses, ep=section.ep)


def check_attention(config: Config, device: torch.device) -> None:
    """Raise ValueError for a setting whose attention has no kernel for the device yet."""
    kind, compile_ = config.layout.kind, config.train.compile
    if compile_ != "none" and device.type != "cpu":
        raise ValueError(
            f"train.compile {compile_!r} needs attention that reads nothing on the host, which there is on the CPU "
            f"only, not on {device.type}; use train.compile=none"
        )
    if config.layout.cp > 1 and kind != "ulysses" and device.type != "cpu":
        raise ValueError(
            f"layout.kind {kind!r} needs attention blocks with log-sum-exp, which there are on the CPU only, not on "
            f"{device.type}; use layout.kind=ulysses"
        )


def build_program(config: Config, family: Family, cfg: Any, mesh: Mesh, specs: Tree | None = None) -> Program:
    """How a rank of `mesh` runs a model under a config; `specs` are by default those of `model_specs`.

    Raises ValueError for a layout the model cannot take, and as `model_specs` does.
    """
    chosen = config.layout
    narrow = "bfloat16" if config.model.dtype == "bfloat16" else None  # of which what is sensitive is in float32 too
    names = (chosen.compute_dtype or narrow, chosen.reduce_dtype)
    compute, reduce = (None if name is None else getattr(torch, name) for name in names)
    transforms = [
        context_parallel(
            kind=chosen.kind,
            num_heads=cfg.decoder.num_heads,
            num_kv_heads=cfg.decoder.num_kv_heads,
            towers=family.towers(cfg),
        ),
        expert_parallel("dropless" if chosen.capacity is None else "capacity", capacity=chosen.capacity),
        *build_remat(chosen),
        *(offload(what) for what in chosen.offload if what in OFFLOAD_KINDS),
        data_parallel(prefetch=chosen.prefetch, keep_gathered=chosen.keep_gathered),
        compiled(config.train.compile),
    ]
    rules = chosen.compute_rules
    if compute is not None or reduce is not None or rules is not None:
        dtypes = None if rules is None else {pattern: getattr(torch, name) for pattern, name in rules.items()}
        transforms.append(precision(compute=compute, reduce=reduce, rules=dtypes))
    if chosen.head == "sharded":
        transforms.append(vocabulary_parallel())
    specs = specs or model_specs(config, family, cfg)
    return pipe(replace(Program.of(specs, mesh=mesh), notes=trained_note(specs)), *transforms)


def build_remat(chosen: LayoutSection) -> list[ProgramTransform]:
    """What is computed again: one policy for all stacks, or one for the text and one for the vision tower."""

    def build(key: str, where: str) -> ProgramTransform:
        kind, save = getattr(chosen, key), getattr(chosen, f"{key}_save")
        every, num_layers = getattr(chosen, f"{key}_every"), getattr(chosen, f"{key}_layers")
        return remat(kind, save=save if kind == "selective" else (), every=every, num_layers=num_layers, where=where)

    if chosen.remat_vision is None:
        return [build("remat", "all")]
    return [build("remat", "text"), build("remat_vision", "vision")]
