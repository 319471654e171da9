"""What only the toy family has: a second head, experts stored one by one, nothing private. Its bias: `test_toy_rule`.

That it trains on every layout as on one device is part of the matrices, of which it is a column (`tests.tiny`).
"""

import ast
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mmfn
from mmfn import lora, models, ops, tree
from mmfn.batch import IGNORE, Batch, Sample
from mmfn.interop.checkpoint import open_weights
from mmfn.parallel.program import Program
from mmfn.train.build.model import stacks_of
from mmfn.train.objective import Objective, loss, loss_terms
from mmfn.train.optim import adamw
from mmfn.train.schedule import schedule
from mmfn.train.step import make_step
from tests.batches import packed, wide
from tests.models import toy_family
from tests.tiny import model_of, random_samples


@pytest.fixture
def is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The family among those of mmfn, for the time of a test."""
    monkeypatch.setitem(models.FAMILIES, "toy", toy_family.__name__)


def test_it_is_short_and_uses_nothing_private() -> None:
    path = Path(toy_family.__file__)
    assert len(path.read_text().splitlines()) < 280  # 245, and 30 that say what its stages compute
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


# ---- the second head


def formula(model: mmfn.Model, rows: Sequence[Sample], batch: Batch) -> float:
    """The mean cross entropy of next tokens, 0.3 of the sum for those behind them over the same number, 0.1 of the
    balancing loss; tokens are looked up in the samples."""
    out = model.family.apply(model.params, batch, model.cfg, ops.reference())
    weight_VD = model.family.head(model.params, model.cfg, ops.reference())
    sums, count, start = [0.0, 0.0], 0, 0
    for row in rows:
        for head, hidden_TD in enumerate((out.hidden_TD, out.ahead[0]())):
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
    with pytest.raises(
        ValueError, match=r"weight for loss 'aux_los' but this model of family 'toy' has ce_ahead_1, aux_loss; use"
    ):
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
