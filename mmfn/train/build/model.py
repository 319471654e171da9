"""From a config to a model: its device, its family, and what of it is trained."""

from pathlib import Path
from typing import Any

import torch

from mmfn.batch import AUDIO
from mmfn.errors import UserError
from mmfn.interop import adapter
from mmfn.interop.checkpoint import read_config
from mmfn.interop.hf import resolve
from mmfn.lora import lora
from mmfn.models import Family
from mmfn.ops import npu
from mmfn.parallel.mesh.launch import Ranks
from mmfn.spec import freeze, has_experts, num_params, num_trained, stacks, trained_paths
from mmfn.train.config.rule import Stack, Subject
from mmfn.train.config.rules import breaches
from mmfn.train.config.schema import Config, ModelSection
from mmfn.train.data.sizes import units_of
from mmfn.tree import Tree


def find_device(name: str, ranks: Ranks | None = None) -> torch.device:
    """The device of a name, tried out; of several ranks each takes that with its number on its machine.

    An NPU's package is imported here, if torch has not done so. Raises ValueError for a device that torch does not
    have, and for one device for several ranks.
    """
    if name.partition(":")[0] == "npu":
        npu.load()
    try:
        device = torch.device(name)
        if ranks is not None and ranks.size > 1 and device.type != "cpu":
            if device.index is not None:
                raise UserError(
                    f"model.device {name!r} is one device but there are {ranks.size} ranks; set it to {device.type!r}"
                )
            device = torch.device(device.type, ranks.local)
        torch.zeros(1, device=device).item()  # also refuses meta, which holds no values
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"model.device {name!r} cannot be used by this torch {torch.__version__}; try 'cpu'") from error
    return device


def find_family(section: ModelSection) -> tuple[Family, Any]:
    """The family of a model's folder and its config, from `config.json` and, of weights to load, their names."""
    folder = Path(section.path)
    return resolve(read_config(folder), folder if section.init == "load" else None)


def model_specs(config: Config, family: Family, cfg: Any) -> Tree:
    """The parameters of a run's model: those of the family, adapters, and what is frozen.

    Raises ValueError for a part the family does not have, for patterns that match nothing, and for freezing adapters.
    """
    specs, lora_section = family.specs(cfg), config.lora
    if config.model.adapter is not None:
        specs = adapter.read(config.model.adapter, specs, family.key_map(cfg))
    elif lora_section.rank is not None:
        specs = lora(
            specs,
            rank=lora_section.rank,
            alpha=lora_section.alpha,
            targets=family.lora_targets if lora_section.targets is None else lora_section.targets,
            is_rs=lora_section.rslora,
            dropout=lora_section.dropout,
            keep=lora_section.keep,
        )
    parts = family.parts(cfg)
    if absent := [name for name in config.freeze.parts if name not in parts]:
        raise UserError(f"freeze.parts has {absent[0]!r} but this model's parts are {', '.join(parts)}; use these")
    patterns = [*(parts[name] for name in config.freeze.parts), *config.freeze.patterns]
    frozen = freeze(specs, patterns) if patterns else specs
    lost = set(trained_paths(specs)) - set(trained_paths(frozen))
    if patterns and not lost:
        raise UserError("freeze has no effect: LoRA already freezes all that it covers; remove it")
    if adapters := [path for path in lost if "/lora/" in path]:
        raise UserError(
            f"freeze covers the adapter {min(adapters)!r} but LoRA already freezes the weights; leave the part out of "
            "freeze, or out of lora.targets"
        )
    if config.model.adapter is not None and lost:
        raise UserError(
            f"freeze covers {min(lost)!r}, which model.adapter holds in full and the adapter of this run would lack; "
            "leave it out of freeze"
        )
    return frozen


def stacks_of(specs: Tree) -> dict[str, Stack]:
    """The stacks of blocks of a model by name."""
    return {name: Stack(depth=len(blocks), has_experts=has_experts(blocks)) for name, blocks in stacks(specs).items()}


def check_model(config: Config, family: Family, cfg: Any, *, is_plan: bool = False) -> None:
    """Raise ValueError for settings that do not fit a model: its stacks, towers, experts, recurrent layers."""
    towers = family.towers(cfg)
    subject = Subject(
        config=config,
        stacks=stacks_of(family.specs(cfg)),
        towers=tuple(towers),
        num_ahead=family.num_ahead(cfg),
        hears=any(AUDIO in kind.media for kind in towers.values()),
        is_recurrent=family.is_recurrent(cfg),
        is_plan=is_plan,
    )
    for breach in breaches(subject):
        if not breach.warns:
            raise UserError(breach.sentence)
    if not is_plan:
        units_of(config.data.tower_buckets, towers)


def trained_note(specs: Tree) -> tuple[str, ...]:
    """How much is trained, where it is not all."""
    trained, total = num_trained(specs), num_params(specs)
    return () if trained == total else (f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%})",)
