"""What only the toy family has: a bias without a gradient, a second head, experts stored one by one, nothing private.

That it trains on every layout as on one device is part of the matrices, of which it is a column (`tests.tiny`).
"""

import ast
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mmfn
from mmfn import lora, models, ops, tree
from mmfn.batch import IGNORE, Batch, Sample
from mmfn.interop.checkpoint import open_weights
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
from mmfn.train.build.model import stacks_of
from mmfn.train.objective import Objective, loss, loss_terms
from mmfn.train.optim import adamw
from mmfn.train.schedule import schedule
from mmfn.train.step import init_state, make_step
from tests.batches import packed, wide, with_inputs
from tests.models import toy_family
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


@pytest.fixture
def is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The family among those of mmfn, for the time of a test."""
    monkeypatch.setitem(models.FAMILIES, "toy", toy_family.__name__)


def test_it_is_short_and_uses_nothing_private() -> None:
    path = Path(toy_family.__file__)
    assert len(path.read_text().splitlines()) < 250
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [node.attr for node in nodes if isinstance(node, ast.Attribute)]
    names += [alias.name for node in nodes if isinstance(node, ast.ImportFrom | ast.Import) for alias in node.names]
    assert [name for name in names if name.startswith("_")] == []


def test_stacks_are_what_its_parameters_say() -> None:
    """A family declares blocks once: planning reads from the same tree as the program that computes them again."""
    model = model_of("toy")
    counted = model.family.stacks(model.cfg)
    assert counted == {"vision": 2, "audio": 2, "text": 2}
    assert list(counted) == ["vision", "audio", "text"] == list(stacks_of(model.family.specs(model.cfg)))
    assert model.family.stacks(model.family.at_depth(model.cfg, 1))["text"] == 1


# ---- the bias that no gradient trains


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
    assert before.dtype == found[0].dtype == torch.float32
    moves = [0.01 if n < counts_E.mean() else -0.01 if n > counts_E.mean() else 0.0 for n in counts_E.tolist()]
    assert {-0.01, 0.01} <= set(moves)
    torch.testing.assert_close(found[0] - before, torch.tensor(moves), rtol=0, atol=1e-7)
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


# ---- the second head


def formula(model: mmfn.Model, rows: Sequence[Sample], batch: Batch) -> float:
    """The mean cross entropy of next tokens, 0.3 of the sum for those behind them over the same number, 0.1 of the
    balancing loss; tokens are looked up in the samples."""
    out = model.family.apply(model.params, batch, model.cfg, ops.reference())
    weight_VD = model.family.head(model.params, model.cfg, ops.reference())
    sums, count, start = [0.0, 0.0], 0, 0
    for row in rows:
        for head, hidden_TD in enumerate((out.hidden_TD, out.ahead[0].hidden_TD)):
            log_probs_TV = (hidden_TD @ weight_VD.T).log_softmax(-1)
            for t in range(row.tokens_T.numel() - 1 - head):
                label = int(row.labels_T[t + 1 + head])
                if label != IGNORE:
                    sums[head] -= float(log_probs_TV[start + t, label])
                    count += head == 0
        start += row.tokens_T.numel()
    return (sums[0] + 0.3 * sums[1]) / count + 0.1 * float(out.losses["aux_loss"]())


def test_the_loss_of_both_heads_is_the_formula() -> None:
    model = model_of("toy")
    rows = random_samples(model, seed=3, num=4)
    batch = wide(packed(model, rows))
    value, metrics = loss(model.params, batch, model)
    assert float(value) == pytest.approx(formula(model, rows, batch), rel=1e-12)
    assert set(metrics) >= {"ce", "ce_ahead_1", "aux_loss", "dropped"}
    assert loss_terms(Objective(), model.family, model.cfg) == ("ce", "ce_ahead_1", "aux_loss")
    assert float(metrics["ce_ahead_1"]) > 0


def test_a_further_loss_weighs_what_the_objective_says() -> None:
    """In place of the family's 0.1; of weight 0 it is not computed: ranks sum nothing for it."""
    model = model_of("toy")
    batch = wide(packed(model, random_samples(model, seed=3, num=4)))
    sums: list[Tensor] = []

    def psum(x: Tensor) -> Tensor:
        sums.append(x)
        return x

    table = replace(ops.portable(), psum=psum)
    found = {}
    for weight in (None, 0.0, 2.0):
        objective = Objective(loss_weights={} if weight is None else {"aux_loss": weight})
        found[weight] = loss(model.params, batch, model, objective=objective, ops=table)
        assert len(sums) == (weight != 0), weight
        sums.clear()
    (whole, metrics), (without, others), (heavy, _) = found.values()
    aux_loss = float(metrics["aux_loss"])
    assert aux_loss > 1
    assert "aux_loss" not in others
    assert float(whole - without) == pytest.approx(0.1 * aux_loss, rel=1e-9)
    assert float(heavy - without) == pytest.approx(2.0 * aux_loss, rel=1e-9)


