"""What is frozen: no gradient, no optimizer state, no reduction, no activations; what is trained moves as before."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfn
from mmfn import rng, tree
from mmfn.lora import add_adapters, lora, merge
from mmfn.models import FAMILIES
from mmfn.parallel.planning import devices
from mmfn.parallel.planning.trace import BACKWARD, FORWARD
from mmfn.parallel.program import Program, Transform, pipe
from mmfn.parallel.transforms.compiled import compiled
from mmfn.parallel.transforms.remat import remat
from mmfn.spec import freeze, trained_paths
from mmfn.train.optim import adamw
from mmfn.train.planning import step_plan, step_trace
from mmfn.train.schedule import schedule
from mmfn.train.step import State, init_state, make_step
from tests import oracles
from tests.parallel.plan_cases import make

# torch's compiler reads `.grad` of non-leaf inputs and hides the warning by a means that "error" defeats
QUIET_DYNAMO = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
RATE = schedule("constant", peak=1e-2, num_steps=1)
TARGETS = (r"text/layers/\d+/attention/(q|o)", r"vision/merger/up")


def model_of(family: str) -> Any:
    model = mmfn.init(oracles.to_dict(oracles.config(family=family, tie_word_embeddings=False)), seed=0)
    return replace(model, params=tree.map(lambda x: 5 * x if x.ndim > 1 else x, model.params))


def batches(model: Any, num: int = 1) -> list[Any]:
    config = oracles.config(family=model.family.name)
    out = []
    for seed in range(num):
        inputs = oracles.inputs(config, seed)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        out.append(mmfn.batch_from_hf({**inputs, "labels": labels}, model))
    return out


def run(model: Any, specs: Any, *transforms: Transform, num: int = 1, params: Any = None) -> tuple[State, Any]:
    """One step; with beta1 = 0 the first moment is the gradient."""
    program = pipe(Program.of(specs), *transforms)
    optimizer = adamw(betas=(0.0, 0.9), weight_decay=0.1)
    step = make_step(model.family, model.cfg, program, "per_token_loss", optimizer, schedule=RATE)
    return step(init_state(tree.map(torch.clone, params or model.params), optimizer, specs), batches(model, num))


def with_adapters(model: Any, **settings: Any) -> tuple[Any, Any]:
    """Specs and parameters with adapters that matter."""
    specs = lora(model.family.specs(model.cfg), **({"rank": 2, "alpha": 2.0, "targets": TARGETS} | settings))

    def draw(path: str, leaf: Tensor) -> Tensor:
        return 0.2 * torch.randn(leaf.shape, generator=rng.generator(0, path)) if "/lora/" in path else leaf

    return specs, tree.map_with_path(draw, add_adapters(model.params, specs, 0))


@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("part", ["vision_encoder", "vision_projector", "text_decoder", "lm_head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_part(family: str, part: str, num: int) -> None:
    """The rest gets the gradients of a step that trains everything."""
    model = model_of(family)
    plain = model.family.specs(model.cfg)
    specs = freeze(plain, [model.family.parts(model.cfg)[part]])
    trained = trained_paths(specs)
    (state, metrics), (full, _) = run(model, specs, num=num), run(model, plain, num=num)
    assert state["opt"]["m"].keys() == state["opt"]["v"].keys() == set(trained) < set(tree.paths(plain))
    squares = 0.0
    for path, grad in state["opt"]["m"].items():
        torch.testing.assert_close(grad, full["opt"]["m"][path], rtol=1e-5, atol=1e-7)
        squares += float(grad.double().square().sum())
    assert float(metrics["grad_norm"]) == pytest.approx(squares**0.5, rel=1e-5)
    for (path, new), old, all_new in zip(
        tree.items(state["params"]), tree.leaves(model.params), tree.leaves(full["params"]), strict=True
    ):
        if path in trained:
            torch.testing.assert_close(new, all_new, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(new, old), path


LAYER = compiled("layer", backend="aot_eager")


@QUIET_DYNAMO
@pytest.mark.parametrize(
    ("family", "transforms"),
    [
        pytest.param("qwen3_vl", (remat("full"),), id="remat"),
        pytest.param("qwen3_vl", (LAYER,), id="layer"),
        pytest.param("qwen3_vl_moe", (remat("full"), LAYER), id="experts, remat, layer"),
        pytest.param("qwen3_vl", (compiled("step", backend="aot_eager"),), id="step", marks=pytest.mark.slow),
    ],
)
def test_adapters_under_transforms(family: str, transforms: tuple[Transform, ...]) -> None:
    model = model_of(family)
    specs, params = with_adapters(model, targets=TARGETS + ((r".*experts/.*",) if "moe" in family else ()))
    (want, expected), (got, metrics) = (run(model, specs, *ts, params=params) for ts in ((), transforms))
    assert got["opt"]["m"].keys() == want["opt"]["m"].keys() == set(trained_paths(specs))
    torch.testing.assert_close(metrics["loss"], expected["loss"])
    for name in ("params", "opt"):
        for (path, x), y in zip(tree.items(got[name]), tree.leaves(want[name]), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6, msg=lambda m, p=path: f"{p}: {m}")


def test_adapters_learn_what_their_merge_keeps() -> None:
    """Some steps on one batch lower its loss; base weights are bitwise what they were; merged, the loss is the same."""
    model = model_of("qwen3_vl")
    specs, params = with_adapters(model)
    optimizer = adamw()
    step = make_step(model.family, model.cfg, Program.of(specs), "per_token_loss", optimizer, schedule=RATE)
    state, losses = init_state(tree.map(torch.clone, params), optimizer, specs), []
    for _ in range(20):
        state, metrics = step(state, batches(model))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    trained = set(trained_paths(specs))
    for (path, new), old in zip(tree.items(state["params"]), tree.leaves(params), strict=True):
        assert torch.equal(new, old) == (path not in trained), path
    (batch,) = batches(model)
    values = [mmfn.loss(p, batch, model)[0] for p in (state["params"], merge(state["params"]))]
    torch.testing.assert_close(*values)


def test_a_frozen_tower_keeps_nothing_and_has_no_backward() -> None:
    """Blocks 0 and 1 are the tower's; their backward, and the memory they keep for it, are gone."""
    setup, layout = make(side=8)
    frozen, _ = make(side=8, trained="decoder")
    all_, some = (step_trace.trace_step(s, layout, 2) for s in (setup, frozen))

    def blocks(trace: Any, phase: str) -> set[int]:
        return {index for where, _, index in trace.peaks if where == phase}

    assert blocks(all_, FORWARD) == blocks(some, FORWARD)
    assert {0, 1} <= blocks(all_, BACKWARD)
    assert not {0, 1} & blocks(some, BACKWARD)
    assert {2, 3} <= blocks(some, BACKWARD)
    ends = [trace.peaks[FORWARD, 0, 2].parts for trace in (all_, some)]  # behind the tower
    assert ends[1]["activations"] < 0.35 * ends[0]["activations"]
    assert some.peak.total < all_.peak.total


