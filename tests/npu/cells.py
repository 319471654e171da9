"""Steps of every family with the table for NPUs: family x mechanism x layout, as cells of the conformance harness."""

from collections.abc import Sequence
from typing import Any

import torch

from mmfn.parallel.mesh.layout import Layout
from mmfn.parallel.program import Transform
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.expert_parallel import expert_parallel
from mmfn.parallel.transforms.offload import offload
from mmfn.parallel.transforms.precision import precision
from mmfn.parallel.transforms.remat import remat
from tests.parallel.conformance import Cell, spread
from tests.tiny import TINY, has_experts

ONE, TWO, HSDP = Layout(), Layout(dp=2), Layout(replicate=2, dp=2)
FAMILIES = tuple(TINY)
MOE = tuple(name for name in TINY if has_experts(name))
ATTENDING = tuple(name for name in TINY if name not in ("delta", "delta_moe"))  # ring and gather have no recurrence
ROUNDED = ("dense", "windows", "glm", "omni", "toy")  # bfloat16 moves the others as far with the portable table
KEEP = remat("selective", save=("attention", "experts", "matmul"))
SENT = remat("selective", save=("experts", "exchange"))
FUSED = expert_parallel(fused=True)
EDP = Layout(replicate=2, dp=4, ep=2)
UNEVEN = "first half without images"
PACK = {"segment_multiple": 4}


def line(
    name: str, *transforms: Transform, layout: Layout = ONE, families: Sequence[str] = FAMILIES, **fields: Any
) -> list[Cell]:
    """A cell for each family; the table comes first, from who runs it."""
    fields = {"layout": layout, "name": name, **fields}
    return [Cell(transforms=transforms, family=family, **fields) for family in families]


def cp(name: str, kind: str, layout: Layout, *transforms: Transform, families: Sequence[str] = FAMILIES) -> list[Cell]:
    """Tokens over cp; heads of a family decide what `spread` is."""
    pack = PACK if kind in ("ring", "usp") else {}
    found = [
        line(name, *transforms, spread(kind, family), data_parallel(), layout=layout, families=(family,), pack=pack)
        for family in families
    ]
    return [cell for cells in found for cell in cells]


LINES = [
    line("plain"),
    line("bfloat16", precision(compute=torch.bfloat16), dtype=torch.bfloat16, families=ROUNDED),
    line("remat", remat("full")),
    line("remat but attention, experts", KEEP),
    line("adapters, remat", remat("full"), trained="lora"),
    line("fsdp", data_parallel(), layout=TWO),
    line("fsdp, remat, asymmetric", data_parallel(), remat("full"), layout=TWO, batch=UNEVEN),
    line("hsdp, offload", data_parallel(), offload("activations"), layout=HSDP),
    line("dropless", expert_parallel(), data_parallel(), layout=Layout(dp=2, ep=2), families=MOE),
    line("dropless, kept", KEEP, expert_parallel(), data_parallel(), layout=Layout(dp=4, ep=4), families=MOE),
    line("fused", FUSED, data_parallel(), layout=Layout(dp=2, ep=2), families=MOE),
    line("fused, remat, adapters", FUSED, data_parallel(), remat("full"), layout=EDP, families=MOE, trained="lora"),
    line("fused, kept", SENT, FUSED, data_parallel(), layout=Layout(dp=4, ep=4), families=MOE, batch=UNEVEN),
    line(
        "capacity",
        *(expert_parallel("capacity"), data_parallel()),
        layout=Layout(dp=2, ep=2),
        families=MOE,
        pack={"tokens": 192},
    ),
    cp("ulysses", "ulysses", Layout(cp=2, ulysses=2)),
    cp("ring", "ring", Layout(cp=2), families=ATTENDING),
    cp("ring, kept", "ring", Layout(dp=2, cp=2), KEEP, families=ATTENDING),
    cp("usp", "usp", Layout(cp=4, ulysses=2), families=ATTENDING),
    cp("gather", "gather", Layout(cp=2), remat("full")),
    cp("gather, fused", "gather", Layout(dp=2, cp=2, ep=4), FUSED, families=MOE),
    cp("gather, experts", "gather", Layout(dp=2, cp=2, ep=2), expert_parallel(), families=MOE),
]
