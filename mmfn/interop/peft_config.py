"""peft's `adapter_config.json`: what of it is plain LoRA. Source: peft 0.21 (`LoraConfig`)."""

import re
import sys
from collections.abc import Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from mmfn.errors import UserError
from mmfn.interop.files import read_json

CONFIG = "adapter_config.json"
FOREIGN = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "exclude_modules",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "layers_to_transform",
    "lora_bias",
    "monteclora_config",
    "rank_pattern",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
"""Settings with which an adapter is something else than `mmfn.lora` has."""
PLAIN_STARTS = ("gaussian", "orthogonal", "eva")  # others of peft's named initialisations change the base weights


def read(folder: str | PathLike[str]) -> dict[str, Any]:
    """The settings in an adapter's folder. Raises ValueError for a missing or broken file and what is no plain LoRA."""
    config = read_json(Path(folder) / CONFIG)
    _check(config, str(folder))
    return config


def is_target(name: str, is_stack: bool, config: Mapping[str, Any]) -> bool:
    """Whether peft adapts the parameter of a name: by module, a stack of experts by its own name."""
    if is_stack:
        return ends(name, config.get("target_parameters") or ())
    module, targets = name.removesuffix(".weight"), config.get("target_modules") or ()
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return ends(module, targets)


def ends(name: str, targets: Collection[str]) -> bool:
    """Whether a name is one of the targets or ends with one behind a dot, as peft compares names."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _check(config: Mapping[str, Any], folder: str) -> None:
    kind, start = config.get("peft_type"), config.get("init_lora_weights", True)
    if kind != "LORA" or config.get("bias", "none") != "none":
        raise UserError(f"adapter {folder!r} is {kind!r} with bias {config.get('bias')!r}; only LORA without is read")
    if foreign := [name for name in FOREIGN if config.get(name)]:
        raise UserError(
            f"adapter {folder!r} has {foreign[0]} {config[foreign[0]]!r}, which mmfn does not have; merge it with peft"
        )
    if isinstance(start, str) and start not in PLAIN_STARTS:
        raise UserError(f"adapter {folder!r} changed its base by init_lora_weights {start!r}; convert it with peft")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    is_scale = isinstance(alpha, int | float) and not isinstance(alpha, bool) and 0 < alpha <= sys.float_info.max
    if type(rank) is not int or rank < 1 or not is_scale:
        raise UserError(f"adapter {folder!r} has r {rank!r} and lora_alpha {alpha!r}; both must be positive numbers")
    if not isinstance(is_rs := config.get("use_rslora", False), bool):
        raise UserError(f"adapter {folder!r} has use_rslora {is_rs!r}, which must be true or false")
    dropout = config.get("lora_dropout", 0.0)
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise UserError(f"adapter {folder!r} has lora_dropout {dropout!r}, which must be in [0, 1)")
    for name in ("target_modules", "target_parameters", "modules_to_save"):
        names = config.get(name) or ()
        is_list = isinstance(names, list | tuple) and all(isinstance(entry, str) for entry in names)
        if not is_list and not (name == "target_modules" and isinstance(names, str)):
            raise UserError(f"adapter {folder!r} has {name} {names!r}, which must be a list of names")
    if isinstance(targets := config.get("target_modules"), str):
        try:
            re.compile(targets)
        except re.error as error:
            raise UserError(f"adapter {folder!r}: target_modules {targets!r} is no regular expression") from error
