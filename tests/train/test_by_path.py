"""Rules for single leaves: factors by depth against a written list, schedules of their own, and their order."""

import pytest
import torch

from mmfn.train import optim
from mmfn.train.optim import Facts, Update, by_path, depth_scales
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


def test_factors_by_depth() -> None:
    exponents = (0, 3, 2, 0, 0, 1, 0, 0, 2, 2)
    assert depth_scales(PATHS, 0.5) == {p: 0.5**n for p, n in zip(PATHS, exponents, strict=True)}
    assert set(depth_scales(PATHS, 1.0).values()) == {1.0}
    assert depth_scales(["norm/weight", "embed/weight"], 0.5) == {"norm/weight": 1.0, "embed/weight": 1.0}


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
    params = {p: torch.ones(2, 2, dtype=torch.float64) for p in PATHS}
    u = Update(
        params=params,
        grads={p: torch.zeros_like(x) for p, x in params.items()},
        norm=torch.tensor(0.0),
        finite=torch.tensor(True),
        lr=torch.tensor(0.1, dtype=torch.float64),
        step=torch.tensor(2),
    )
    tx.update({p: Facts(shape=(2, 2)) for p in PATHS})(u, tx.init(params))
    for path, x in params.items():  # without gradients decay alone is left: 1 - lr
        lr = 0.4 * (1 - 2 / 8) * (0.5 if "merger" in path else 0.25) if path.startswith("vision") else 0.1
        lr *= depth_scales(PATHS, 0.5)[path] * (path != "text/norm/weight")
        torch.testing.assert_close(x, torch.full_like(x, 1 - lr), rtol=1e-12, atol=0, msg=path)
