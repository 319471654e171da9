"""One list of layouts of up to 8 ranks: all pairs and triples of replicate, dp, cp (every kind) and ep.

A case is settings of the config's section `layout`, so that the same line makes a step to run and a step to plan.
"""

from itertools import cycle
from typing import Any

import pytest

from mmfn.parallel.context.token_order import PIECE_KINDS
from tests import tiny
from tests.parallel.conformance import BATCHES

Case = dict[str, Any]
"""Settings of the section `layout`; "batch": a name in BATCHES; "moe": a model with experts; "trained": in TRAINED."""

EXCHANGE_KEPT: Case = {"remat": "selective", "remat_save": ["attention", "exchange"]}
FAST: list[Case] = [  # what no other test covers
    {"cp": 2, "kind": "gather", "ep": 2, "batch": "mixed"},
    {"cp": 4, "kind": "usp", "ulysses": 2, "ep": 2, "batch": "video"},
    {"dp": 2, "cp": 2, "kind": "ring", "ep": 4, "remat": "full", "batch": "first half without images"},
    {"dp": 2, "cp": 2, "kind": "ulysses", "ep": 2, "batch": "first half unsupervised"},
    {"dp": 2, "cp": 3, "kind": "ring", "ep": 2, "batch": "mixed"},  # an ep group of ranks with different batches
    {"replicate": 2, "cp": 2, "kind": "ring", "ep": 2, "batch": "first half without images"},
    {"replicate": 2, "dp": 2, "cp": 2, "kind": "gather", "ep": 2, "remat": "full", "batch": "mixed"},
    {"dp": 2, "cp": 2, "kind": "gather", "ep": 4, "capacity": 4.0, "batch": "first half unsupervised"},
    {"dp": 2, "cp": 2, "kind": "ring", "ep": 2, "remat": "full", "trained": "lora", "batch": "mixed"},
    {"dp": 2, "cp": 2, "kind": "ring", "ep": 4, "remat": "full", "trained": "lora with dropout", "batch": "mixed"},
    {"cp": 4, "kind": "usp", "ulysses": 2, "trained": "lora with dropout", "batch": "video"},
    {"dp": 3, "cp": 2, "kind": "gather", "remat": "full", "trained": "second block", "batch": "mixed"},
    {"dp": 2, "cp": 2, "kind": "ulysses", "moe": True, "head": "sharded", "batch": "first half unsupervised"},
    {"cp": 2, "kind": "ring", "remat": "uniform", "remat_layers": 2, "offload": ["activations"], "batch": "mixed"},
    {"dp": 2, "cp": 2, "kind": "gather", "remat": "block", "offload": ["activations"], "batch": "mixed"},
    {
        "dp": 2,
        "cp": 2,
        "kind": "ulysses",
        "remat": "selective",
        "remat_stacks": {"vision": {"kind": "full"}},
        "batch": "mixed",
    },
    {"dp": 2, "cp": 2, "kind": "ring", "ep": 2, "remat": "full", "offload": ["parameters"], "batch": "mixed"},
    {"dp": 2, "cp": 2, "kind": "ulysses", "ep": 2, **EXCHANGE_KEPT, "batch": "first half without images"},
    {"cp": 2, "kind": "ulysses", "moe": True, "batch": "unsupervised"},
    {"cp": 4, "kind": "ring", "moe": True, "batch": "unsupervised"},
    {"dp": 2, "ep": 2, "batch": "unsupervised"},
    {"dp": 4, "ep": 4, "batch": "unsupervised"},
    {"cp": 4, "kind": "gather", "ep": 4, "batch": "unsupervised"},
]
SUPERVISED = tuple(name for name in BATCHES if name != "unsupervised")
AROUND_CP: list[Case] = [
    {},
    {"dp": 2},
    {"replicate": 2},
    {"ep": 2},
    {"dp": 2, "ep": 2},
    {"dp": 2, "ep": 4},
    {"replicate": 2, "ep": 2},
]
KINDS: list[Case] = [
    {"cp": 2, "kind": "gather"},
    {"cp": 2, "kind": "ulysses"},
    {"cp": 2, "kind": "ring"},
    {"cp": 4, "kind": "usp", "ulysses": 2},
]
BY_KIND: list[Case] = [  # remat and batches take turns: 2, 5 and 7 have no common divisor
    {**kind, **sizes, "remat": remat, "batch": batch}
    for (kind, sizes), remat, batch in zip(
        [(kind, sizes) for kind in KINDS for sizes in AROUND_CP],
        cycle(("none", "full")),
        cycle(SUPERVISED),
        strict=False,
    )
]
OTHERS: list[Case] = [
    {"dp": 8, "ep": 4, "remat": "full", "batch": "video"},
    {"replicate": 2, "dp": 2, "ep": 2, "remat": "full", "batch": "first half without images"},
    {"replicate": 2, "dp": 4, "ep": 2, "batch": "first half unsupervised"},
    {"replicate": 4, "dp": 2, "ep": 2, "batch": "mixed"},
    {"replicate": 2, "dp": 2, "cp": 2, "kind": "ring", "remat": "full", "batch": "first half without images"},
    {"replicate": 2, "dp": 2, "cp": 2, "kind": "gather", "moe": True, "batch": "mixed"},
    {"replicate": 2, "dp": 2, "cp": 2, "kind": "ulysses", "ep": 4, "batch": "first half unsupervised"},
    {"replicate": 2, "dp": 2, "cp": 2, "kind": "ring", "ep": 4, "remat": "full", "batch": "video"},
    {"dp": 4, "cp": 2, "kind": "ulysses", "ep": 4, "remat": "full", "batch": "mixed"},
    {"dp": 4, "cp": 2, "kind": "gather", "ep": 8, "batch": "first half without images"},
    {"dp": 2, "cp": 4, "kind": "usp", "ulysses": 2, "ep": 8, "remat": "full", "batch": "first half unsupervised"},
    {"dp": 2, "cp": 3, "kind": "gather", "ep": 2, "remat": "full", "batch": "first half without images"},
    {"dp": 3, "cp": 2, "kind": "ulysses", "ep": 2, "batch": "text"},
    {"cp": 8, "kind": "ulysses", "ep": 8, "batch": "mixed"},
    {"cp": 8, "kind": "ring", "ep": 4, "batch": "video"},
    {"cp": 8, "kind": "gather", "ep": 2, "remat": "full", "batch": "text"},
    {"cp": 8, "kind": "usp", "ulysses": 4, "ep": 4, "batch": "mixed"},
    {"cp": 2, "kind": "ulysses", "ep": 2, "capacity": 2.0, "batch": "mixed"},
    {"cp": 4, "kind": "ring", "ep": 4, "capacity": 4.0, "remat": "full", "batch": "mixed"},
    {"dp": 2, "cp": 3, "kind": "ring", "ep": 2, "capacity": 2.0, "batch": "first half without images"},
    {"dp": 2, "cp": 4, "kind": "usp", "ulysses": 2, "ep": 4, "capacity": 4.0, "batch": "video"},
    {"replicate": 2, "cp": 2, "kind": "gather", "ep": 2, "capacity": 2.0, "remat": "full", "batch": "text"},
]
PARTLY: list[Case] = [
    {"dp": 2, "cp": 2, "kind": "ulysses", "trained": "decoder", "batch": "first half without images"},
    {
        "replicate": 2,
        "dp": 2,
        "cp": 2,
        "kind": "ring",
        "ep": 2,
        "remat": "full",
        "trained": "decoder",
        "batch": "mixed",
    },
    {"replicate": 2, "dp": 2, "ep": 2, "trained": "lora", "batch": "first half unsupervised"},
    {"dp": 2, "cp": 2, "kind": "gather", "ep": 4, "capacity": 4.0, "trained": "lora", "batch": "mixed"},
    {"dp": 2, "cp": 4, "kind": "usp", "ulysses": 2, "remat": "full", "trained": "lora of all", "batch": "video"},
    {"dp": 8, "trained": "lora of all", "batch": "mixed"},
    {"dp": 2, "cp": 2, "kind": "gather", "head": "sharded", "trained": "decoder", "batch": "mixed"},
    {"cp": 2, "kind": "ring", "remat": "uniform", "remat_layers": 2, "trained": "second block", "batch": "mixed"},
    {"dp": 2, "remat": "full", "offload": ["activations"], "trained": "second block", "batch": "mixed"},
    {"dp": 2, "remat": "full", "offload": ["parameters"], "trained": "second block", "batch": "mixed"},
    {"dp": 2, "cp": 2, "kind": "ulysses", "offload": ["parameters"], "head": "sharded", "batch": "mixed"},
    {"replicate": 2, "dp": 2, "ep": 2, "remat": "full", "offload": ["parameters"], "trained": "lora", "batch": "video"},
    {
        "dp": 2,
        "cp": 2,
        "kind": "ulysses",
        "remat_stacks": {"vision": {"kind": "full"}},
        "trained": "lora of all",
        "batch": "mixed",
    },
    {"dp": 2, "cp": 2, "kind": "ring", "remat": "full", "trained": "lora of the tower", "batch": "mixed"},
    *(
        {**case, "trained": "lora with dropout"}
        for case in (
            {"dp": 3, "batch": "first half unsupervised"},
            {"replicate": 2, "dp": 2, "remat": "full", "batch": "mixed"},
            {"replicate": 2, "batch": "first half without images"},
            {"cp": 2, "kind": "gather", "remat_stacks": {"vision": {"kind": "full"}}, "batch": "mixed"},
            {"dp": 2, "cp": 3, "kind": "gather", "ep": 2, "batch": "text"},
            {"dp": 2, "cp": 2, "kind": "ulysses", "remat": "selective", "batch": "video"},
            {"replicate": 2, "cp": 2, "kind": "ring", "remat": "uniform", "remat_layers": 2, "batch": "mixed"},
            {"dp": 2, "ep": 2, "capacity": 2.0, "remat": "block", "batch": "mixed"},
            {"dp": 2, "cp": 2, "kind": "gather", "remat": "full", "offload": ["activations"], "batch": "mixed"},
            {"cp": 2, "kind": "ulysses", "head": "sharded", "offload": ["activations"], "batch": "mixed"},
        )
    ),
]
LAYOUTS = [*FAST, *BY_KIND, *OTHERS, *PARTLY]


