"""The settings of sections `objective` and `layout.head` in runs from a config."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfn.parallel.mesh.launch import Place
from mmfn.parallel.mesh.layout import Mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.train.build.run import prepare
from mmfn.train.config.load import load_config
from mmfn.train.run import loop

MakeConfig = Callable[..., Path]
SPECIAL = ("objective.name=square_loss", "objective.z_loss=1e-3", "objective.label_smoothing=0.1")
SMALL = ("data.token_buckets=[64, 128]", "data.tower_buckets={vision: [64]}", "train.steps=2")  # several micro-batches


def records(config: Path, *overrides: str) -> list[dict[str, Any]]:
    """Those of the first rank, all ranks in one process."""
    loaded = load_config(config, overrides)

    def rank(mesh: Mesh) -> list[dict[str, Any]]:
        run = prepare(loaded, lambda text: None, Place(device=torch.device("cpu"), mesh=mesh, host=mesh))
        found: list[dict[str, Any]] = []
        loop.train(run, found.append)
        return found

    return virtual(loaded.config.layout.sizes, rank)[0]


def losses(found: list[dict[str, Any]]) -> list[float]:
    return [r[name] for r in found for name in ("loss", "ce", "grad_norm")]


def test_the_logged_loss_is_what_is_minimised_and_ce_stands_beside_it(make_config: MakeConfig) -> None:
    found = records(make_config(), *SPECIAL, "train.steps=2")
    assert all(r["loss"] > r["ce"] > 0 for r in found)
    plain = records(make_config(), "objective.name=square_loss", "train.steps=2")
    assert all("ce" not in r for r in plain)
    assert plain[0]["loss"] == pytest.approx(found[0]["ce"], rel=1e-6)


def test_chunks_and_a_sharded_head_change_nothing(make_config: MakeConfig) -> None:
    config = make_config()
    expected = records(config, *SPECIAL, *SMALL, "layout.dp=2")
    for settings in (
        ("objective.chunk_size=5",),
        ("objective.total_chunk_size=5",),
        ("layout.head=sharded",),
        ("layout.head=sharded", "objective.chunk_size=5"),
    ):
        found = records(config, *SPECIAL, *SMALL, "layout.dp=2", *settings)
        assert losses(found) == pytest.approx(losses(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("layout.dp=2", "layout.head=sharded", "train.compile=step"), "a step with a sharded head is no single graph"),
        (("objective.label_smoothing=1.5",), "objective.label_smoothing is 1.5"),
        (("objective.z_loss=-1",), "objective.z_loss is -1"),
        (("objective.chunk_size=0",), "objective.chunk_size is 0"),
        (
            ("objective.chunk_size=8", "objective.total_chunk_size=8"),
            "chunk_size and objective.total_chunk_size are both set",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    make_config: MakeConfig, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(make_config(), overrides)
