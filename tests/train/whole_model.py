"""The whole model of a config, read or drawn by the public functions: the oracle of ranks that read their shards."""

from dataclasses import replace
from pathlib import Path

import torch

import mmfn
from mmfn import tree
from mmfn.interop import adapter
from mmfn.interop.checkpoint import read_config
from mmfn.train.build.model import find_device
from mmfn.train.config.schema import ModelSection


def load_model(section: ModelSection, seed: int) -> mmfn.Model:
    """The whole model, loaded or random, on the section's device, with its adapter if it has one."""
    device, dtype = find_device(section.device), getattr(torch, section.dtype)
    if section.init == "load":
        model = mmfn.load_hf(section.path, dtype=dtype, device=device)
    else:
        model = mmfn.init(read_config(Path(section.path)), seed, dtype)
        model = replace(model, params=tree.map(lambda leaf: leaf.to(device), model.params))
    return model if section.adapter is None else adapter.load(section.adapter, model)
