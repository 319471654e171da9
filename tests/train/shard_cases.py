"""Checkpoints of tiny models, what each rank of a layout loads of them, and what it would cut of the whole."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

import mmfn
from mmfn import tree
from mmfn.errors import UserError
from mmfn.lora import add_adapters
from mmfn.parallel.mesh.launch import Place
from mmfn.parallel.mesh.layout import Layout, Mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.parallel.weights.sharding import local, shard_params
from mmfn.train.build.model import model_specs
from mmfn.train.build.shards import load_shards
from mmfn.train.config.schema import Config
from tests import tiny
from tests.train.whole_model import load_model

CPU = torch.device("cpu")
LAYOUTS = {
    "dp": Layout(dp=4),
    "ep": Layout(dp=4, ep=4),
    "dp x ep": Layout(dp=4, ep=2),
    "hsdp": Layout(replicate=2, dp=2),
}
DENSE = ("dense", "windows", "delta")
EXPERTS = ("moe", "glm", "omni", "delta_moe")
CASES = [
    *((name, "hub", layout) for name in DENSE for layout in ("dp", "hsdp")),
    *(
        (name, disk, layout)
        for name in EXPERTS
        for disk in ("hub", "transformers")
        for layout in ("dp", "ep", "dp x ep")
    ),
]


def config_of(path: Path, dtype: str = "float32", **sections: Any) -> Config:
    return Config.model_validate(
        {
            "data": {"train": "unused", "batch_samples": 1, "token_buckets": [8], "tower_buckets": {}},
            "optimizer": {"lr": 1.0},
            "train": {"steps": 1, "seed": 5},
            "output": {"path": "unused"},
            **sections,
            "model": {"path": str(path), "dtype": dtype, **sections.get("model", {})},
        }
    )


def load_on(layout: Layout, config: Config, *others: Config) -> list[mmfn.Model]:
    """What each rank loads. `others`: configs of the ranks from the second on, where they differ."""
    configs = [config, *others, *[config] * (layout.world - 1 - len(others))]

    def load(mesh: Mesh) -> mmfn.Model:
        return load_shards(configs[mesh["world"].index], Place(device=CPU, mesh=mesh, host=mesh))

    return virtual(layout, load)


def refusals(layout: Layout, config: Config, *others: Config) -> list[str]:
    """The sentence of each rank."""
    configs = [config, *others, *[config] * (layout.world - 1 - len(others))]

    def load(mesh: Mesh) -> str:
        try:
            load_shards(configs[mesh["world"].index], Place(device=CPU, mesh=mesh, host=mesh))
        except UserError as error:
            return str(error)
        return "nothing"

    return virtual(layout, load)


def cut(layout: Layout, config: Config) -> list[mmfn.Model]:
    """The oracle: all is read, or drawn, and cut by each rank."""
    model = load_model(config.model, config.train.seed)
    specs = model_specs(config, model.family, model.cfg)
    params = add_adapters(model.params, specs, config.train.seed)
    return virtual(layout, lambda mesh: replace(model, params=shard_params(params, specs, mesh)))


def assert_same(models: list[mmfn.Model], wanted: list[mmfn.Model]) -> None:
    for model, want in zip(models, wanted, strict=True):
        assert (model.cfg, model.hf_config, model.verbatim) == (want.cfg, want.hf_config, want.verbatim)
        assert tree.paths(model.params) == tree.paths(want.params)
        for (path, leaf), other in zip(tree.items(model.params), tree.leaves(want.params), strict=True):
            assert isinstance(leaf, DTensor), path
            assert (leaf.dtype, leaf.shape, leaf.placements) == (other.dtype, other.shape, other.placements), path
            assert local(leaf).stride() == local(other).stride(), path
            assert torch.equal(local(leaf), local(other)), path


def save(folder: Path, name: str, disk: str = "hub", dtype: torch.dtype = torch.float32) -> Path:
    model = tiny.model_of(name)
    cast = tree.map(lambda leaf: leaf.to(dtype), model.params)
    mmfn.save_hf(folder, replace(model, params=cast), layout=disk)
    return folder


def edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
