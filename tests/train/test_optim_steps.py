"""Optimizers inside of real steps: on meshes, donated, and as a config names them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfn import tree
from mmfn.parallel.mesh.layout import Layout, Mesh, single_mesh
from mmfn.parallel.mesh.virtual import run_virtual
from mmfn.parallel.program import Program, pipe
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.expert_parallel import expert_parallel
from mmfn.parallel.weights.sharding import shard_params, whole_params
from mmfn.train import optim
from mmfn.train.build.run import Run, prepare
from mmfn.train.config.load import load_config
from mmfn.train.guard import Guard
from mmfn.train.planning import step_trace
from mmfn.train.run import loop
from mmfn.train.run.training import run_training
from mmfn.train.schedule import schedule
from mmfn.train.step import State, Step, init_state, make_step
from tests.parallel.conformance import Cell, batch_of
from tests.parallel.plan_cases import make
from tests.tiny import model_of

RATE = schedule("cosine", peak=1e-2, num_steps=20, warmup_steps=2)
GUARD = Guard(window=3, factor=50.0)


def muon(specs: Any) -> optim.Transform:
    """Everything that can be in a chain."""
    matrices = optim.muon(compute=torch.float64, adjust_lr="match_rms_adamw")
    inner = optim.chain(optim.with_others(matrices, optim.adamw(weight_decay=0.1), specs), optim.ema(0.9))
    slow = schedule("linear", peak=1e-3, num_steps=10)
    ruled = optim.by_path(inner, no_decay=[r".*norm/weight"], schedules=[("vision/.*", slow)], layer_decay=0.8)
    return optim.chain(optim.clip_by_global_norm(0.5), optim.master(ruled))


def sgd(specs: Any) -> optim.Transform:
    return optim.chain(optim.clip_by_global_norm(0.5), optim.sgd(momentum=0.9, nesterov=True, weight_decay=0.1))


def start(make: Callable[[Any], optim.Transform], mesh: Mesh, *, donate: bool = True) -> tuple[Step, State, Any]:
    cell = Cell(layout=mesh.layout, name="", transforms=(), family="moe", num_layers=2)
    model = model_of(cell.family, cell.num_layers)
    program = pipe(Program.of(model.family.specs(model.cfg), mesh=mesh), data_parallel(), expert_parallel())
    params, tx = tree.map(torch.clone, model.params), make(program.specs)
    if mesh.layout.world > 1:
        params = shard_params(params, program.specs, mesh)
    step = make_step(model.family, model.cfg, program, "per_token_loss", tx, schedule=RATE, guard=GUARD, donate=donate)
    batch = program.split(batch_of(cell, mesh["batch"].index, mesh["batch"].size))
    return step, init_state(params, tx, program.specs, GUARD), batch


def run(step: Step, state: State, batch: Any, num_steps: int) -> State:
    """Several steps, none of them skipped."""
    for _ in range(num_steps):
        state, metrics = step(state, [batch])
        assert int(metrics["skipped"]) == 0
    return state


def distance(a: Any, b: Any) -> float:
    pairs = zip(tree.leaves(a), tree.leaves(b), strict=True)
    return max((x.double() - y.double()).abs().max().item() for x, y in pairs if x.numel())


@pytest.mark.parametrize(
    "layout", [Layout(dp=3), Layout(replicate=2, dp=2), Layout(dp=4, ep=2), Layout(replicate=2, dp=2, ep=2)], ids=str
)
def test_steps_with_muon_on_a_mesh_are_those_of_one_device(layout: Layout) -> None:
    def trained(mesh: Mesh) -> tuple[Any, Any]:
        state = run(*start(muon, mesh), num_steps=2)
        averages = optim.ema_params(state)
        return whole_params(state["params"], mesh), whole_params(averages, mesh)

    expected = trained(single_mesh())
    world = run_virtual(layout, trained)
    for found in world.results:
        assert distance(found, expected) < 1e-10
    assert distance(expected[0], expected[1]) > 1e-4
    assert sum(call.site == "muon" for call in world.calls[0]) > 4
    calls = [[(c.axis, c.name, c.site, c.shape) for c in calls if c.site == "muon"] for calls in world.calls]
    assert all(other == calls[0] for other in calls)


@pytest.mark.parametrize("make", [muon, sgd])
def test_donation_changes_no_number(make: Callable[[Any], optim.Transform]) -> None:
    step, state, batch = start(make, single_mesh(), donate=False)
    before = tree.map(torch.clone, state)
    kept = run(step, state, batch, 2)
    assert distance(state, before) == 0
    step, given, batch = start(make, single_mesh())
    params = tree.leaves(given["params"])
    given = run(step, given, batch, 2)
    assert distance(given, kept) == 0
    assert all(a is b for a, b in zip(tree.leaves(given["params"]), params, strict=True))


# ---- from a config


def trained(config: Path, *overrides: str) -> tuple[list[dict[str, Any]], State, Run]:
    records: list[dict[str, Any]] = []
    run = prepare(load_config(config, overrides), say=lambda text: None)
    return records, loop.train(run, records.append), run


@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer.kind=muon", "optimizer.weight_decay=0.1", "optimizer.no_decay=['.*bias']"),
        ("optimizer.kind=sgd", "optimizer.nesterov=false"),
        ("optimizer.moments_dtype=bfloat16", "optimizer.layer_decay=0.5"),
        ("model.dtype=bfloat16", "optimizer.ema_decay=0.9", "output.weights=ema"),
    ],
)
def test_every_kind_trains(make_config: Callable[..., Path], overrides: tuple[str, ...]) -> None:
    records, state, _ = trained(make_config({"train.steps": 4}), *overrides, "optimizer.lr=3e-3")
    assert records[-1]["loss"] < records[0]["loss"]
    assert all(record["skipped"] == 0 for record in records)
    if "optimizer.ema_decay=0.9" in overrides:
        master = state["opt"][1]["master"]
        assert all(torch.equal(x.bfloat16(), dict(tree.items(state["params"]))[p]) for p, x in master.items())
        assert tree.leaves(optim.ema_params(state))[0].dtype == torch.bfloat16


def test_small_steps_of_bfloat16_parameters_are_kept_unless_it_is_said_otherwise(
    make_config: Callable[..., Path],
) -> None:
    config = make_config({"train.steps": 3})
    given = ("model.dtype=bfloat16", "optimizer.lr=1e-6")
    before = dict(tree.items(prepare(load_config(config, given), say=lambda text: None).model.params))
    _, kept, _ = trained(config, *given)
    _, lost, _ = trained(config, *given, "optimizer.master=false")
    assert "master" not in lost["opt"][1]
    weight = "text/layers/0/mlp/up/weight"
    moved, left = kept["opt"][1]["master"][weight], dict(tree.items(lost["params"]))[weight]
    assert (moved != before[weight].float()).float().mean() > 0.99
    assert (left != before[weight]).float().mean() < 0.01  # only numbers near 0


def test_rules_of_a_config_reach_single_parameters(make_config: Callable[..., Path]) -> None:
    config = make_config({"train.steps": 1, "optimizer.kind": "muon"})
    before = dict(tree.items(prepare(load_config(config), say=lambda text: None).model.params))
    _, plain, _ = trained(config)
    rules = (
        "optimizer.lr_scales={'text/embed/.*': 0, '.*norm/weight': 0.5}",
        "schedule.groups={'vision/.*': {lr: 1e-9}}",
    )
    _, ruled, _ = trained(config, *rules)
    usual, found = dict(tree.items(plain["params"])), dict(tree.items(ruled["params"]))
    assert torch.equal(found["text/embed/weight"], before["text/embed/weight"])
    torch.testing.assert_close(
        found["text/norm/weight"] - before["text/norm/weight"],
        0.5 * (usual["text/norm/weight"] - before["text/norm/weight"]),
        rtol=1e-3,
        atol=1e-7,
    )
    assert distance(found["vision/layers/0/mlp/up/weight"], before["vision/layers/0/mlp/up/weight"]) < 1e-7
    assert torch.equal(found["text/layers/0/mlp/up/weight"], usual["text/layers/0/mlp/up/weight"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("optimizer.momentum=0.9",), "momentum has no effect with kind 'adamw'"),
        (("optimizer.kind=sgd", "optimizer.eps=1e-6"), "eps has no effect with kind 'sgd'"),
        (("optimizer.kind=sgd", "optimizer.momentum=0"), "nesterov has no effect with momentum 0"),
        (("optimizer.kind=sgd", "optimizer.adjust_lr=original"), "adjust_lr has no effect with kind 'sgd'"),
        (("optimizer.master=true",), "optimizer.master has no effect with model.dtype 'float32'"),
        (("optimizer.master=false",), "optimizer.master has no effect with model.dtype 'float32'"),
        (("output.weights=ema",), "output.weights 'ema' needs averages; set optimizer.ema_decay"),
        (("train.spike_factor=3.0",), "spike_factor has no effect with spike_window 0"),
        (("schedule.groups={x: {lr: 1e-3}}",), "pattern 'x' matches none of"),
        (("optimizer.lr_scales={x: 1.0}",), "pattern 'x' matches none of"),
        (
            ("freeze.parts=[vision_encoder]", "optimizer.weight_decay=0.1", "optimizer.no_decay=['vision/layers/.*']"),
            r"'vision/layers/\.\*' matches only frozen parameters; remove it from optimizer.no_decay",
        ),
        (
            ("freeze.parts=[vision_encoder]", "optimizer.lr_scales={'vision/layers/.*': 0.1}"),
            r"'vision/layers/\.\*' matches only frozen parameters; remove it from optimizer.lr_scales",
        ),
        (
            ("schedule.groups={'.*': {lr: 1e-3, warmup_steps: 9}}",),
            r"schedule.groups '\.\*'.warmup_steps 9 must be below train.steps 4; shorten it",
        ),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(
    make_config: Callable[..., Path], overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(load_config(make_config(), overrides), say=lambda text: None)


def test_averages_are_what_is_saved_when_asked(make_config: Callable[..., Path], tmp_path: Path) -> None:
    import io

    import mmfn
    from mmfn.train.run.progress import Progress

    changes = {"train.steps": 2, "data.eval": None, "optimizer.ema_decay": 0.5, "output.weights": "ema"}
    config = make_config(changes)
    _, state, _ = trained(config)
    run = prepare(load_config(config), say=lambda text: None)
    run_training(run, Progress(num_steps=2, log_every=2, stream=io.StringIO()))
    saved = mmfn.load_hf(tmp_path / "run" / "checkpoint").params
    assert distance(saved, optim.ema_params(state)) == 0
    assert distance(saved, state["params"]) > 0


@pytest.mark.parametrize("layout", [(2, 1, 2), (4, 1, 2), (6, 1, 2), (1, 2, 2)], ids=str)
def test_an_update_copies_no_gradients(layout: tuple[int, int, int]) -> None:
    """Those of experts are cut along their second dim (over 3 ranks unevenly) and lie as their shards all the same."""
    dp, cp, ep = layout
    setup, mesh_layout = make(moe=True, dp=dp, cp=cp, ep=ep)
    for rank in range(mesh_layout.world):
        trace = step_trace.trace_step(setup, mesh_layout, 2, rank=rank)
        (update,) = [peak for mark, peak in trace.peaks.items() if mark[0] == "update"]
        assert update.parts["gradients"] > 10_000
        assert update.parts.get("temporaries", 0) < 4096, "norms and single numbers"