def name_of(case: Case) -> str:
    """All of it, in words."""
    return ", ".join(str(value) if name in ("kind", "batch") else f"{name} {value}" for name, value in case.items())


def settings_of(case: Case) -> dict[str, Any]:
    """Settings of the section `layout` alone."""
    return {name: value for name, value in case.items() if name not in ("batch", "moe", "trained")}


def has_experts(case: Case) -> bool:
    """Whether the model of a case is one of experts."""
    return bool(case.get("moe", "ep" in case))


def families_of(case: Case) -> list[str]:
    """The tiny models a case is for: of experts or not, with as many heads as Ulysses needs, and no state that passes
    from token to token where the ranks cut segments."""
    ranks = {"ulysses": case.get("cp", 1), "usp": case.get("ulysses", 1)}.get(case.get("kind", ""), 1)
    alike = () if has_experts(case) else ("small", "moe")  # to "dense", where experts do not matter
    names = [name for name in tiny.TINY if name not in alike and (tiny.has_experts(name) or not has_experts(case))]
    models = {name: tiny.model_of(name) for name in names}
    is_cut = case.get("cp", 1) > 1 and case.get("kind") not in PIECE_KINDS
    return [
        name
        for name, model in models.items()
        if model.cfg.decoder.num_heads % ranks == 0 and not (is_cut and model.family.is_recurrent(model.cfg))
    ]


CELLS = [  # (case, family): all layouts with all models they are for
    pytest.param(case, family, id=f"{family}, {name_of(case)}", marks=() if case in FAST else pytest.mark.slow)
    for case in LAYOUTS
    for family in families_of(case)
]