def test_a_weight_of_no_loss_is_refused_when_a_step_is_built() -> None:
    model = model_of("toy")
    objective = Objective(loss_weights={"aux_los": 1.0})
    program, rate = Program.of(model.family.specs(model.cfg)), schedule("constant", peak=1e-3, num_steps=1)
    with pytest.raises(ValueError, match=r"weight for loss 'aux_los' but this model of family 'toy' has aux_loss; use"):
        make_step(model.family, model.cfg, program, objective, adamw(), schedule=rate)
    silent = replace(model.family, loss_weights=models.no_losses)
    with pytest.raises(ValueError, match="family 'toy' gives a loss 'aux_loss' without a weight; add it to its"):
        loss(model.params, packed(model, random_samples(model, seed=3, num=1)), replace(model, family=silent))
    with pytest.raises(ValueError, match=r"loss_weights\['aux_loss'\] is -1 but must be a finite number"):
        Objective(loss_weights={"aux_loss": -1})


def test_packed_is_separate() -> None:
    model = model_of("toy")
    rows = random_samples(model, seed=5, num=5)
    assert any(row.images for row in rows)
    assert any(row.audios for row in rows)
    whole_TV = mmfn.logits(model, wide(packed(model, rows, tokens=300, segments=7, segment_multiple=4)))
    alone = [mmfn.logits(model, wide(packed(model, [row], segment_multiple=4))) for row in rows]
    lengths = [row.tokens_T.numel() for row in rows]
    starts = [sum(-(-n // 4) * 4 for n in lengths[:i]) for i in range(len(rows))]
    for start, n, own_TV in zip(starts, lengths, alone, strict=True):
        torch.testing.assert_close(whole_TV[start : start + n], own_TV[:n], rtol=1e-11, atol=1e-11)


# ---- its checkpoints


@pytest.mark.usefixtures("is_known")
def test_a_checkpoint_has_one_tensor_an_expert_and_comes_back(tmp_path: Path) -> None:
    model = mmfn.init({"model_type": "toy"}, seed=1, dtype=torch.bfloat16)
    leaves = dict(tree.items(model.params))
    mmfn.save_hf(tmp_path / "a", model)
    stored = load_file(tmp_path / "a" / "model.safetensors")
    gate_up_EFD = leaves["text/layers/1/moe/experts/gate_up"]
    for e in range(8):
        one = f"model.blocks.1.experts.{e}"
        assert torch.equal(stored[f"{one}.gate.weight"], gate_up_EFD[e, :6])
        assert torch.equal(stored[f"{one}.up.weight"], gate_up_EFD[e, 6:])
        assert torch.equal(stored[f"{one}.down.weight"], leaves["text/layers/1/moe/experts/down"][e])
    assert stored["model.blocks.1.moe.router.choice_bias"].dtype == torch.float32
    assert stored["model.embed.weight"].dtype == torch.bfloat16

    extra = {"talker.weight": torch.arange(5.0), "model.rotary.inv_freq": torch.ones(2)}
    save_file(stored | extra, tmp_path / "a" / "model.safetensors")
    again = mmfn.load_hf(tmp_path / "a")
    assert all(torch.equal(x, leaves[path]) and x.dtype == leaves[path].dtype for path, x in tree.items(again.params))
    mmfn.save_hf(tmp_path / "b", again, assets=tmp_path / "a")
    index = tmp_path / "b" / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values())
    copied = {name: x for file in files for name, x in load_file(tmp_path / "b" / file).items()}
    assert copied.keys() == stored.keys() | {"talker.weight"}
    assert torch.equal(copied["talker.weight"], extra["talker.weight"])


@pytest.mark.usefixtures("is_known")
def test_a_rank_reads_its_experts_alone(tmp_path: Path) -> None:
    model = mmfn.init({"model_type": "toy"}, seed=1)
    mmfn.save_hf(tmp_path / "a", model)
    path, specs = "text/layers/1/moe/experts/gate_up", model.family.specs(model.cfg)
    with open_weights(tmp_path / "a", specs, model.family.key_map(model.cfg)) as weights:
        part = weights.read_slice(path, ((2, 5), (0, 12), (3, 16)))
    assert torch.equal(part, dict(tree.items(model.params))[path][2:5, :, 3:])


@pytest.mark.usefixtures("is_known")
def test_its_default_adapters_are_merged_into_a_plain_checkpoint(tmp_path: Path) -> None:
    model = mmfn.init({"model_type": "toy"}, seed=1)
    specs = lora.lora(model.family.specs(model.cfg), rank=2, alpha=2.0, targets=model.family.lora_targets)
    adapted = lora.add_adapters(model.params, specs, 0)
    adapted = tree.map_with_path(lambda path, x: x + 0.1 if "/lora/" in path else x, adapted)
    assert sum("/lora/" in path for path in tree.paths(specs)) == 2 * 2 * 2  # blocks, q and v, a and b
    merged = replace(model, params=lora.merge(adapted))
    mmfn.save_hf(tmp_path / "a", merged)
    batch = packed(model, random_samples(model, seed=7, num=2))
    want_TV = mmfn.logits(replace(model, params=adapted), batch)
    torch.testing.assert_close(mmfn.logits(mmfn.load_hf(tmp_path / "a"), batch), want_TV, rtol=1e-4, atol=1e-5)
