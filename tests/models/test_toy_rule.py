"""The toy family's bias, which no gradient trains: its rule, on every layout, and what a rule is refused for."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfn
from mmfn import models, ops, tree
from mmfn.ops.route import RouteConfig
from mmfn.parallel.context.token_order import segment_multiple
from mmfn.parallel.mesh.layout import Layout, Mesh, single_mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.parallel.program import Program, Transform, pipe
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.expert_parallel import expert_parallel
from mmfn.parallel.transforms.remat import remat
from mmfn.parallel.weights.sharding import shard_params, whole_params
from mmfn.spec import freeze
from mmfn.train.optim import adamw
from mmfn.train.schedule import schedule
from mmfn.train.step import init_state, make_step
from tests.batches import packed, wide, with_inputs
from tests.parallel.conformance import Cell, batch_of, spread
from tests.tiny import model_of, random_samples

BIAS = "text/layers/1/moe/router/choice_bias"
NUM_STEPS, BAD = 4, 2
LAYOUTS: dict[str, tuple[Layout, tuple[Transform, ...], str]] = {
    "dp": (Layout(dp=3), (data_parallel(),), ""),
    "hsdp": (Layout(replicate=2, dp=2), (data_parallel(), remat("full")), ""),
    "ep": (Layout(dp=4, ep=4), (data_parallel(), expert_parallel()), ""),
    "ring, ep": (Layout(dp=2, cp=2, ep=2), (data_parallel(), expert_parallel(), spread("ring", "toy")), "ring"),
    "ulysses": (Layout(cp=2, ulysses=2), (data_parallel(), spread("ulysses", "toy")), "ulysses"),
}


def biases(mesh: Mesh, transforms: Sequence[Transform], kind: str) -> tuple[list[Tensor], list[float]]:
    """The bias after every step and the losses; a step reads what is no number."""
    model = model_of("toy")
    program = pipe(Program.of(model.family.specs(model.cfg), mesh=mesh), *transforms)
    params = tree.map(torch.clone, model.params)
    params = shard_params(params, program.specs, mesh) if mesh.layout.world > 1 else params
    rate = schedule("constant", peak=1e-3, num_steps=1)
    step = make_step(model.family, model.cfg, program, "per_token_loss", adamw(eps=1e-3), schedule=rate)
    state = init_state(params, adamw(eps=1e-3), program.specs)
    pack = {"segment_multiple": segment_multiple(kind, mesh.layout)} if kind else {}
    cell = Cell(layout=mesh.layout, name="", transforms=(), family="toy", pack=pack)
    batch = program.split(batch_of(cell, mesh["batch"].index, mesh["batch"].size))
    bad = with_inputs(batch, lambda x: x * torch.nan)
    found, losses = [], []
    for number in range(NUM_STEPS):
        state, metrics = step(state, [bad if number == BAD else batch] * 2)
        assert metrics["skipped"] == (number == BAD)
        assert not [name for name in metrics if "counts" in name]
        found.append(dict(tree.items(whole_params(state["params"], mesh)))[BIAS].clone())
        losses.append(float(metrics["loss"]))
    return found, losses


def test_the_bias_follows_its_rule_and_stands_still_in_a_skipped_step() -> None:
    """Against the experts that the router was seen to choose for real tokens, padding beside them."""
    model = model_of("toy")
    cell = Cell(layout=Layout(), name="", transforms=(), family="toy")
    batch, seen = batch_of(cell), []
    table = ops.portable()

    def route(logits_TE: Tensor, cfg: RouteConfig, bias_E: Tensor | None) -> Any:
        weights_TX, experts_TX, probs_TE = table.route(logits_TE, cfg, bias_E)
        seen.append(experts_TX[batch.segment_T < batch.num_segments])
        return weights_TX, experts_TX, probs_TE

    model.family.apply(model.params, batch, model.cfg, replace(table, route=route))
    (experts_RX,) = seen
    assert experts_RX.shape[0] < batch.tokens_T.numel(), "some are padding"
    counts_E = experts_RX.flatten().bincount(minlength=8).float()
    before = dict(tree.items(model.params))[BIAS]
    found, _ = biases(single_mesh(), (), "")
    assert before.dtype == found[0].dtype == torch.float64
    moves = [0.01 if n < counts_E.mean() else -0.01 if n > counts_E.mean() else 0.0 for n in counts_E.tolist()]
    assert {-0.01, 0.01} <= set(moves)
    torch.testing.assert_close(found[0] - before, torch.tensor(moves).double(), rtol=0, atol=1e-7)
    assert not torch.equal(found[1], found[0])
    assert torch.equal(found[BAD], found[BAD - 1])
    assert not torch.equal(found[BAD + 1], found[BAD])


@pytest.mark.parametrize("name", LAYOUTS)
def test_steps_on_a_layout_are_those_of_one_device(name: str) -> None:
    """The bias bit by bit: a rule sees counts of all tokens, which are whole numbers."""
    layout, transforms, kind = LAYOUTS[name]
    expected, losses = biases(single_mesh(), (), "")
    for found, own in virtual(layout, lambda mesh: biases(mesh, transforms, kind)):
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
        assert own == pytest.approx(losses, rel=1e-9, nan_ok=True)


def one_step(model: mmfn.Model, specs: Any) -> Any:
    """The bias behind a step."""
    rate = schedule("constant", peak=1e-3, num_steps=1)
    step = make_step(model.family, model.cfg, Program.of(specs), "per_token_loss", adamw(), schedule=rate)
    state = init_state(tree.map(torch.clone, model.params), adamw(), specs)
    state, _ = step(state, [wide(packed(model, random_samples(model, seed=3, num=2)))])
    return dict(tree.items(state["params"]))[BIAS]


def with_family(model: mmfn.Model, **fields: Any) -> mmfn.Model:
    return replace(model, family=replace(model.family, **fields))


@pytest.mark.parametrize("shape", [(4,), (1,), (), (9,), (8, 1)])
def test_a_change_that_has_not_the_shape_of_its_leaf_is_refused(shape: tuple[int, ...]) -> None:
    model = with_family(model_of("toy"), rules=lambda cfg: {"loads": lambda counts_E: counts_E.new_zeros(shape)})
    message = rf"rule of parameter '{BIAS}' gave a change of shape {re.escape(str(list(shape)))} for one of shape \[8\]"
    with pytest.raises(ValueError, match=message):
        one_step(model, model.family.specs(model.cfg))


def test_counts_are_of_leaves_and_those_of_a_frozen_one_are_ignored() -> None:
    model = model_of("toy")
    specs, before = model.family.specs(model.cfg), dict(tree.items(model.params))[BIAS]
    assert not torch.equal(one_step(model, specs), before)
    assert torch.equal(one_step(model, freeze(specs, [BIAS])), before)

    def apply(*args: Any, **given: Any) -> models.Output:
        out = model.family.apply(*args, **given)
        return replace(out, counts={**out.counts, "text/layers/1/moe/router/bais": out.counts[BIAS]})

    message = (
        "family 'toy' counted for 'text/layers/1/moe/router/bais', which is no parameter; correct its Output.counts"
    )
    with pytest.raises(ValueError, match=message):
        one_step(with_family(model, apply=apply), specs)
    with pytest.raises(ValueError, match=f"parameter '{BIAS}' is updated by a rule but the model counted nothing"):
        one_step(
            with_family(model, apply=lambda *args, **given: replace(model.family.apply(*args, **given), counts={})),
            specs,
        )
