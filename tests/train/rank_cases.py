"""Layouts of a short run, and its steps on them in one process."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfn import tree
from mmfn.parallel.mesh.layout import Mesh
from mmfn.parallel.weights.sharding import shard_params, whole_params
from mmfn.train.build.data import build_loader, open_dataset
from mmfn.train.build.model import model_specs
from mmfn.train.build.processor import load_model_processor
from mmfn.train.build.program import build_program
from mmfn.train.build.run import Run
from mmfn.train.build.step import build_step
from mmfn.train.config.load import Loaded
from mmfn.train.data import agree
from mmfn.train.run import loop
from mmfn.tree import Tree
from tests.batches import wide
from tests.train.whole_model import load_model

MakeConfig = Callable[..., Path]
# several micro-batches, unevenly many per rank
SMALL = ("data.token_buckets=[64, 128]", "data.tower_buckets={vision: [64]}")
LAYOUTS = {
    "dp": ("layout.dp=2",),
    "dp-uneven": ("layout.dp=3", *SMALL),
    "hsdp": ("layout.replicate=2", "layout.dp=2", *SMALL),
    "ring": ("layout.cp=2", "layout.kind=ring", *SMALL),
    "ulysses": ("layout.cp=2", "layout.kind=ulysses", "layout.remat=full"),
    "dp-gather": ("layout.dp=2", "layout.cp=2", *SMALL),
}


def train(run: Run) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    loop.train(run, records.append)
    return records


def take_steps(
    mesh: Mesh, loaded: Loaded, start: Callable[[Tree, Tree], Tree] = lambda params, specs: params
) -> tuple[list[dict[str, float]], Tree]:
    """Metrics of two steps through the loader, in float64, and the whole parameters behind them.

    `start(params, specs)`: what they start from, made of what a run of that seed starts from.
    """
    config = loaded.config
    model = load_model(config.model, config.train.seed)
    specs = model_specs(config, model.family, model.cfg)
    params = start(tree.map(Tensor.double, model.params), specs)
    model = replace(model, params=params if mesh.layout.world == 1 else shard_params(params, specs, mesh))
    program = build_program(config, model.family, model.cfg, mesh)
    data = open_dataset(config.data, config.data.train, load_model_processor(config.model.path))
    loader = build_loader(config, data, model, program)
    step, state = build_step(config, model, program)
    empty, found = loader.empty(), []
    for number in range(2):
        share = agree(loader.share(number), mesh["batch"], empty)
        state, metrics = step(state, [wide(batch) for batch in share.microbatches])
        found.append({key: float(value) for key, value in metrics.items()})
    return found, tree.map(torch.clone, whole_params(state["params"], mesh))
