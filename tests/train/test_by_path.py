"""Rules for single leaves: factors by depth against a written list, schedules of their own, and their order."""

import pytest
import torch

from mmfn.parallel.mesh.layout import single_mesh
from mmfn.spec import ONES, freeze, spec
from mmfn.train import optim
from mmfn.train.optim import Facts, Leaves, Transform, Update, by_path, distances, facts_of
from mmfn.train.schedule import schedule

PATHS = (
    "head/weight",
    "text/embed/weight",
    "text/layers/0/mlp/up/weight",
    "text/layers/2/mlp/up/weight",
    "text/norm/weight",
    "vision/layers/0/mlp/up/bias",
    "vision/layers/1/mlp/up/bias",
    "vision/merger/up/weight",
    "vision/patch_embed/bias",
    "vision/positions/weight",
)


DISTANCES = dict(zip(PATHS, (0, 3, 2, 0, 0, 1, 0, 0, 2, 2), strict=True))


def test_distances() -> None:
    assert distances(PATHS) == DISTANCES
    assert distances(["norm/weight", "embed/weight"]) == {"norm/weight": 0, "embed/weight": 0}


def test_frozen_blocks_count() -> None:
    frozen = ["text/layers/2/.*", "text/norm/.*", "vision/layers/1/.*"]
    specs = freeze({p: spec((2, 2), "mlp embed", ONES) for p in PATHS}, frozen)
    found = {path: known.distance for path, known in facts_of(specs, single_mesh()).items()}
    left_out = ("text/layers/2/mlp/up/weight", "text/norm/weight", "vision/layers/1/mlp/up/bias")
    assert found == {path: n for path, n in DISTANCES.items() if path not in left_out}


def decayed(tx: Transform) -> Leaves:
    """All leaves, once ones, after an update at a rate of 0.1 without gradients."""
    params = {p: torch.ones(2, 2, dtype=torch.float64) for p in PATHS}
    u = Update(
        params=params,
        grads={p: torch.zeros_like(x) for p, x in params.items()},
        norm=torch.tensor(0.0),
        finite=torch.tensor(True),
        lr=torch.tensor(0.1, dtype=torch.float64),
        step=torch.tensor(2),
    )
    tx.update({p: Facts(shape=(2, 2), distance=n) for p, n in DISTANCES.items()})(u, tx.init(params))
    return params


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
def test_schedules_scales_and_depth_multiply_in_every_optimizer(kind: str) -> None:
    make = {"adamw": optim.adamw, "sgd": optim.sgd, "muon": optim.muon}[kind]
    vision = schedule("linear", peak=0.4, num_steps=8)
    tx = by_path(
        make(weight_decay=1.0),
        no_decay=["text/norm/.*"],
        lr_scales=[("vision/merger/.*", 0.5), ("vision/.*", 0.25)],
        schedules=[("vision/.*", vision)],
        layer_decay=0.5,
    )
    for path, x in decayed(tx).items():  # without gradients decay alone is left: 1 - lr
        lr = 0.4 * (1 - 2 / 8) * (0.5 if "merger" in path else 0.25) if path.startswith("vision") else 0.1
        lr *= 0.5 ** DISTANCES[path] * (path != "text/norm/weight")
        torch.testing.assert_close(x, torch.full_like(x, 1 - lr), rtol=1e-12, atol=0, msg=path)


@pytest.mark.parametrize("is_swapped", [False, True])
def test_rules_within_rules_add_up(is_swapped: bool) -> None:
    text, vision = (lambda step, lr=lr: torch.tensor(lr, dtype=torch.float64) for lr in (0.2, 0.4))
    rules = [
        {"no_decay": [".*bias"], "lr_scales": [("text/.*", 0.5)], "schedules": [("text/.*", text)]},
        {"no_decay": ["head/.*"], "lr_scales": [(".*/layers/0/.*", 0.25)], "schedules": [(".*/weight", vision)]},
    ]
    outer, inner = reversed(rules) if is_swapped else rules
    found = decayed(by_path(by_path(optim.adamw(weight_decay=1.0), **inner, layer_decay=0.5), **outer, layer_decay=0.5))
    for path, x in found.items():
        lr = (0.2 if is_swapped else 0.4) if path.startswith("text") else 0.4 if path.endswith("weight") else 0.1
        lr *= (0.5 if path.startswith("text") else 1) * (0.25 if "layers/0" in path else 1) * 0.25 ** DISTANCES[path]
        lr *= not path.endswith("bias") and not path.startswith("head")
        torch.testing.assert_close(x, torch.full_like(x, 1 - lr), rtol=1e-12, atol=0, msg=path)
