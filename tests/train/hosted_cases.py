"""Programs and optimizers whose parameters lie on the host."""

from dataclasses import dataclass
from typing import Any

import torch

from mmfn.parallel.mesh.layout import Layout
from mmfn.parallel.program import Transform
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.expert_parallel import expert_parallel
from mmfn.parallel.transforms.offload import offload
from mmfn.parallel.transforms.precision import precision
from mmfn.parallel.transforms.remat import remat
from mmfn.parallel.transforms.vocabulary_parallel import vocabulary_parallel
from mmfn.train import optim
from tests.parallel.conformance import spread

PARAMETERS, ALL = ("parameters",), ("parameters", "optimizer")
ALONE = Layout()


@dataclass(frozen=True, kw_only=True)
class Case:
    """A program and its optimizer. `what`: of the optimizer, what lies on the host."""

    transforms: tuple[Transform, ...] = ()
    layout: Layout = ALONE
    family: str = "dense"
    trained: str = "all"
    optimizer: str = "adamw"
    what: tuple[str, ...] = PARAMETERS
    dtype: torch.dtype = torch.float64
    num_layers: int = 3
    micro_batches: int = 1
    kind: str = "gather"


FULL, KEPT = remat("full"), data_parallel(keep_gathered=True)
MESH = (data_parallel(), expert_parallel())
ONE: dict[str, Case] = {
    "plain": Case(),
    "remat": Case(transforms=(FULL,)),
    "uniform": Case(transforms=(remat("uniform", num_layers=2),), num_layers=5),
    "block": Case(transforms=(remat("block"),)),
    "selective": Case(transforms=(remat("selective", save=("attention", "matmul")),)),
    "no prefetch": Case(transforms=(data_parallel(prefetch=False), FULL)),
    "kept": Case(transforms=(KEPT, FULL)),
    "activations": Case(transforms=(offload("activations"),), what=ALL),
    "activations, remat": Case(transforms=(offload("activations"), FULL), what=ALL),
    "experts": Case(family="moe", transforms=(FULL,)),
    "micro-batches": Case(micro_batches=3, transforms=(FULL,)),
    "float32": Case(transforms=(precision(compute=torch.float32), FULL)),
    "bfloat16": Case(transforms=(precision(compute=torch.bfloat16),), dtype=torch.float32),
    "frozen tower": Case(trained="decoder", transforms=(FULL,)),
    "frozen blocks": Case(trained="second block", transforms=(FULL,), num_layers=2),
    "lora": Case(trained="lora", family="moe", transforms=(FULL,)),
    "lora of all": Case(trained="lora of all"),
    "muon": Case(optimizer="muon"),
    "ema": Case(optimizer="ema", what=ALL),
    "master": Case(optimizer="master", dtype=torch.bfloat16),
    "rules": Case(optimizer="rules", what=ALL, micro_batches=2),
}
SEVERAL: dict[str, Case] = {
    "dp": Case(layout=Layout(dp=2), transforms=(*MESH, FULL)),
    "dp, plain": Case(layout=Layout(dp=3), transforms=MESH, what=ALL),
    "dp, no prefetch": Case(layout=Layout(dp=2), transforms=(data_parallel(prefetch=False), FULL)),
    "dp, kept": Case(layout=Layout(dp=2), transforms=(KEPT, FULL)),
    "dp, bfloat16": Case(layout=Layout(dp=2), transforms=(*MESH, precision(compute=torch.bfloat16), FULL)),
    "dp, head": Case(layout=Layout(dp=2), transforms=(*MESH, vocabulary_parallel(), FULL)),
    "dp, lora": Case(layout=Layout(dp=2), trained="lora", family="moe", transforms=(*MESH, FULL)),
    "dp, muon": Case(layout=Layout(dp=3), optimizer="muon", transforms=MESH, what=ALL),
    "hsdp, uniform": Case(layout=Layout(replicate=2, dp=2), transforms=(*MESH, remat("uniform", num_layers=2))),
    "ep": Case(layout=Layout(dp=2, ep=2), family="moe", transforms=(*MESH, FULL), micro_batches=2),
    "edp, ema": Case(layout=Layout(dp=4, ep=2), family="moe", optimizer="ema", transforms=(*MESH, FULL)),
    "cp": Case(
        layout=Layout(cp=2),
        kind="ring",
        transforms=(*MESH, FULL, spread("ring")),
    ),
    "all, frozen": Case(
        layout=Layout(dp=2), trained="decoder", transforms=(*MESH, FULL, offload("activations")), what=ALL
    ),
}
CASES = ONE | SEVERAL


def build_optimizer(name: str, specs: Any) -> optim.Transform:
    """All kinds of what writes parameters."""
    adamw = optim.adamw(eps=1e-3, weight_decay=0.1)
    if name == "muon":
        return optim.with_others(optim.muon(compute=torch.float32), adamw, specs)
    if name == "ema":
        return optim.chain(adamw, optim.ema(0.9))
    if name == "master":
        return optim.master(adamw)
    if name == "rules":
        return optim.by_path(adamw, no_decay=[".*bias"], lr_scales=[("vision/.*", 0.1)], layer_decay=0.9)
    return adamw


COMPILED: dict[str, tuple[Transform, ...]] = {
    "plain": (),
    "remat": (FULL,),
    "kept": (KEPT, FULL),
    "bfloat16 rules": (precision(compute=torch.bfloat16), FULL),
}
