"""Memory policies and dtypes of a run, from its config: the same training, and settings without effect refused."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfn import tree
from mmfn.train import loop, setup
from mmfn.train.config import load_config
from mmfn.train.sections import LayoutSection
from mmfn.train.setup import build_remat

MakeConfig = Callable[..., Path]


def trained(config: Path, *overrides: str) -> tuple[list[dict[str, Any]], Any, tuple[str, ...]]:
    """Records, parameters and what was said before."""
    records: list[dict[str, Any]] = []
    said: list[str] = []
    run = setup.prepare(load_config(config, overrides), say=said.append)
    return records, loop.train(run, records.append)["params"], tuple(said)


@pytest.mark.parametrize(
    "overrides",
    [
        ("layout.remat=uniform", "layout.remat_layers=2", "layout.offload=[activations]"),
        ("layout.remat=block", "layout.remat_vision=full", "layout.offload=[optimizer]", "optimizer.kind=muon"),
        (
            "layout.remat_vision=full",
            "layout.offload=[activations, optimizer]",
            "optimizer.ema_decay=0.9",
            "output.weights=ema",
        ),
    ],
)
def test_policies_change_no_bit(overrides: Sequence[str], make_config: MakeConfig) -> None:
    config = make_config({"train.steps": 2, "data.check": "first"})
    plain = [text for text in overrides if text.startswith(("optimizer.", "output."))]
    records, params, _ = trained(config, *plain)
    other_records, other, said = trained(config, *overrides)
    assert [r["loss"] for r in records] == [r["loss"] for r in other_records]
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(params), tree.leaves(other), strict=True))
    assert any(note.startswith(("remat", "offload")) for note in said)


def test_bfloat16_with_and_without_rules(make_config: MakeConfig) -> None:
    """Weights of norms are ones at first, so the rules tell from the second step on."""
    config = make_config({"train.steps": 3, "data.check": "first"})
    want = trained(config)[0]
    last = []
    for rules in ("null", "{}", "{'.*norm/weight': float32}"):
        records, _, said = trained(config, "layout.compute_dtype=bfloat16", f"layout.compute_rules={rules}")
        assert all(0 < abs(r["loss"] - w["loss"]) < 0.05 for r, w in zip(records, want, strict=True))
        assert any("compute torch.bfloat16" in note for note in said)
        last.append(records[-1]["loss"])
    assert len(set(last)) == 3


def test_policies_of_stacks() -> None:
    assert len(build_remat(LayoutSection(remat="full"))) == 1
    assert len(build_remat(LayoutSection(remat="full", remat_vision="none"))) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"remat_layers": 2}, "remat_layers has no effect with remat 'none'"),
        ({"remat": "full", "remat_layers": 2}, "remat_layers has no effect with remat 'full'"),
        ({"remat": "uniform", "remat_every": 2}, "remat_every has no effect with remat 'uniform'"),
        ({"remat": "full", "remat_vision_every": 2}, "remat_vision_every has no effect with remat_vision None"),
        (
            {"remat_vision": "block", "remat_vision_save": ["matmul"]},
            "remat_vision_save has no effect with remat_vision",
        ),
        ({"offload": ["params"]}, "Input should be 'activations' or 'optimizer'"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayoutSection(**settings)