def test_the_plan_of_adapters() -> None:
    """Gradients and optimizer state are of the adapters alone, and so is what is reduced over ranks."""
    sent = {}
    for trained in ("all", "lora of all"):
        setup, layout = make(trained=trained, dp=2)
        trace = step_trace.trace_step(setup, layout, 2)
        sent[trained] = sum(n for key, n in trace.sent_bytes.items() if key.site == "gradients")
    setup, layout = make(trained="lora of all", dp=2)
    found = step_plan.plan(setup, layout, devices.device("cpu"), all_layers=True)
    trained = [leaf for leaf in found.leaves if "/lora/" in leaf.path or leaf.path == "text/norm/weight"]
    assert all(leaf.optimizer_bytes == 2 * leaf.gradient_bytes == 2 * leaf.parameter_bytes for leaf in trained)
    assert not any(leaf.gradient_bytes or leaf.optimizer_bytes for leaf in found.leaves if leaf not in trained)
    assert sent["lora of all"] == 2 * sum(leaf.gradient_bytes for leaf in trained) < 0.1 * sent["all"]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ([r"text/nrom/weight"], "matches none of"),
        ([r"text/.*", r"(vision|head)/.*"], "leaves no parameter to train"),
    ],
)
def test_what_cannot_be_frozen(patterns: list[str], message: str) -> None:
    model = model_of("qwen3_vl")
    with pytest.raises(ValueError, match=message):
        freeze(model.family.specs(model.cfg), patterns)
