"""Generation and losses on shards: the rows of one device, whatever the layout, and no rank holds the model whole."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfn import tree
from mmfn.batch import IGNORE
from mmfn.model import Model
from mmfn.parallel.mesh.launch import Place
from mmfn.parallel.mesh.layout import Layout, Mesh
from mmfn.parallel.mesh.virtual import World, run_virtual
from mmfn.parallel.planning.alike import recording_mesh
from mmfn.parallel.weights.sharding import shard_params
from mmfn.train.build.forward import build_forward
from mmfn.train.forward import Forward
from mmfn.train.generate import generate
from mmfn.train.sampling import Sampling
from tests import tiny
from tests.parallel.allocated import peak_of
from tests.train.shard_cases import config_of

CPU = torch.device("cpu")
LAYOUTS = {
    "dp": {"dp": 3},
    "hsdp": {"replicate": 2, "dp": 2},
    "cp": {"cp": 2, "kind": "ulysses"},
    "dp x cp": {"dp": 2, "cp": 2},
    "ep": {"dp": 2, "ep": 2},
    "dp x ep": {"dp": 4, "ep": 2},
    "cp x ep": {"dp": 2, "cp": 2, "ep": 4},
}
CASES = [
    (name, layout)
    for name in tiny.TINY
    for layout in LAYOUTS
    if "ep" not in LAYOUTS[layout] or (tiny.has_experts(name) and layout != "dp x ep")
]
DRAWN = Sampling(temperature=1.5, top_k=20, top_p=0.9, repetition_penalty=1.3, seed=3)


def on_layout(model: Model, sizes: dict[str, Any], work: Callable[[Forward], Any]) -> World:
    """`work` on every rank, with its shards of the model."""
    config = config_of("unused", layout=sizes)
    specs = model.family.specs(model.cfg)

    def rank(mesh: Mesh) -> Any:
        own = replace(model, params=shard_params(model.params, specs, mesh))
        return work(build_forward(config, own, Place(device=CPU, mesh=mesh, host=mesh), specs))

    return run_virtual(config.layout.sizes, rank)


@pytest.mark.parametrize(("name", "layout"), CASES, ids=map(", ".join, CASES))
def test_rows_on_shards_are_those_of_one_device(name: str, layout: str) -> None:
    """Rows end at different steps on different ranks, one rank has none, and what is drawn follows the row."""
    model = tiny.model_of(name)
    size = Layout(**{k: v for k, v in LAYOUTS[layout].items() if k != "kind"}).world
    prompts = tiny.random_samples(model, seed=4, num=2 * size - 2)
    alone = Forward.of(model)
    settings: dict[str, Any] = {"eos_token_ids": range(10), "sampling": DRAWN}
    expected = generate(alone, alone.pack(prompts), 12, **settings)
    assert len({len(row) for row in expected}) > 1

    def work(forward: Forward) -> Any:
        own = list(range(len(prompts)))[forward.axis.index :: forward.axis.size]
        if forward.axis.index == forward.axis.size - 1:
            own = []
        mine = [prompts[i] for i in own]
        rows = generate(forward, forward.pack(mine), 12, rows=own or None, is_idle=not own, **settings)
        return dict(zip(own, rows, strict=False)), forward.loss_sums(mine, own)

    world = on_layout(model, LAYOUTS[layout], work)
    losses = alone.loss_sums(prompts, range(len(prompts)))
    for rows, sums in world.results:
        for i, row in rows.items():
            assert row == expected[i]
            assert sums[i] == (pytest.approx(losses[i][0], rel=1e-12), losses[i][1])
    kinds = [[(c.axis, c.name, c.site) for c in calls] for calls in world.calls]
    assert all(calls == kinds[0] for calls in kinds)


def test_memory_does_not_grow_with_the_blocks() -> None:
    """Their weights come and go: eight more take less than one of them, which is for their caches."""
    peaks = {}
    for depth in (3, 11):
        model = tiny.model_of("dense", depth)
        config, specs = config_of("unused", layout={"dp": 4}), model.family.specs(model.cfg)
        mesh = recording_mesh(config.layout.sizes, 0)
        own = replace(model, params=shard_params(model.params, specs, mesh))
        forward = build_forward(config, own, Place(device=CPU, mesh=mesh, host=mesh), specs)
        batch = forward.pack([tiny.sample(model.family, model.cfg, 0, [])])
        run = partial(generate, forward, batch, 3, check_finite=False)
        run()  # plans are made once
        peaks[depth] = peak_of(run)
    block = sum(leaf.numel for leaf in tree.leaves(specs["text"]["layers"][0])) * 8
    assert 0 < peaks[11] - peaks[3] < block


def test_losses_by_key_add_up_to_the_loss_of_torch() -> None:
    model = tiny.model_of("dense")
    samples, forward = tiny.random_samples(model, seed=1, num=5), Forward.of(model)
    found = forward.loss_sums(samples, ["a", "b", "a", "c", "b"])
    for key, places in {"a": (0, 2), "b": (1, 4), "c": (3,)}.items():
        expected, count = 0.0, 0
        for place in places:
            batch = forward.pack([samples[place]])
            logits_TV = forward.logits(forward(batch).hidden_TD)
            expected += cross_entropy(logits_TV, batch.labels_T)
            count += int((batch.labels_T != IGNORE).sum())
        assert found[key] == (pytest.approx(expected, rel=1e-10), count)


def cross_entropy(logits_TV: Tensor, labels_T: Tensor) -> float:
    return torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum", ignore_index=IGNORE).item()
